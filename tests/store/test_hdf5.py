"The store: every value comes back, any subset of lines equals the whole, no kill, full disk or flipped bit goes unnoticed."
import gc
import json
import multiprocessing as mp
import os
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jfr2020.ground.errors import StoreError
from jfr2020.ground.geometry import Geometry
from jfr2020.store.check import WELL_MEANT, check_store, reindex
from jfr2020.store.hdf5 import H5Store, StoreWriter, sealed, unsealed
from jfr2020.store.shard import STORAGES, examine_shard, open_hdf5, shard_name, write_shard
from jfr2020.store.subject import StoredSubject, read_rows
from jfr2020.ground.streamlines import Streamlines
from jfr2020.ground.volume import CTVolume, FeatureVolume, MaskVolume, Volume

from tests.store.storefaults import broken_promises, draw_bits, flip_bit, kill_writer, same_subject, subject_values

FEW = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
ROOT = Path(__file__).parents[2]


def code_of(call): # of the StoreError it raises
    with pytest.raises(StoreError) as e: call()
    return e.value.code


def any_geometry(rng, shape):
    A = np.eye(4)
    A[:3,:3] = np.linalg.qr(rng.normal(size=(3,3)))[0] * rng.uniform(.1, 5, 3)
    A[:3,3] = rng.normal(size=3)*200
    return Geometry(shape, A)


@pytest.fixture(scope='module')
def store(tmp_path_factory):
    "Six subjects, never changed by a test"
    folder = tmp_path_factory.mktemp('store')/'s'
    with StoreWriter(folder) as w:
        for k in range(6): w.add(f'sub-{k}', **subject_values(k))
        w.set_lists(training=['sub-0','sub-1','sub-2','sub-3'], validation=['sub-4'], testing=['sub-5'])
    return folder


@pytest.fixture
def copied(store, tmp_path): return Path(shutil.copytree(store, tmp_path/'s'))


# -- values

@FEW
@given(seed=st.integers(0, 2**32), dtype=st.sampled_from('i1 u1 i2 u2 i4 u4 i8 u8 f2 f4 f8 ? >i2 >f8'.split()),
       shape=st.tuples(*[st.integers(1, 90)]*3), kind=st.sampled_from([Volume, FeatureVolume, MaskVolume, CTVolume]),
       storage=st.sampled_from(STORAGES), fortran=st.booleans())
def test_any_volume_comes_back(seed, dtype, shape, kind, storage, fortran):
    rng = np.random.default_rng(seed)
    shape = (shape[0]%9+1, *shape[1:])
    a = (rng.normal(size=(*shape, 3) if kind is FeatureVolume else shape)*100).astype(dtype)
    if kind is CTVolume: a = a.astype('i2')
    if kind is MaskVolume: a = a.astype('u1')
    if fortran: a = np.asfortranarray(a)
    v = kind(a, any_geometry(rng, shape))
    with tempfile.TemporaryDirectory() as home:
        w = write_shard(home, 's', dict(v=(v, dict(storage=storage, source='made up'))))
        sub = StoredSubject(w.part, 's')
        for mmap in (True, False):
            back = sub.volume('v', mmap)
            assert type(back) is kind and np.array_equal(back.geometry.affine, v.geometry.affine)
            assert back.data.dtype == a.dtype.newbyteorder('<') and np.array_equal(back.data, a)
        assert examine_shard(w.part) == ('s', w.entry, {})
        assert storage != 'contiguous' or not sub.volume('v').data.flags.writeable


def lines_of(rng, lengths):
    n = int(sum(lengths))
    return Streamlines(rng.normal(size=(n,3)).astype('f4')*50, np.r_[0, np.cumsum(lengths)].astype('i8'),
                       dict(w=rng.random(len(lengths)), label=rng.integers(0, 9, (len(lengths),2))),
                       dict(fa=rng.random((n,1)).astype('f4'), inside=rng.random(n) < .5), any_geometry(rng, (9,8,7)))


