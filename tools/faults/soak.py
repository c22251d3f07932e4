"Readers beside a writer that adds and replaces subjects, and a second writer that must be turned away."
import json, os, random, tempfile, time
from collections import Counter
from pathlib import Path

from jfr2020.ground.errors import StoreError
from jfr2020.store.check import check_store
from jfr2020.store.hdf5 import H5Store, StoreWriter
from tools.faults import NAMES, WrongValue, carry_out, content, read_part, read_version, verify

PARTS = ('ct', 'sh', 'lines', 'truth')


def reader(folder, end, k): # -> counts; a third opens the store anew, a third keeps it, a third keeps subjects too
    os.nice(10) # the writer shall replace much
    rng, seen, wrong, newest = random.Random(k), Counter(), [], {}
    store = H5Store(folder)
    while time.monotonic() < end:
        name = rng.choice(NAMES)
        try:
            if k % 3 == 0: store = H5Store(folder)
            if name not in store.subjects: seen['not there yet'] += 1; store = H5Store(folder); continue
            stored = store[name]
            if k % 3 == 2:
                versions = {read_part(stored, name, rng.choice(PARTS)) for _ in range(6)}
                if len(versions) > 1: raise WrongValue(f'{name} mixes versions {sorted(versions)}')
                version = versions.pop()
            else: version = read_version(stored, name)
            seen['read'] += 1
            if version < newest.get(name, 0) and k % 3 == 0: raise WrongValue(f'{name} went back from {newest[name]} to {version}')
            newest[name] = max(version, newest.get(name, 0))
        except StoreError as e: seen[f'refused {e.code}'] += 1; store = H5Store(folder)
        except WrongValue as e: seen['wrong'] += 1; wrong.append(str(e))
        except Exception as e: seen['broke'] += 1; wrong.append(f'{type(e).__name__}: {str(e)[:200]}')
    return seen, wrong


def writing(folder, end, k):
    rng, seen, version = random.Random(k), Counter(), 1
    with StoreWriter(folder) as w:
        while time.monotonic() < end:
            version = version % 30_000 + 1
            carry_out(w, rng.choice(NAMES), version)
            seen['committed'] += 1
    return seen, []


def intruder(folder, end, k):
    seen, wrong = Counter(), []
    while time.monotonic() < end:
        try:
            with StoreWriter(folder): wrong.append('a second writer was let in')
        except StoreError as e:
            seen[e.code] += 1
            if e.code != 'BUSY': wrong.append(str(e))
        except Exception as e: wrong.append(f'{type(e).__name__}: {e}')
        time.sleep(.05)
    return seen, wrong


def spawn(job, folder, end, k, out): # fork a child that leaves its counts in a file
    pid = os.fork()
    if pid: return pid
    try: seen, wrong = job(folder, end, k)
    except BaseException as e: seen, wrong = {}, [f'{job.__name__} ended: {type(e).__name__}: {e}']
    try: (out/f'{job.__name__}-{k}').write_text(json.dumps([seen, wrong]))
    finally: os._exit(0)


def main(seconds=60, readers=8, seed=0):
    "Returns rows and what was wrong"
    with tempfile.TemporaryDirectory() as d:
        folder, out = Path(d)/'store', Path(d)/'out'
        out.mkdir()
        with StoreWriter(folder) as w: w.add(NAMES[0], **content(NAMES[0], 1))
        end = time.monotonic()+seconds
        pids = [spawn(writing, folder, end, seed, out)]
        time.sleep(.3) # it holds the lock now
        pids += [spawn(intruder, folder, end-.5, seed, out)] + [spawn(reader, folder, end-.2, k, out) for k in range(readers)]
        for p in pids: os.waitpid(p, 0)
        seen, wrong = {}, []
        for job in (writing, intruder, reader):
            files = list(out.glob(f'{job.__name__}-*'))
            results = [json.loads(p.read_text()) for p in files]
            seen[job.__name__] = sum((Counter(r[0]) for r in results), Counter())
            wrong += [w for r in results for w in r[1]]
            if len(files) != (readers if job is reader else 1): wrong.append(f'{job.__name__}: only {len(files)} came back')
        wrong += [f'check says {f}' for f in check_store(folder)]
        wrong += verify(folder, {n: {None, *range(1, 32001)} for n in NAMES})[1]
    if not seen['intruder']['BUSY']: wrong.append('no second writer was turned away')
    if not seen['reader']['read']: wrong.append('nothing was read')
    say = lambda c: ', '.join(f'{n} {w}' for w,n in c.most_common())
    return [(f'{readers} readers beside a writer, {seconds:g} s', seen['reader']['read'],
             f'readers: {say(seen["reader"])}; writer: {say(seen["writing"])}; second writer: {say(seen["intruder"])}')], wrong
