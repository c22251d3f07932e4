"Pieces for the tests of a store under attack: subjects with known values, a writer that will be killed, flipped bits."
import multiprocessing as mp
import os
import signal
import time
from pathlib import Path

import h5py # noqa: F401 - loaded before the fork, so that a child writes at once
import numpy as np

from jfr2020.ground.errors import StoreError
from jfr2020.ground.geometry import Geometry
from jfr2020.store.hdf5 import H5Store, StoreWriter
from jfr2020.ground.streamlines import Streamlines
from jfr2020.ground.volume import CTVolume, FeatureVolume, MaskVolume

FORK = mp.get_context('fork')


def subject_values(
    k:int, # number of the subject
    version:int=0, # other values for another version
    big:int=1, # about how many times 100 kB
) -> dict: # arguments of StoreWriter.add
    "What subject `k` holds: a CT, a mask, features in chunks, lines with data, a table; the version is in the attributes"
    rng = np.random.default_rng([k, version])
    g = Geometry.from_spacing((4+k%3, 40, 50*big), (3,.5,.5), centre=rng.normal(size=3)*50)
    ct = rng.integers(-1000, 2000, g.shape).astype('i2')
    lines = Streamlines.from_list([rng.normal(size=(n,3)).cumsum(0) for n in rng.integers(0, 60, 40)],
                                  dict(weight=rng.random(40)), geometry=g)
    return dict(volumes=dict(ct=CTVolume(ct, g), mask=MaskVolume(ct > 130, g),
                             sh=(FeatureVolume((ct[...,None]//np.array([100,200,300])).astype('f4'), g), dict(storage='gzip'))),
                streamlines=dict(tracto=lines), tables=dict(scores=dict(reader=['a','b'], agatston=rng.random(2)*400)),
                attrs=dict(version_written=version))


def same_subject(
    got, # StoredSubject
    k:int, # which subject it should be
    version:int=None, # and which version; read from its attributes when absent
    big:int=1, # as it was written
) -> int: # the version found
    "Raise AssertionError unless every value of `got` is as `subject_values` makes it"
    version = got.attrs()['version_written'] if version is None else version
    want = subject_values(k, version, big)
    for name,v in want['volumes'].items():
        v = v[0] if isinstance(v, tuple) else v
        back = got.volume(name)
        assert type(back) is type(v) and back.geometry.matches(v.geometry, 1e-9)
        assert back.data.dtype == v.data.dtype and np.array_equal(back.data, v.data), name
    lines, back = want['streamlines']['tracto'], got.streamlines('tracto')
    assert np.array_equal(back.load().points, lines.points) and np.array_equal(back.offsets, lines.offsets)
    assert np.array_equal(back[[3,1]].per_line['weight'], lines[[3,1]].per_line['weight'])
    assert got.table('scores')['agatston'].tolist() == want['tables']['scores']['agatston'].tolist()
    return int(version)


def _write_on(folder, log, seed, every, big): # in a child: add, replace and remove until killed; a line of `log` is a promise kept
    rng = np.random.default_rng(seed)
    out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    say = lambda *words: os.write(out, (' '.join(map(str, words))+'\n').encode())
    with StoreWriter(folder, every=every) as w:
        say('open')
        version = int(time.time()*1e3) % 10**9
        for i in range(10**6):
            k = int(rng.integers(12)); name = f'sub-{k}'
            version += 1
            if name in w.subjects and rng.random() < .2: say('removing', k); w.remove(name); say('removed', k)
            else: say('adding', k, version); w.add(name, **subject_values(k, version, big), overwrite=True); say('added', k, version)


def kill_writer(
    folder:Path, # the store
    log:Path, # where the child says what it has done
    lines:int, # how many lines it may say first: 1 when it has opened the store, 2 more for each subject
    after_s:float, # and how long it may go on then
    seed:int=0, # of what it does
    every:float=.02, # s between two writings of its index
    big:int=1, # size of its subjects, see `subject_values`
):
    "Start a writer in another process and kill it with SIGKILL"
    start = log.stat().st_size if log.exists() else 0
    child = FORK.Process(target=_write_on, args=(folder, log, seed, every, big), daemon=True)
    child.start()
    while child.is_alive() and not (log.exists() and log.read_bytes()[start:].count(b'\n') >= lines): time.sleep(.002)
    time.sleep(after_s)
    if child.is_alive(): os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert child.exitcode == -signal.SIGKILL, f'the writer ended by itself: {child.exitcode}'


def promised(
    log:Path, # of `kill_writer`, any number of runs
) -> tuple: # {subject number: versions it may have, None for absent}, {subject number: version under way at a kill}
    "What the writers have said they did"
    done, doing = {}, {}
    for line in log.read_text().splitlines():
        word,*rest = line.split()
        k,v = ([int(r) for r in rest]+[None])[:2] if rest else (None, None)
        if word in ('adding','removing'): doing = {k: v}
        else: doing = {}
        if word in ('added','removed','either'): done[k] = {v, None} if word == 'either' else {v}
    return done, doing


def broken_promises(
    folder:Path, # the store, after a kill
    log:Path, # of `kill_writer`
    big:int=1, # as written
) -> list: # text of each
    "What a reader finds that the writer did not promise; a subject under way at the kill may be old or new, but whole"
    done, doing = promised(log)
    store, out, settled = H5Store(folder), [], []
    for k in range(12):
        may = done.get(k, {None}) | ({doing[k]} if k in doing else set())
        name, found = f'sub-{k}', None
        if name in store:
            try: found = same_subject(store[name], k, big=big)
            except StoreError as e: found = None if e.code == 'MISSING' and None in may else str(e)
        if found not in may: out.append(f'{name}: {found}, promised {may}')
        if len(may) > 1: # an announced removal is finished by the next writer; all else is settled now
            late = found is not None and doing.get(k, 0) is None
            settled.append(f'either {k} {found}' if late else f'removed {k}' if found is None else f'added {k} {found}')
    with open(log, 'a') as f: f.writelines(s+'\n' for s in settled)
    return out


def flip_bit(
    path:Path, # any file
    bit:int, # counted from its start
):
    "Change one bit of a file; a second call changes it back"
    with open(path, 'r+b') as f:
        f.seek(bit//8)
        b = f.read(1)[0]
        f.seek(bit//8)
        f.write(bytes([b ^ 1<<(bit%8)]))


def draw_bits(
    folder:Path, # a store
    n:int, # how many
    rng:np.random.Generator, # where the draw comes from
) -> list: # of (path, bit)
    "Bits of a store's files, half by the size of the files, half by file"
    files = sorted(p for p in Path(folder).rglob('*') if p.is_file() and p.stat().st_size)
    size = np.array([p.stat().st_size for p in files])
    which = np.r_[rng.choice(len(files), n-n//2, p=size/size.sum()), rng.integers(len(files), size=n//2)]
    return [(files[k], int(rng.integers(8*size[k]))) for k in which]