def same_lines(a, b):
    assert np.array_equal(a.points, b.points) and np.array_equal(a.offsets, b.offsets)
    for kind in ('per_line', 'per_point'):
        one, two = getattr(a, kind), getattr(b, kind)
        assert set(one) == set(two)
        for k in one: assert one[k].dtype == two[k].dtype and np.array_equal(one[k], two[k]), k
    assert np.array_equal(a.geometry.affine, b.geometry.affine) and a.geometry.shape == b.geometry.shape


@FEW
@given(seed=st.integers(0, 2**32), lengths=st.lists(st.integers(0, 3000), max_size=40), storage=st.sampled_from(STORAGES),
       half=st.booleans(), data=st.data())
def test_any_subset_of_lines_is_as_in_memory(seed, lengths, storage, half, data):
    rng = np.random.default_rng(seed)
    lines, n = lines_of(rng, lengths), len(lengths)
    with tempfile.TemporaryDirectory() as home:
        w = write_shard(home, 's', streamlines=dict(t=(lines, dict(storage=storage, dtype='float16' if half else 'float32'))))
        s = StoredSubject(w.part, 's').streamlines('t')
        whole = s.load()
        assert len(s) == n and np.array_equal(s.lengths, lines.lengths) and np.allclose(s.lengths_mm, whole.lengths_mm)
        if half: assert n == 0 or np.linalg.norm(whole.points-lines.points, axis=1).max(initial=0) <= s.attrs['max_error_mm']+1e-9
        else: same_lines(whole, lines)
        ids = data.draw(st.lists(st.integers(-n, n-1), max_size=60)) if n else []
        step = data.draw(st.integers(-5, 5).filter(bool))
        for key in (ids, np.array(ids, 'i8'), rng.random(n) < .3, slice(None), slice(1, None, step), slice(3, 1)):
            same_lines(s[key], whole[key])
        for i in ids[:5]: assert np.array_equal(s[i], whole[i])


def test_lengths_are_points_also_of_a_very_long_line(tmp_path):
    lines = lines_of(np.random.default_rng(0), [40000, 2, 70000])
    s = StoredSubject(write_shard(tmp_path, 's', streamlines=dict(t=lines)).part).streamlines('t')
    assert s.lengths.tolist() == [40000, 2, 70000] and s.lengths.dtype == np.int64
    same_lines(s[[2,0]], lines[[2,0]])
    same_lines(s[[1]], lines[[1]])


def test_runs_of_rows_of_a_packed_set(tmp_path):
    rng = np.random.default_rng(0)
    a = rng.normal(size=(50000, 3)).astype('f4')
    with open_hdf5(tmp_path/'a.h5', 'w') as h5: h5.create_dataset('a', data=a, chunks=(700,3), compression='gzip')
    with open_hdf5(tmp_path/'a.h5') as h5:
        for n in (0, 1, 5, 200):
            starts = rng.integers(0, 49000, n)
            stops = starts + rng.integers(0, 900, n)
            want = np.concatenate([a[:0], *[a[i:j] for i,j in zip(starts, stops)]])
            assert np.array_equal(read_rows(h5['a'], starts, stops), want) and np.array_equal(read_rows(a, starts, stops), want)


@FEW
@given(rows=st.lists(st.tuples(st.text(st.characters(exclude_categories=['Cs'], exclude_characters='\0')), st.floats(), st.booleans(),
                               st.integers(-2**63, 2**63-1))))
def test_any_table_comes_back(rows):
    import pandas as pd
    cols = dict(zip('text real yes whole'.split(), map(list, zip(*rows)))) if rows else dict(real=np.zeros(0))
    table = pd.DataFrame(cols)
    with tempfile.TemporaryDirectory() as home:
        for value in (table, {c: np.asarray(v) if c != 'text' else v for c,v in cols.items()}):
            back = StoredSubject(write_shard(home, 's', tables=dict(t=value)).part).table('t')
            assert list(back) == list(table) and len(back) == len(table)
            for c in cols: assert back[c].tolist() == table[c].tolist() or np.array_equal(back[c], table[c], equal_nan=True), c


def test_stored_lines_are_gone_through_like_those_in_memory(store):
    stored = H5Store(store)['sub-0'].streamlines('tracto')
    assert [l.tolist() for l in stored] == [l.tolist() for l in stored.load()] and len(list(stored)) == len(stored) > 1


