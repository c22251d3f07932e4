"Faults put into the store on purpose and counted: what was lost, what was read wrong, what was not found."
import random, zlib
from functools import lru_cache

import numpy as np

from jfr2020.ground.errors import StoreError
from jfr2020.ground.geometry import Geometry
from jfr2020.ground.streamlines import Streamlines
from jfr2020.ground.volume import CTVolume, FeatureVolume

NAMES = tuple(f'sub-{k:02}' for k in range(1, 11))


class WrongValue(Exception):
    "A store gave a value that nobody wrote"


@lru_cache(maxsize=400)
def content(
    subject:str, # a name
    version:int, # 1.. 32000, how often the subject was written
) -> dict: # arguments of `StoreWriter.add`
    "What a subject holds in a version: arrays that say which version they are, and differ in every number"
    rng = np.random.default_rng([zlib.crc32(subject.encode()), version])
    g = Geometry.from_spacing((6, 24, 24), (3, .7, .7), rng.uniform(-50, 50, 3))
    ct, sh = rng.integers(-1000, 2000, g.shape).astype('i2'), rng.normal(size=(*g.shape, 4)).astype('f4')
    ct[0, 0, 0] = sh[0, 0, 0, 0] = version
    n = rng.integers(2, 40, 25)
    lines = Streamlines(rng.normal(size=(n.sum(), 3)).astype('f4'), np.r_[0, n.cumsum()], dict(version=np.full(25, version, 'i4')), geometry=g)
    storage = ('contiguous', 'gzip')[version % 2]
    return dict(volumes=dict(ct=CTVolume(ct, g), sh=(FeatureVolume(sh, g), dict(storage=storage))),
                streamlines=dict(lines=(lines, dict(storage=storage))), tables=dict(truth=dict(version=np.full(3, version), x=rng.normal(size=3))))


def read_part(
    stored, # `StoredSubject`
    subject:str, # its name
    part:str, # 'ct', 'sh', 'lines' or 'truth'
) -> int: # the version that was read
    "Read one group and compare every value of it with what was written in the version that it says it is"
    if part in ('ct', 'sh'):
        v = stored.volume(part)
        version = int(v.data.flat[0])
    elif part == 'lines': v = stored.streamlines(part).load(); version = int(v.per_line['version'][0, 0])
    else: v = stored.table(part); version = int(v['version'].iloc[0])
    if not 1 <= version <= 32000: raise WrongValue(f'{subject}/{part} says it is version {version}')
    if not _same(part, v, content(subject, version)): raise WrongValue(f'{subject}/{part} is not version {version} as written')
    return version


def _same(part, v, want):
    if part in ('ct', 'sh'):
        w = want['volumes'][part]
        w = w[0] if isinstance(w, tuple) else w
        return type(v) is type(w) and np.array_equal(v.data, w.data) and v.geometry.matches(w.geometry, 1e-6)
    if part == 'lines':
        w = want['streamlines'][part][0]
        return (np.array_equal(v.points, w.points) and np.array_equal(v.offsets, w.offsets) and
                np.array_equal(v.per_line['version'], w.per_line['version']) and v.geometry.matches(w.geometry, 1e-6))
    return all(np.array_equal(v[c].to_numpy(), a) for c,a in want['tables'][part].items()) and len(v.columns) == 2


def read_version(stored, subject): # -> version of the whole subject; all parts must be of the same
    seen = {read_part(stored, subject, p) for p in ('ct', 'sh', 'lines', 'truth')}
    if len(seen) > 1: raise WrongValue(f'{subject} mixes versions {sorted(seen)}')
    return seen.pop()


def verify(
    folder, # of the store
    allowed:dict, # subject -> set of versions it may have, None for not there
) -> tuple: # subject -> version found (None: not there), list of what is wrong
    "Open the store anew, read every value, and say which committed subject is lost or other than written"
    from jfr2020.store.hdf5 import H5Store
    found, wrong = {}, []
    try: store = H5Store(folder)
    except Exception as e:
        if any(None not in a for a in allowed.values()): wrong.append(f'the store does not open: {type(e).__name__}: {e}')
        return dict.fromkeys(allowed), wrong
    for name,versions in allowed.items():
        try: v = read_version(store[name], name) if name in store.subjects else None
        except StoreError as e: v = None if e.code == 'MISSING' and None in versions else str(e) # a removal that was cut short
        except Exception as e: v = f'{type(e).__name__}: {e}'
        if v not in versions: wrong.append(f'{name}: found {v}, one of the versions {sorted(versions, key=str)} was committed')
        found[name] = v
    for name in set(store.subjects) - set(allowed): wrong.append(f'{name} was never written')
    return found, wrong


def leftovers(folder): # names of temporary files in the store
    from jfr2020.ground.disk import TEMPORARY
    return [p.name for p in folder.rglob('*') if p.name.startswith(TEMPORARY)]


class Plan:
    "The order in which a writer adds, replaces and removes; a state that a fork inherits"
    def __init__(self, seed=0):
        self.rng, self.now, self.last = random.Random(seed), dict.fromkeys(NAMES), 0
        self.doubt = set() # whose removal was cut short: there, or not

    def next(self): # -> subject, version to write or None to remove
        name = self.rng.choice(NAMES)
        self.last += 1
        if name in self.sure() and self.rng.random() < .15: return name, None
        return name, self.last % 32000 or 1

    def sure(self): return [n for n in NAMES if self.now[n] is not None and n not in self.doubt] # who is there

    def done(self, name, version): self.now[name] = version; self.doubt.discard(name)


def carry_out(w, name, version): # one step of a plan
    if version is None: w.remove(name)
    else: w.add(name, **content(name, version), overwrite=True)
