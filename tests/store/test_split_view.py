"The subjects of a part: lines by number, a cache that keeps its bound, and workers that read the same."
import multiprocessing as mp
import os
import pickle

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jfr2020.ground.errors import StoreError
from jfr2020.ground.geometry import Geometry
from jfr2020.store import subject as stored
from jfr2020.store.hdf5 import H5Store, StoreWriter
from jfr2020.store.split_view import ByteCache, SplitView
from jfr2020.ground.streamlines import Streamlines
from jfr2020.ground.volume import CTVolume, FeatureVolume

COUNTS = dict(a=7, b=0, c=30, d=1)


def lines_of(rng, n, g):
    lengths = rng.integers(0, 12, n)
    points = rng.normal(size=(lengths.sum(), 3)).astype('f4')
    return Streamlines(points, np.r_[0, np.cumsum(lengths)], dict(w=rng.random((n, 2))), dict(fa=rng.random((len(points), 1))), g)


@pytest.fixture(scope='module')
def cohort(tmp_path_factory):
    home, rng, truth = tmp_path_factory.mktemp('cohort'), np.random.default_rng(0), {}
    with StoreWriter(home) as w:
        for k, (name, n) in enumerate(COUNTS.items()):
            g = Geometry.from_spacing((20, 30, 40), (2, 2, 2), (k, 0, 0)) # each its own place
            ct = CTVolume(rng.integers(-1000, 1000, g.shape).astype('i2'), g)
            sh = FeatureVolume(rng.normal(size=(*g.shape, 2)).astype('f4'), g)
            s = lines_of(rng, n, g)
            w.add(name, dict(ct=ct, sh=(sh, dict(storage='gzip'))), dict(t=s) if name != 'd' else {})
            truth[name] = dict(ct=ct, sh=sh, t=s)
        w.set_lists(training=['c', 'b', 'a'], validation=['d'])
    return home, truth


@pytest.mark.parametrize('lazy', [True, False])
def test_any_lines_in_any_order(cohort, lazy):
    home, truth = cohort
    view, rng = H5Store(home).split('training', lazy=lazy), np.random.default_rng(1)
    assert view.counts('t').tolist() == [30, 0, 7] and len(view.pairs('t')) == 37
    assert view.pairs('t', [0, 29, 30, 36]).tolist() == [[0, 0], [0, 29], [2, 0], [2, 6]] # b has none
    for _ in range(20):
        pairs = view.pairs('t', rng.integers(0, 37, rng.integers(0, 30)))
        got = view.lines('t', pairs)
        assert len(got) == len(pairs)
        for i, (k, j) in enumerate(pairs):
            s = truth[view.subjects[k]]['t']
            assert np.array_equal(got[i], s[j]) and np.array_equal(got.per_line['w'][i], s.per_line['w'][j])
            at = slice(*got.offsets[i:i+2])
            assert np.array_equal(got.per_point['fa'][at], s[[j]].per_point['fa'])


def test_geometry_stays_where_it_is_one(cohort):
    view = H5Store(cohort[0]).split('training')
    assert view.lines('t', [[0, 3], [0, 1]]).geometry is not None
    assert view.lines('t', [[0, 3], [2, 1]]).geometry is None


def test_a_subject_without_the_group_has_no_lines(cohort):
    home, truth = cohort
    view = SplitView(H5Store(home), ['d', 'a'])
    assert view.counts('t').tolist() == [0, 7]
    assert np.array_equal(view.lines('t', [[1, 2]])[0], truth['a']['t'][2])
    with pytest.raises(StoreError, match='NO_GROUP'): H5Store(home).split('validation').counts('t')
    assert len(H5Store(home).split('testing')) == 0


def test_counting_opens_no_file(cohort):
    store = H5Store(cohort[0])
    store.split('training').counts('t')
    assert not [s for s in store._subjects.values() if s._file is not None]


def test_few_open_files_however_many_subjects(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, 'KEEP_OPEN', 4)
    rng = np.random.default_rng(0)
    g = Geometry.from_spacing((2, 2, 2), (1, 1, 1))
    with StoreWriter(tmp_path) as w:
        for k in range(30): w.add(f's{k:02}', streamlines=dict(t=lines_of(rng, 3, g)))
    view = SplitView(H5Store(tmp_path), H5Store(tmp_path).subjects)
    before = len(os.listdir('/proc/self/fd')) if os.path.isdir('/proc/self/fd') else None
    view.lines('t', view.pairs('t'))
    if before is not None: assert len(os.listdir('/proc/self/fd')) <= before+2*4+2 # each open file and its map