def test_a_writer_that_is_not_at_work_touches_nothing(copied):
    before = {p: p.read_bytes() for p in copied.rglob('*') if p.is_file()}
    idle, done = StoreWriter(copied), StoreWriter(copied)
    with done: pass
    acts = (lambda w: w.add('new', **subject_values(9)), lambda w: w.remove('sub-0'), lambda w: w.set_lists(training=['sub-0']))
    for w in (idle, done):
        for act in acts: assert code_of(partial(act, w)) == 'CLOSED'
    assert {p: b for p,b in before.items() if p.read_bytes() != b} == {} and not list(copied.rglob('.part-*'))


def test_a_table_may_be_made_when_its_turn_comes(tmp_path):
    with StoreWriter(tmp_path/'s') as w:
        w.add('a', tables=dict(t=lambda: dict(x=[1,2]), o=lambda: (dict(x=[3]), dict(source='made up')), p=(dict(x=[4]), dict(unit='mm'))))
        with pytest.raises(StoreError, match='t needs a DataFrame'): w.add('b', tables=dict(t=lambda: 3))
    a = H5Store(tmp_path/'s')['a']
    assert [a.table(n)['x'].tolist() for n in 'top'] == [[1,2], [3], [4]]
    assert a.attrs('o')['source'] == 'made up' and a.attrs('p')['unit'] == 'mm'


def test_attributes_come_back(tmp_path):
    g = any_geometry(np.random.default_rng(0), (2,3,4))
    attrs = dict(unit='mm\u00b2/s', mean=np.arange(3.), std=2.5, standardization='per channel', n=7, yes=True, files=['a','b\u00e9'], empty='',
                 none=None)
    sub = StoredSubject(write_shard(tmp_path, 's', dict(v=(Volume(np.zeros(g.shape), g), attrs)), attrs=dict(source='x')).part)
    got = sub.attrs('v')
    assert got.pop('mean').tolist() == [0,1,2] and np.array_equal(got.pop('affine'), g.affine)
    assert got == dict({k: v for k,v in attrs.items() if k not in ('mean','none')}, kind='volume', frame='RAS+ mm', axes='D,H,W')
    assert sub.attrs()['source'] == 'x' and sub.attrs()['subject'] == 's'


@pytest.mark.parametrize('attrs', [dict(a=object()), dict(a=[[1],[1,2]]), dict(a='x\0y'), dict(a='\ud800'), dict(a=1j), {'a/b': 1},
                                   dict(affine=1), dict(sha256='x'), dict(a={})], ids='object ragged nul surrogate complex slash affine sha256 dict'.split())
def test_odd_attributes_are_refused(tmp_path, attrs):
    assert code_of(lambda: write_shard(tmp_path, 's', attrs=attrs)) in ('TYPE', 'NAME')
    assert list((tmp_path/'subjects').iterdir()) == []


# -- the folder

def test_importing_opens_nothing_heavy():
    code = 'import sys, jfr2020.store.check; print([m for m in ("h5py","pandas","scipy","hdf5plugin") if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == '[]'


def test_every_subject_comes_back(store):
    s = H5Store(store)
    assert s.findings == [] and check_store(store) == [] and len(s) == 6
    for k in range(6): assert same_subject(s[f'sub-{k}'], k) == 0
    assert s.lists == dict(training=('sub-0','sub-1','sub-2','sub-3'), validation=('sub-4',), testing=('sub-5',))


def test_refusals_name_what_there_is(store, tmp_path):
    s = H5Store(store)
    with pytest.raises(StoreError, match="no 'sub-9' in the store; it has 6 subjects: sub-0, sub-1"): s['sub-9']
    with pytest.raises(StoreError, match="sub-0: no 't1' among its volumes, there are: ct, mask, sh"): s['sub-0'].volume('t1')
    for name in ('tracto/points', '../ct', '', None, 'x'*1000): assert code_of(lambda n=name: s['sub-0'].streamlines(n)) == 'NO_GROUP'
    with open_hdf5(tmp_path/'foreign.hdf5', 'w') as h5: h5['sub-0/t1'] = [1.]
    assert code_of(lambda: H5Store(tmp_path/'foreign.hdf5')) == code_of(lambda: StoreWriter(tmp_path/'foreign.hdf5').__enter__()) == 'NOT_A_STORE'
    (tmp_path/'data').mkdir(); (tmp_path/'data'/'scan.dcm').write_text('x')
    assert code_of(lambda: H5Store(tmp_path/'data')) == code_of(lambda: StoreWriter(tmp_path/'data').__enter__()) == 'NOT_A_STORE'
    assert [p.name for p in (tmp_path/'data').iterdir()] == ['scan.dcm']


