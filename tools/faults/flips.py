"Single bits of a store turned, one at a time, each turned back: `check_store` must find every one, and name the subject."
import random, tempfile
from collections import Counter
from pathlib import Path

from jfr2020.ground.errors import StoreError
from jfr2020.store.check import check_store
from jfr2020.store.hdf5 import StoreWriter
from tools.faults import NAMES, content


def turn(path, at, bit):
    with open(path, 'r+b') as f:
        f.seek(at); b = f.read(1)[0]
        f.seek(at); f.write(bytes([b ^ 1<<bit]))


def said(folder): # what check_store says, a refusal included; None where it finds nothing
    try: return [str(f) for f in check_store(folder)] or None
    except StoreError as e: return [f'refused {e}']


def main(flips=1000, seed=0):
    "Returns rows and what was wrong"
    rng, wrong, where, named = random.Random(seed), [], Counter(), 0
    with tempfile.TemporaryDirectory() as d:
        folder = Path(d)/'store'
        with StoreWriter(folder) as w:
            for k,name in enumerate(NAMES[:4]): w.add(name, **content(name, k+1))
            w.set_lists(training=NAMES[:2], validation=NAMES[2:3], testing=NAMES[3:4])
        if clean := said(folder): wrong.append(f'a whole store is complained of: {clean}')
        owner = {p: n for n in NAMES[:4] for p in folder.rglob('*.h5') if p.name == file_of(n)}
        files = sorted(p for p in folder.rglob('*') if p.is_file() and p.stat().st_size)
        ends = [sum(p.stat().st_size for p in files[:k+1]) for k in range(len(files))]
        for k in range(flips):
            at = rng.randrange(ends[-1]) if k % 5 else None # every fifth into the index, which is small
            i = next(i for i,e in enumerate(ends) if at < e) if at is not None else next(i for i,p in enumerate(files) if p.name == 'index.json')
            path = files[i]
            at, bit = rng.randrange(path.stat().st_size) if at is None else at-(ends[i-1] if i else 0), rng.randrange(8)
            turn(path, at, bit)
            try: found = said(folder)
            except Exception as e: found = None; wrong.append(f'{path.name} byte {at} bit {bit}: {type(e).__name__}: {e}')
            turn(path, at, bit)
            where['index' if path.name == 'index.json' else 'subjects' if path in owner else path.name] += 1
            if not found: wrong.append(f'{path.name} byte {at} bit {bit}: not found')
            elif path in owner:
                named += any(owner[path] in t for t in found)
                if not any(owner[path] in t for t in found): wrong.append(f'{path.name} byte {at} bit {bit}: {owner[path]} not named: {found}')
        if clean := said(folder): wrong.append(f'the store is not as before: {clean}')
    return [('bit flips', flips, ', '.join(f'{n} in {w}' for w,n in where.most_common()) + f'; {named} named the subject')], wrong


def file_of(subject):
    from jfr2020.store.shard import shard_name
    return shard_name(subject)