@pytest.mark.parametrize('options', [dict(), dict(mmap=False), dict(cache_bytes=0), dict(cache_bytes=100_000), dict(lazy=False)])
def test_volumes_are_the_same_by_every_way(cohort, options):
    home, truth = cohort
    view, rng = H5Store(home).split('training', **options), np.random.default_rng(2)
    for k in rng.integers(0, 3, 12):
        for name in ('ct', 'sh'):
            v, want = view[int(k)].volume(name), truth[view.subjects[k]][name]
            assert np.array_equal(v.data, want.data) and type(v) is type(want) and v.geometry.matches(want.geometry)
            with pytest.raises(ValueError, match='read-only'): v.data[0] = 0
            assert view.cache.nbytes <= view.cache.max_bytes


def test_mapped_volumes_need_no_cache(cohort):
    view = H5Store(cohort[0]).split('training', cache_bytes=400_000)
    for s in view: s.volume('ct')
    assert view.cache.nbytes == 0
    for s in view: s.volume('sh')
    assert view.cache.nbytes == 2*20*30*40*2*4 # two of three fit


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 300), st.lists(st.tuples(st.integers(0, 12), st.integers(0, 150)), max_size=60))
def test_the_cache_keeps_its_bound_and_drops_the_oldest(bound, calls):
    cache, sizes, used = ByteCache(bound), {}, []
    for key, n in calls:
        n = sizes.setdefault(key, n)
        hit = key in cache
        assert hit == (key in used)
        assert len(cache.get(key, lambda n=n: np.zeros(n, 'u1'))) == n
        if key in used: used.remove(key)
        elif n > bound: continue
        used.append(key)
        while sum(sizes[k] for k in used) > bound: used.pop(0) # the model: oldest first
        assert cache.nbytes == sum(sizes[k] for k in used) <= bound and len(cache) == len(used)


def work(view, jobs, out):
    for i, pairs, k in jobs:
        s, v = view.lines('t', pairs), view[k].volume('sh')
        out.put((i, os.getpid(), s.points.tobytes(), s.per_point['fa'].tobytes(), v.data.tobytes(), view.cache.nbytes))


def done_by(view, jobs, processes, method):
    context = mp.get_context(method)
    out = context.Queue()
    workers = [context.Process(target=work, args=(view, jobs[i::processes], out)) for i in range(processes)]
    for p in workers: p.start()
    got = [out.get(timeout=60) for _ in jobs]
    for p in workers: p.join()
    return {i: rest for i, _, *rest in got}, {pid for _, pid, *_ in got}


@pytest.mark.parametrize('method', ['fork', 'spawn'])
@pytest.mark.parametrize('lazy', [True, False])
def test_two_processes_give_the_same_values_as_none(cohort, lazy, method):
    if method not in mp.get_all_start_methods(): pytest.skip(f'no {method} on this system')
    rng, options = np.random.default_rng(3), dict(lazy=lazy, cache_bytes=200_000)
    view = H5Store(cohort[0]).split('training', **options)
    jobs = [(i, view.pairs('t', rng.integers(0, 37, 9)), int(rng.integers(3))) for i in range(8)]
    class Here:
        def __init__(self): self.all = {}
        def put(self, o): self.all[o[0]] = list(o[2:])
    here = Here()
    work(view, jobs, here) # the parent has open files, maps and a full cache before the others start
    got, who = done_by(view, jobs, 2, method)
    assert len(who) == 2 and os.getpid() not in who
    assert {i: o[:3] for i, o in got.items()} == {i: o[:3] for i, o in here.all.items()}
    assert all(o[3] <= 200_000 for o in got.values()) # each its own bound


def test_a_view_pickles_small_and_a_cache_empty(cohort):
    view = H5Store(cohort[0]).split('training', lazy=False)
    for s in view: s.volume('sh')
    text = pickle.dumps(view)
    back = pickle.loads(text)
    assert len(text) < 20_000 and back.nbytes == 0
    assert np.array_equal(back.volume('a', 'ct').data, view.volume('a', 'ct').data) and back.nbytes > 0


@pytest.mark.parametrize('ask,said', [
    (lambda v: v.volume('d', 'ct'), "no 'd' among the 3"), (lambda v: v['a'].volume('pet'), 'NO_GROUP'), (lambda v: v[3], 'no 3 among'),
    (lambda v: v.streamlines('a', 'x'), 'NO_GROUP'), (lambda v: v.pairs('t', [-1]), r'lines 0\.\.36 needed'),
    (lambda v: v.pairs('t', [37]), 'NO_LINE'), (lambda v: SplitView(v.store, ['a', 'a']), 'twice'),
    (lambda v: v.lines('t', [[3, 0]]), 'no 3 among')])
def test_refusals(cohort, ask, said):
    with pytest.raises(StoreError, match=said): ask(H5Store(cohort[0]).split('training'))