def test_another_layout_is_refused(copied):
    index = unsealed((copied/'index.json').read_bytes()); index.pop('sha256')
    (copied/'index.json').write_bytes(sealed(dict(index, schema='jfr2020.store/99')))
    assert code_of(lambda: H5Store(copied)) == code_of(lambda: StoreWriter(copied).__enter__()) == 'SCHEMA'


def test_writer_says_what_it_refuses(copied):
    with StoreWriter(copied) as w:
        assert code_of(lambda: w.add('sub-0', **subject_values(0))) == 'EXISTS'
        assert code_of(lambda: w.remove('sub-9')) == code_of(lambda: w.set_lists(training=['sub-9'])) == 'NO_SUBJECT'
        assert code_of(lambda: w.set_lists(training=['sub-0'], testing=['sub-0'])) == 'LISTS'
        assert code_of(lambda: StoreWriter(copied).__enter__()) == 'BUSY'
        with pytest.raises(ZeroDivisionError): w.add('sub-7', dict(ct=lambda: 1/0))
    assert check_store(copied) == [] and H5Store(copied).subjects == tuple(f'sub-{k}' for k in range(6))


def test_second_writer_in_another_process(copied):
    code = 'import sys; from jfr2020.store.hdf5 import StoreWriter\nwith StoreWriter(sys.argv[1]): pass'
    with StoreWriter(copied):
        p = subprocess.run([sys.executable, '-c', code, copied], capture_output=True, text=True)
    assert p.returncode and 'BUSY: another run writes into this folder' in p.stderr


def test_removed_subject_stays_away(copied):
    with StoreWriter(copied) as w: w.remove('sub-0')
    assert 'sub-0' not in H5Store(copied) and 'sub-0' not in H5Store(copied).lists['training'] and check_store(copied) == []
    with StoreWriter(copied) as w: # an announcement that a full disk kept alive does not reach the next subject of that name
        w._changes.add(shard_name('sub-0'), do='remove'); w._dirty = False
        w.add('sub-0', **subject_values(0, 5))
        w.flush = lambda: None # as if killed
    with StoreWriter(copied) as w: assert [f.code for f in w.findings] == ['ADOPTED']
    assert same_subject(H5Store(copied)['sub-0'], 0) == 5


def test_replaced_but_not_yet_in_the_index(copied):
    s = H5Store(copied)
    w = StoreWriter(copied, every=1e9).__enter__()
    w.add('sub-1', **subject_values(1, 8), overwrite=True); w.add('sub-8', **subject_values(8))
    w._lock.__exit__(None, None, None) # as if killed
    assert {f.code for f in check_store(copied)} == {'NEWER', 'ORPHAN', 'PENDING'} <= set(WELL_MEANT)
    assert same_subject(H5Store(copied)['sub-1'], 1) == 8 and same_subject(H5Store(copied)['sub-8'], 8) == 0
    assert 'sub-8' not in s and same_subject(s['sub-1'], 1) == 8 # opened after
    with StoreWriter(copied): pass
    assert check_store(copied) == []


def test_what_is_open_stays_whole_when_replaced(copied):
    s = H5Store(copied)
    sub, lines = s['sub-2'], s['sub-2'].streamlines('tracto')
    ct = sub.volume('ct')
    with StoreWriter(copied) as w: w.add('sub-2', **subject_values(2, 3), overwrite=True)
    assert same_subject(sub, 2, 0) == 0 and np.array_equal(ct.data, subject_values(2)['volumes']['ct'].data)
    sub.close()
    assert code_of(lambda: sub.volume('ct')) == code_of(lambda: lines[[1]]) == 'REPLACED'
    assert np.array_equal(ct.data, subject_values(2)['volumes']['ct'].data)
    assert same_subject(H5Store(copied)['sub-2'], 2) == 3


def test_few_files_are_open_at_once(store, monkeypatch):
    monkeypatch.setattr('jfr2020.store.subject.KEEP_OPEN', 2)
    count = lambda: len(os.listdir('/proc/self/fd'))
    gc.collect(); before = count()
    s = H5Store(store)
    lines = [s[n].streamlines('tracto') for n in s]
    for _ in range(2):
        for n,l in zip(s, lines): s[n].volume('ct'); l[[0,5]]
    gc.collect()
    assert count()-before <= 2*2 # a file, and its map
    s.close(); gc.collect()
    assert count() == before


def _worker(args): # in another process
    s, lines, name, k = args
    return os.getpid(), same_subject(s[name], k), lines[[7,7,0]].points.sum().item()


@pytest.mark.parametrize('how', ['fork', 'spawn'])
def test_readers_in_workers(store, how):
    s = H5Store(store)
    lines = s['sub-0'].streamlines('tracto')
    want = lines[[7,7,0]].points.sum().item() # open here before the workers start
    with mp.get_context(how).Pool(2) as pool: got = pool.map(_worker, [(s, lines, f'sub-{k%6}', k%6) for k in range(12)], chunksize=1)
    assert {v for _,v,_ in got} == {0} and {p for _,_,p in got} == {want} and os.getpid() not in {p for p,_,_ in got}
    assert lines[[7,7,0]].points.sum().item() == want


def _prepare(args): folder, k = args; return write_shard(folder, f'sub-{k}', **subject_values(k))


def test_many_prepare_one_commits(tmp_path):
    with StoreWriter(tmp_path/'s') as w, mp.get_context('fork').Pool(2) as pool:
        for one in pool.imap_unordered(_prepare, [(tmp_path/'s', k) for k in range(6)]): w.commit(one)
    assert check_store(tmp_path/'s') == [] and len(H5Store(tmp_path/'s')) == 6


# -- faults

def test_killed_writers_break_no_promise(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(20):
        kill_writer(tmp_path/'s', tmp_path/'log', int(rng.integers(1, 9)), rng.uniform(0, .02), i)
        assert broken_promises(tmp_path/'s', tmp_path/'log') == []
        assert [str(f) for f in check_store(tmp_path/'s') if f.code not in WELL_MEANT] == []
    with StoreWriter(tmp_path/'s'): pass
    assert check_store(tmp_path/'s') == [] and broken_promises(tmp_path/'s', tmp_path/'log') == []
    assert (tmp_path/'log').read_text().count('added') > 20


def test_every_flipped_bit_is_found(copied):
    rng = np.random.default_rng(1)
    for path,bit in draw_bits(copied, 60, rng):
        flip_bit(path, bit)
        faults = [f for f in check_store(copied) if f.code not in WELL_MEANT]
        assert faults, (path.name, bit)
        if path.suffix == '.h5': # and says whose: no other subject
            subject = next(n for n in (f'sub-{k}' for k in range(6)) if shard_name(n) == path.name)
            assert {(f.code, f.subject) for f in faults} == {('CHANGED', subject)}
        flip_bit(path, bit)
    assert check_store(copied) == []


def test_flipped_bits_name_the_data_set(copied):
    rng, path = np.random.default_rng(2), copied/'subjects'/shard_name('sub-3')
    with open_hdf5(path) as h5:
        spans = {}
        for name in ('volumes/ct', 'volumes/mask', 'streamlines/tracto/points', 'tables/scores/agatston'):
            spans[name] = h5[name].id.get_offset(), h5[name].id.get_storage_size()
        chunk = h5['volumes/sh'].id.get_chunk_info(0)
        spans['volumes/sh'] = chunk.byte_offset, chunk.size
    for name,(at,n) in spans.items():
        for _ in range(3):
            bit = 8*at + int(rng.integers(8*n))
            flip_bit(path, bit)
            assert [(f.subject, f.data_set) for f in check_store(copied)] == [('sub-3', name)]
            flip_bit(path, bit)


def test_lost_index_and_lists(copied):
    want = {n: (copied/n).read_bytes() for n in ('index.json', 'lists.json')}
    (copied/'index.json').unlink()
    assert [f.code for f in check_store(copied)] == ['NO_INDEX'] and code_of(lambda: StoreWriter(copied).__enter__()) == 'NO_INDEX'
    s = H5Store(copied) # the files are the truth
    assert len(s) == 6 and s.lists['testing'] == ('sub-5',) and s.findings[0].code == 'NO_INDEX'
    assert [f.code for f in reindex(copied)] == ['NO_INDEX']
    (copied/'lists.json').unlink()
    assert [f.code for f in check_store(copied)] == ['LISTS'] and H5Store(copied).lists['testing'] == ('sub-5',)
    assert reindex(copied) == [] and {n: (copied/n).read_bytes() for n in want} == want
    for n in want: (copied/n).unlink()
    assert {f.code for f in reindex(copied)} == {'NO_INDEX', 'LISTS'} and H5Store(copied).lists['testing'] == ()


def test_reindex_leaves_damage_out(copied):
    path = copied/'subjects'/shard_name('sub-3')
    raw = path.read_bytes()
    for damage in (raw[:len(raw)//2], b'', raw[:3000]+bytes(100)+raw[3100:]):
        path.write_bytes(damage)
        assert [(f.code, f.subject or 'sub-3') for f in reindex(copied)][:1] == [('CHANGED', 'sub-3')]
        assert 'sub-3' not in H5Store(copied) and 'CHANGED' in {f.code for f in check_store(copied)}
        path.write_bytes(raw)
        assert reindex(copied) == [] and check_store(copied) == []


FULL = """
import sys, os, json; sys.path.insert(0, sys.argv[1])
from tests.store.storefaults import subject_values, same_subject
from jfr2020.ground.errors import StoreError
from jfr2020.store.hdf5 import StoreWriter, H5Store
from jfr2020.store.check import check_store
folder, said, n = sys.argv[2], '', 0
if len(sys.argv) > 3:
    import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),)*2)
try:
    with StoreWriter(folder, every=0) as w:
        for k in range(60): w.add(f'sub-{k}', **subject_values(k, big=1+k%3)); n = k+1
except StoreError as e: said = str(e)
s = H5Store(folder)
whole = [same_subject(s[f'sub-{k}'], k, big=1+k%3) for k in range(n)]
left = [p for d,_,f in os.walk(folder) for p in f if p.startswith('.part-')]
print(json.dumps(dict(said=said, committed=n, whole=len(whole), left=left, faults=[f.code for f in check_store(folder)])))
"""


def full_disk(tmp_path, kb): # what happens on a disk of `kb` kB, or None where none can be made here
    inside = f'mount -t tmpfs -o size={kb}k none "$1" && shift && exec "$@"'
    (tmp_path/'disk').mkdir(exist_ok=True)
    p = subprocess.run(['unshare', '-Urm', 'sh', '-c', inside, 'sh', tmp_path/'disk', sys.executable, '-c', FULL, ROOT, tmp_path/'disk'/'s'],
                       capture_output=True, text=True)
    if 'mount:' in p.stderr or 'unshare' in p.stderr: return None
    assert p.returncode == 0, p.stderr[-2000:]
    return json.loads(p.stdout)


@pytest.mark.parametrize('kb', [700, 1900, 3100, 5300])
def test_full_disk_loses_nothing(tmp_path, kb):
    if not shutil.which('unshare') or (r := full_disk(tmp_path, kb)) is None: pytest.skip('no small disk can be mounted here')
    assert r['said'].startswith('DISK: cannot write') and 'free some space' in r['said'] and str(tmp_path) not in r['said']
    assert r['whole'] == r['committed'] and r['left'] == [] and set(r['faults']) <= set(WELL_MEANT)
    assert kb < 1000 or r['committed'] > 0


def test_file_size_limit_loses_nothing(tmp_path):
    p = subprocess.run([sys.executable, '-c', FULL, ROOT, tmp_path/'s', '150000'], capture_output=True, text=True)
    r = json.loads(p.stdout)
    assert r['said'].startswith('DISK: cannot write') and r['committed'] >= 1 and r['whole'] == r['committed'] and r['left'] == []
    assert r['faults'] == []
