"The one-file layout: a file written by hand is read right, a store comes back bit for bit, and a file that lies is refused."
import os, signal, subprocess, sys, tracemalloc
from dataclasses import replace

from tests.store import dwi_ml_file as dwi
import h5py
import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jfr2020.ground.errors import JfrError, StoreError
from jfr2020.ground.geometry import Geometry
from jfr2020.store import dwi_ml_layout as layout
from jfr2020.store import pack
from jfr2020.store import untrusted
from jfr2020.store.hdf5 import H5Store, StoreWriter
from jfr2020.store.dwi_ml_layout import corner_to_mm, mm_to_corner, rounding_of, unrounded
from jfr2020.files.nifti import read_nifti
from jfr2020.store.pack import extract, import_store, pack_store
from jfr2020.files.tractogram import read_tractogram
from jfr2020.ground.streamlines import Streamlines
from jfr2020.ground.volume import CTVolume, FeatureVolume, MaskVolume, Volume

TOL_MM = 2e-5 # mm, of a float32 within 130 mm of the scanner's middle


def contents(folder):
    store = H5Store(folder)
    return {s: store.entry(s)['content'] for s in store}


def theirs(path):
    "All data sets and attributes of a file that dwi_ml reads: the bytes, without the date"
    out = {}
    def one(name, o):
        if 'jfr2020_' in name: return
        out[name] = o[()].tobytes() if isinstance(o, h5py.Dataset) else None
        out[name, 'attrs'] = {k: np.asarray(v).tolist() for k, v in o.attrs.items() if not k.startswith('jfr2020_')}
    with h5py.File(path) as f:
        f.visititems(one)
        out['attrs'] = {k: np.asarray(v).tolist() for k, v in f.attrs.items() if k != 'data_and_time' and 'jfr' not in k}
    return out


# ---- a file that is not ours

@pytest.fixture(scope='module')
def foreign(tmp_path_factory):
    home = tmp_path_factory.mktemp('foreign')
    truth = dwi.write(home/'a.hdf5')
    return home, truth, import_store(home/'a.hdf5', home/'store')


def test_a_file_written_by_hand_is_read_right(foreign):
    home, truth, _ = foreign
    store = H5Store(home/'store')
    assert store.subjects == tuple(dwi.SHAPES)
    assert store.lists == dict(training=('subj-B', 'subj-A'), validation=('subj-C',), testing=())
    for s, groups in truth.items():
        sub = store[s]
        assert set(sub.volumes+sub.streamline_groups) == set(groups)
        for name in sub.volumes:
            want, v = groups[name], sub.volume(name)
            for x, y, z in np.ndindex(want['data'].shape[:3]): # voxel by voxel: the reversal of axes
                assert np.array_equal(np.atleast_1d(v.data[z, y, x]), want['data'][x, y, z])
                assert np.allclose(v.geometry.to_world([[z, y, x]])[0], (want['affine'] @ [x, y, z, 1])[:3], atol=1e-9)
            assert type(v) is (FeatureVolume if want['data'].shape[3] > 1 else Volume) and v.data.dtype == np.float32


def test_every_spelling_of_space_and_origin_gives_the_same_millimetres(foreign):
    home, truth, remarks = foreign
    store, worst = H5Store(home/'store'), 0.
    for s, groups in truth.items():
        for name in ('tracts', 'ends'):
            want, got = groups[name], store[s].streamlines(name).load()
            assert got.lengths.tolist() == [len(p) for p in want['mm']]
            worst = max([worst]+[np.abs(a-b).max() for a, b in zip(got, want['mm'])])
            assert got.geometry.shape == want['shape'][::-1]
            assert set(got.per_line) == set(want['dps'])
            for k, v in want['dps'].items(): assert np.array_equal(got.per_line[k], v) and got.per_line[k].dtype == np.float32
    assert worst < TOL_MM
    assert not [r for r in remarks if r.code == 'LENGTHS'] # written lengths in mm agree


def test_voxel_centres_are_where_the_affine_says(foreign):
    home, truth, _ = foreign
    A = truth['subj-A']['tracts']['affine']
    line = H5Store(home/'store')['subj-A'].streamlines('tracts')[2] # stored as (.5,.5,.5), (3.5,2.5,1.5)
    assert np.allclose(line, [A[:3, 3], (A @ [3, 2, 1, 1])[:3]], atol=TOL_MM)


def test_what_else_the_file_says_is_kept(foreign):
    home, truth, remarks = foreign
    store = H5Store(home/'store')
    for s in store:
        lines = store[s].streamlines('tracts')
        assert np.array_equal(lines.extra['connectivity_matrix'], truth[s]['tracts']['connectivity'])
        assert lines.extra['connectivity_matrix'].dtype == bool and lines.attrs['step_mm'] == .5
        assert 'nb_points' not in lines.attrs and 'compress_mm' not in lines.attrs
        assert store[s].attrs('input')['standardization'] == 'all' and store[s].attrs()['groups_config'] == str(dwi.CONFIG)
    assert store['subj-A'].attrs('tracts')['connectivity_nb_blocs'].tolist() == [4, 3, 2]
    c = store['subj-C'].streamlines('tracts')
    assert c.attrs['connectivity_matrix_type'] == 'from_labels'
    assert np.array_equal(c.extra['connectivity_labels'].T, truth['subj-C']['tracts']['labels'])
    assert np.allclose(c.attrs['connectivity_labels_affine'], c.geometry.affine)
    codes = [r.code for r in remarks]
    assert codes.count('NO_MEAN') == 3 and codes.count('GROUPS') == 1 and len(codes) == 4


def test_files_of_older_versions(tmp_path):
    truth = dwi.write(tmp_path/'old.hdf5', old=True)
    import_store(tmp_path/'old.hdf5', tmp_path/'store')
    lines = H5Store(tmp_path/'store')['subj-B'].streamlines('tracts')
    assert lines.per_line == {} and np.abs(lines[1]-truth['subj-B']['tracts']['mm'][1]).max() < TOL_MM


def test_lines_in_any_order_with_gaps(tmp_path):
    truth = dwi.write(tmp_path/'a.hdf5')['subj-A']['tracts']['mm']
    with h5py.File(tmp_path/'a.hdf5', 'r+') as f: # the second line left out, the rest from last to first
        g = f['subj-A/tracts']
        keep = [4, 3, 2, 0]
        for k in ('offsets', 'lengths', 'euclidean_lengths'):
            a = g[k][()][keep]; del g[k]; g[k] = a
        for k in g['data_per_streamline']:
            a = g['data_per_streamline'][k][()][keep]; del g['data_per_streamline'][k]; g['data_per_streamline'][k] = a
    import_store(tmp_path/'a.hdf5', tmp_path/'store')
    got = H5Store(tmp_path/'store')['subj-A'].streamlines('tracts').load()
    for a, k in zip(got, keep): assert np.abs(a-truth[k]).max() < TOL_MM


def test_foreign_file_to_store_to_file(foreign):
    home, _, _ = foreign
    pack_store(home/'store', home/'b.hdf5')
    with h5py.File(home/'a.hdf5') as a, h5py.File(home/'b.hdf5') as b:
        for k, v in a.attrs.items():
            if k not in ('data_and_time', 'chosen_subjs'): assert np.array_equal(b.attrs[k], v), k
        assert sorted(b.attrs['chosen_subjs']) == sorted(a.attrs['chosen_subjs'])
        for s in dwi.SHAPES:
            assert set(a[s]) == set(b[s]) # nothing that dwi_ml would stumble over
            for n in a[s]:
                assert b[s][n].attrs['type'] == a[s][n].attrs['type']
                assert np.allclose(b[s][n].attrs['affine'], a[s][n].attrs['affine'], rtol=0, atol=1e-12)
                if n in ('tracts', 'ends'):
                    assert (b[s][n].attrs['space'], b[s][n].attrs['origin']) == ('Space.VOX', 'Origin.TRACKVIS')
                    if dwi.SPELLED[s][n == 'ends'][0].lower() in ('space.vox', 'vox') and 'center' not in dwi.SPELLED[s][n == 'ends']:
                        assert np.abs(b[s][n]['data'][()]-a[s][n]['data'][()]).max() < 1e-4 # voxels, by rounding
                    for k in ('voxel_order', 'dimensions', 'voxel_sizes'):
                        assert np.array_equal(b[s][n].attrs[k], a[s][n].attrs[k])
                else: assert b[s][n]['data'][()].tobytes() == a[s][n]['data'][()].tobytes()
            assert np.array_equal(b[s]['tracts/connectivity_matrix'], a[s]['tracts/connectivity_matrix'])
        assert np.array_equal(b['subj-C/tracts/connectivity_label_volume'], a['subj-C/tracts/connectivity_label_volume'])


# ---- a store of ours

def grid(rng, shape=(4, 5, 6)):
    A = np.array(Geometry.from_spacing(shape, rng.uniform(.5, 4, 3), rng.uniform(-150, 150, 3)).affine)
    A[:3] = np.linalg.qr(rng.normal(size=(3, 3)))[0] @ A[:3]
    return Geometry(shape, A)


def odd_numbers(rng, shape, dtype):
    "Any bits that the type can hold, NaN payloads and -0 among them; float64 within the range of float32"
    if dtype == 'b1': return rng.random(shape) > .5
    if dtype == 'f8':
        a = rng.normal(size=shape)*10.**rng.integers(-40, 30, shape)
        a.flat[:3] = np.nan, -0., np.inf
        return a
    raw = rng.integers(0, 256, int(np.prod(shape))*np.dtype(dtype).itemsize, dtype=np.uint8)
    return raw.view(dtype).reshape(shape)


def some_store(folder, seed, subjects=2):
    rng = np.random.default_rng(seed)
    with StoreWriter(folder) as w:
        for k in range(subjects):
            g = grid(rng)
            volumes = {t: Volume(odd_numbers(rng, g.shape, t), g) for t in ('f2', 'f4', 'f8', 'i4', 'u2', 'i8')}
            volumes['ct'] = (CTVolume(odd_numbers(rng, g.shape, 'i2'), g), dict(source='synthetic', window=np.float32([40, 400])))
            volumes['mask'] = MaskVolume(rng.integers(0, 2**31, g.shape).astype('u4'), g)
            one = FeatureVolume(rng.normal(size=(*g.shape, 1)).astype('f4'), g)
            volumes['one'] = (one, dict(mean=np.float32([.1]), std=rng.random(1), flag=True, words=['a', 'b c']))
            big = grid(rng, (30, 31, 32))
            volumes['big'] = (Volume(rng.normal(size=big.shape).astype('f4'), big), dict(storage='gzip'))
            lengths = rng.integers(0, 9, rng.integers(0, 30))
            points = (rng.normal(size=(lengths.sum(), 3))*10.**rng.integers(-40, 3, (lengths.sum(), 3))).astype('f4')
            n = len(lengths)
            per_line = {t: odd_numbers(rng, (n, 2), t) for t in ('b1', 'i8', 'u1', 'f4', 'f2')} | {'FA (mean)': rng.random((n, 1))}
            per_point = {t: odd_numbers(rng, (len(points), 1), t) for t in ('i2', 'f4')} | dict(d=rng.random((len(points), 3)))
            s = Streamlines(points, np.r_[0, np.cumsum(lengths)], per_line, per_point, g)
            extra = dict(connectivity_matrix=rng.random((8, 8)) > .5, connectivity_labels=rng.integers(0, 9, g.shape),
                         other=rng.random((3, 2, 2)), single=np.float32(3))
            lines = dict(tracto=(s, dict(step_mm=.5, extra=extra, connectivity_matrix_type='from_labels', note='x'*2000)),
                         none=Streamlines(np.zeros((0, 3)), [0], geometry=g))
            tables = dict(scores=dict(reader=['a', 'é', ''], agatston=[1., np.nan, -0.], n=np.int8([1, 2, 3]), b=[True, False, True]),
                          empty=dict(x=np.zeros(0), t=[]))
            w.add(f'sub-{k}', volumes, lines, tables, dict(age=np.float32(50), site='x'))
        w.set_lists(training=['sub-0'])


@pytest.mark.parametrize('seed', range(3))
def test_a_round_trip_keeps_every_bit(tmp_path, seed):
    some_store(tmp_path/'one', seed)
    pack_store(tmp_path/'one', tmp_path/'a.hdf5')
    import_store(tmp_path/'a.hdf5', tmp_path/'two')
    assert contents(tmp_path/'two') == contents(tmp_path/'one')
    assert H5Store(tmp_path/'two').lists == H5Store(tmp_path/'one').lists
    pack_store(tmp_path/'two', tmp_path/'b.hdf5')
    assert theirs(tmp_path/'b.hdf5') == theirs(tmp_path/'a.hdf5')


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**9))
def test_any_float_is_had_again_from_its_neighbour(seed):
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 2**32, 600, dtype=np.uint32).view('f4')
    a = a[np.isfinite(a)]
    b = np.where(rng.random(len(a)) < .5, a*(1+rng.normal(size=len(a))*1e-7), rng.permutation(a)).astype('f4')
    b[~np.isfinite(b)] = 0
    steps, rest = rounding_of(a, b)
    assert unrounded(b, steps, rest).tobytes() == a.tobytes()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**9))
def test_points_alone_come_back_to_a_ten_thousandth_of_a_mm(seed):
    "What another program gets that reads the layout only; heads lie within 200 mm of the scanner's middle"
    rng = np.random.default_rng(seed)
    g = grid(rng, tuple(rng.integers(2, 300, 3)))
    p = rng.uniform(-200, 200, (300, 3)).astype('f4')
    assert np.abs(corner_to_mm(mm_to_corner(p, g), g).astype(float)-p).max() < 1e-4


def test_an_independent_reader_sees_the_same_patient(tmp_path):
    some_store(tmp_path/'one', 3)
    pack_store(tmp_path/'one', tmp_path/'a.hdf5')
    sub = H5Store(tmp_path/'one')['sub-0']
    with h5py.File(tmp_path/'a.hdf5') as f:
        g = f['sub-0']
        kinds = {n: g[n].attrs['type'] for n in g} # every member has one of two types
        assert kinds == {**dict.fromkeys(sub.volumes, 'volume'), **dict.fromkeys(sub.streamline_groups, 'streamlines')}
        t, s = g['tracto'], sub.streamlines('tracto').load()
        A, size = t.attrs['affine'], t.attrs['voxel_sizes']
        assert t.attrs['voxel_order'] == ''.join(nib.aff2axcodes(A)) and t.attrs['dimensions'].dtype == np.int16
        for i in range(len(s)):
            o, n = t['offsets'][i], t['lengths'][i]
            mm = [dwi.mm_of(p, t.attrs['space'], t.attrs['origin'], A, size) for p in t['data'][o:o+n]]
            assert np.allclose(np.reshape(mm, (-1, 3)), s[i], atol=1e-3, rtol=1e-6) # points of this store lie up to 1 m away
            assert np.isclose(t['euclidean_lengths'][i], s.lengths_mm[i], rtol=1e-5)
        assert np.array_equal(t['data_per_streamline/u1'][()], s.per_line['u1'].astype('f4'))
        assert t['data_per_streamline/FA (mean)'].dtype == np.float32
        v = sub.volume('ct')
        assert g['ct/data'].shape == (6, 5, 4, 1) and g['ct/data'].chunks is None and g['ct/data'].dtype == np.float32
        assert all(g['ct/data'][x, y, z, 0] == v.data[z, y, x] for x, y, z in np.ndindex(6, 5, 4))
        assert f.attrs['testing_subjs'].dtype == np.float64 and f.attrs['testing_subjs'].size == 0
        assert f.attrs['step_size'] == 'Not defined by user' # 'none' has no step


def test_half_precision_points_keep_their_positions(tmp_path):
    rng = np.random.default_rng(0)
    s = Streamlines(rng.normal(size=(50, 3))*40, [0, 20, 50], geometry=grid(rng))
    with StoreWriter(tmp_path/'one') as w: w.add('a', streamlines=dict(t=(s, dict(dtype='float16'))))
    assert [r.code for r in pack_store(tmp_path/'one', tmp_path/'a.hdf5')] == ['HALF', 'UNLISTED']
    import_store(tmp_path/'a.hdf5', tmp_path/'two')
    one, two = (H5Store(tmp_path/k)['a'].streamlines('t') for k in ('one', 'two'))
    assert one.load().points.tobytes() == two.load().points.tobytes()


def test_zstd_storage_comes_back_as_such(tmp_path):
    pytest.importorskip('hdf5plugin')
    rng = np.random.default_rng(0)
    g = grid(rng, (30, 31, 32))
    v = Volume(rng.integers(0, 99, g.shape).astype('i2'), g)
    with StoreWriter(tmp_path/'one') as w: w.add('a', dict(v=(v, dict(storage='bitshuffle-zstd'))))
    pack_store(tmp_path/'one', tmp_path/'a.hdf5'); import_store(tmp_path/'a.hdf5', tmp_path/'two')
    assert contents(tmp_path/'one') == contents(tmp_path/'two')


def test_more_subjects_than_an_attribute_of_old_files_holds(tmp_path):
    names = [f'subject-{k:05d}' for k in range(6000)]
    with h5py.File(tmp_path/'a.hdf5', 'w', libver='v108') as f:
        f.attrs['training_subjs'] = names
        for n in names[:3]: f.create_group(n)
    from jfr2020.store.shard import open_hdf5
    with open_hdf5(tmp_path/'b.hdf5', 'w') as f: f.attrs['training_subjs'] = names
    with h5py.File(tmp_path/'b.hdf5') as f: assert f.attrs['training_subjs'].tolist() == names
    with pytest.raises(StoreError, match='subject-00003.*is missing'): import_store(tmp_path/'a.hdf5', tmp_path/'store')


# ---- refusals while packing

def test_damage_is_not_packed(tmp_path):
    some_store(tmp_path/'one', 5)
    store = H5Store(tmp_path/'one')
    at = store['sub-0'].find('volumes', 'ct').id.get_offset()
    store.close()
    (path,) = [p for p in (tmp_path/'one'/'subjects').glob('*.h5') if p.name == store.entry('sub-0')['file']]
    with open(path, 'r+b') as f: f.seek(at); f.write(b'\x55')
    with pytest.raises(StoreError, match='CHANGED.*volumes/ct'): pack_store(tmp_path/'one', tmp_path/'a.hdf5')
    assert not [p for p in tmp_path.iterdir() if p.is_file()]


def test_a_cut_file_is_not_called_a_full_disk(tmp_path):
    some_store(tmp_path/'one', 5)
    path = sorted((tmp_path/'one'/'subjects').glob('*.h5'))[0]
    with open(path, 'r+b') as f: f.truncate(path.stat().st_size//2)
    with pytest.raises(StoreError, match='CHANGED.*not a whole HDF5 file'): pack_store(tmp_path/'one', tmp_path/'a.hdf5')
    assert not (tmp_path/'a.hdf5').exists()


@pytest.mark.parametrize('value,said', [
    (lambda g: dict(streamlines=dict(t=Streamlines([[0, 0, 0]], [0, 1]))), 'REFERENCE'),
    (lambda g: dict(volumes=dict(v=Volume(np.full(g.shape, -1e300), g))), r'1e\+300 is beyond'),
    (lambda g: dict(streamlines=dict(t=Streamlines([[0, 0, 0]], [0, 1], geometry=replace(g, shape=(2, 2, 40000))))), '32767')])
def test_what_the_layout_cannot_say(tmp_path, value, said):
    with StoreWriter(tmp_path/'one') as w: w.add('a', **value(grid(np.random.default_rng(0))))
    with pytest.raises(StoreError, match=said): pack_store(tmp_path/'one', tmp_path/'a.hdf5')
    assert not [p for p in tmp_path.iterdir() if p.is_file()]


def test_the_old_file_stays_when_packing_fails(tmp_path, monkeypatch):
    some_store(tmp_path/'one', 5)
    (tmp_path/'a.hdf5').write_text('old')
    def fail(*args): raise KeyError('power cut')
    monkeypatch.setattr(pack, 'put_lines', fail)
    with pytest.raises(KeyError): pack_store(tmp_path/'one', tmp_path/'a.hdf5')
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir() if p.is_file()] == [('a.hdf5', 'old')]


FULL = '''
import resource, signal, sys
from jfr2020.store.pack import pack_store
from jfr2020.ground.errors import StoreError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for size in (0, 100, 3000, 40000, 150000, 190000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try: pack_store(sys.argv[1], sys.argv[2]); print('written')
    except StoreError as e: print(e.code)
'''


@pytest.mark.skipif(not hasattr(signal, 'SIGXFSZ'), reason='no limit of file sizes on this system')
def test_a_full_disk_is_said_and_leaves_nothing(tmp_path):
    some_store(tmp_path/'one', 5)
    pack_store(tmp_path/'one', tmp_path/'a.hdf5')
    assert (tmp_path/'a.hdf5').stat().st_size > 190_000
    (tmp_path/'a.hdf5').unlink()
    out = subprocess.run([sys.executable, '-c', FULL, tmp_path/'one', tmp_path/'a.hdf5'], capture_output=True, text=True,
                         env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert out.stdout.split() == ['DISK']*6, out.stderr
    assert not [p for p in tmp_path.iterdir() if p.is_file()]


def test_a_volume_passes_in_pieces(tmp_path, monkeypatch):
    g = grid(np.random.default_rng(0), (60, 64, 64))
    with StoreWriter(tmp_path/'one') as w: w.add('a', dict(v=FeatureVolume(np.ones((*g.shape, 16), 'f4'), g)))
    monkeypatch.setattr(layout, '_BLOCK', 1<<20)
    monkeypatch.setattr(pack, 'examine_shard', lambda path: (None, None, {}))
    tracemalloc.start()
    pack_store(tmp_path/'one', tmp_path/'a.hdf5')
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6<<20 # the volume has 15 MiB


# ---- files that lie

def changed(tmp_path, do):
    dwi.write(tmp_path/'a.hdf5')
    with h5py.File(tmp_path/'a.hdf5', 'r+') as f: do(f)
    return lambda: import_store(tmp_path/'a.hdf5', tmp_path/'store')


def again(group, name, **new):
    del group[name]
    group.create_dataset(name, **new)


def again_as(f, name, other):
    del f[name]
    f[name] = f[other]


LIES = {
    'external link': (
        lambda f: (f.__delitem__('subj-A'), f.__setitem__('subj-A', h5py.ExternalLink('/etc/passwd', '/'))), 'LINK'),
    'soft link': (lambda f: f['subj-A'].__setitem__('more', h5py.SoftLink('/subj-B/input')), 'LINK'),
    'dangling soft link': (lambda f: f['subj-A'].__setitem__('more', h5py.SoftLink('/none')), 'LINK'),
    'external numbers': (
        lambda f: again(f['subj-A/tracts'], 'lengths', shape=(5,), dtype='i8', external=[('/etc/passwd', 0, 40)]), 'LINK'),
    'virtual numbers': (
        lambda f: (f.__delitem__('subj-A/input/data'), f['subj-A/input'].create_virtual_dataset('data', layout_of('x.h5'))), 'LINK'),
    'terabyte, unwritten': (
        lambda f: again(f['subj-A/input'], 'data', shape=(4096, 4096, 4096, 16), dtype='f4', chunks=(64, 64, 64, 1)), 'LIMIT'),
    'gigabytes, contiguous': (lambda f: again(f['subj-A/tracts'], 'data', shape=(1<<28, 3), dtype='f4'), 'TRUNCATED'),
    'gigabytes, gzip': (
        lambda f: again(f['subj-A/tracts'], 'data', shape=(1<<28, 3), dtype='f4', compression='gzip', chunks=(1<<16, 3)), 'TRUNCATED'),
    'huge chunk': (
        lambda f: again(f['subj-A/tracts'], 'data', shape=(1<<28, 3), dtype='f4', compression='gzip', chunks=(1<<27, 3)), 'LIMIT'),
    'objects': (
        lambda f: again(f['subj-A/tracts/data_per_streamline'], 'weight', data=['a']*5, dtype=h5py.string_dtype()), 'OBJECT'),
    'references': (lambda f: again(f['subj-A/tracts/data_per_streamline'], 'weight', shape=(5,), dtype=h5py.ref_dtype), 'OBJECT'),
    'variable lengths': (lambda f: again(f['subj-A/tracts'], 'lengths', shape=(5,), dtype=h5py.vlen_dtype('i8')), 'OBJECT'),
    'compound': (lambda f: again(f['subj-A/tracts'], 'offsets', shape=(5,), dtype=[('a', 'i4'), ('b', 'i4')]), 'OBJECT'),
    'group for numbers': (
        lambda f: (f.__delitem__('subj-A/input/data'), f.create_group('subj-A/input/data/deeper/deeper')), 'data set needed'),
    'numbers for group': (lambda f: again(f['subj-A/tracts'], 'data_per_streamline', data=np.zeros(5)), 'group needed'),
    'one array under two names': (lambda f: again_as(f, 'subj-A/input/data', 'subj-B/input/data'), 'LINK'),
    'one subject under two names': (lambda f: again_as(f, 'subj-A', 'subj-C'), 'LINK'),
    'negative length': (lambda f: f['subj-A/tracts/lengths'].__setitem__(1, -4), 'SHAPE'),
    'line beyond the points': (lambda f: f['subj-A/tracts/offsets'].__setitem__(4, 1<<62), 'SHAPE'),
    'lines that share points': (lambda f: f['subj-A/tracts/lengths'].__setitem__(slice(None), [20, 9, 2, 5, 1]), 'SHAPE'),
    'NaN point': (lambda f: f['subj-A/tracts/data'].__setitem__((0, 0), np.nan), 'POINTS'),
    'no affine': (lambda f: f['subj-A/tracts'].attrs.__delitem__('affine'), 'affine must be 16 numbers'),
    'flat affine': (lambda f: f['subj-A/input'].attrs.__setitem__('affine', np.diag([1., 1, 0, 1])), 'GEOMETRY'),
    'affine of words': (lambda f: f['subj-A/input'].attrs.__setitem__('affine', ['1']*16), 'affine must be'),
    'no space': (lambda f: f['subj-A/tracts'].attrs.__delitem__('space'), 'SPACE'),
    'unknown origin': (lambda f: f['subj-A/tracts'].attrs.__setitem__('origin', 'Origin.MIDDLE'), 'SPACE'),
    'negative grid': (lambda f: f['subj-A/tracts'].attrs.__setitem__('dimensions', [-1, 5, 5]), 'GEOMETRY'),
    'data of another count': (
        lambda f: again(f['subj-A/tracts/data_per_streamline'], 'weight', data=np.zeros((4, 1))), 'needs 5 rows'),
    'config that runs': (lambda f: f.attrs.__setitem__('groups_config', "__import__('os').system('true')"), 'FOREIGN'),
    'deep config': (lambda f: f.attrs.__setitem__('groups_config', '['*50_000), 'FOREIGN'),
    'subject twice': (lambda f: f.attrs.__setitem__('testing_subjs', ['subj-A']), 'LISTS'),
    'subject of no group': (lambda f: f.attrs.__setitem__('testing_subjs', ['subj-X']), "subj-X.*is missing"),
    'path for a subject': (lambda f: f.attrs.__setitem__('testing_subjs', ['subj-A/input']), 'is missing'),
    'no subjects': (lambda f: [f.attrs.__delitem__(k) for k in list(f.attrs) if k.endswith('subjs')], 'no subject'),
}


def layout_of(path):
    out = h5py.VirtualLayout((7, 6, 5, 3), 'f4')
    out[:] = h5py.VirtualSource(path, 'data', (7, 6, 5, 3))
    return out


@pytest.mark.parametrize('lie', LIES)
def test_a_file_that_lies_is_refused(tmp_path, monkeypatch, lie):
    do, said = LIES[lie]
    call = changed(tmp_path, do)
    monkeypatch.setattr(untrusted, 'check_survives', lambda path: None) # without its help
    tracemalloc.start()
    with pytest.raises(StoreError, match=said): call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50<<20
    done = H5Store(tmp_path/'store').subjects if (tmp_path/'store').exists() else ()
    assert 'subj-A' not in done or 'two names' in lie # a subject is whole or absent


def test_wrong_space_is_noticed(tmp_path):
    remarks = changed(tmp_path, lambda f: f['subj-A/tracts'].attrs.__setitem__('space', 'voxmm'))()
    assert [r.text for r in remarks if r.code == 'LENGTHS'][0].startswith("'subj-A/tracts'")


def test_unknown_groups_are_said(tmp_path):
    def do(f):
        f['subj-A'].create_group('notes').attrs['type'] = 'text'
        f['subj-A']['loose'] = np.zeros(3)
        f['elsewhere'] = h5py.SoftLink('/none') # outside of the subjects: nobody looks
    remarks = changed(tmp_path, do)()
    assert sorted(r.text for r in remarks if r.code == 'IGNORED') == [
        "'subj-A/loose' is neither a volume nor streamlines", "'subj-A/notes' is neither a volume nor streamlines"]


def test_lists_join_those_of_the_store(tmp_path):
    dwi.write(tmp_path/'a.hdf5')
    g = grid(np.random.default_rng(0))
    with StoreWriter(tmp_path/'store') as w:
        w.add('old', dict(v=Volume(np.zeros(g.shape, 'f4'), g))); w.set_lists(testing=['old'])
    import_store(tmp_path/'a.hdf5', tmp_path/'store')
    assert H5Store(tmp_path/'store').lists == dict(training=('subj-B', 'subj-A'), validation=('subj-C',), testing=('old',))
    with pytest.raises(StoreError, match='EXISTS'): import_store(tmp_path/'a.hdf5', tmp_path/'store')
    import_store(tmp_path/'a.hdf5', tmp_path/'store', overwrite=True, lists=False)


def outcome(path, store):
    "Contents of what was imported, or None where it was refused"
    try: import_store(path, store)
    except JfrError: return None
    return contents(store)


def test_flipped_bits_of_a_packed_store_are_found(tmp_path, monkeypatch):
    some_store(tmp_path/'one', 11, 1)
    pack_store(tmp_path/'one', tmp_path/'a.hdf5')
    whole, raw, rng = contents(tmp_path/'one'), (tmp_path/'a.hdf5').read_bytes(), np.random.default_rng(0)
    monkeypatch.setattr(untrusted, 'check_survives', lambda path: None) # checksums stop these earlier
    refused = 0
    for k in range(16):
        bad = bytearray(raw)
        bad[rng.integers(len(raw))] ^= 1 << int(rng.integers(8))
        (tmp_path/'b.hdf5').write_bytes(bad)
        got = outcome(tmp_path/'b.hdf5', tmp_path/f'{k}')
        assert got in (None, whole) # never another value; padding may change
        refused += got is None
    assert refused > 6


def test_any_damage_of_a_foreign_file_is_a_clear_error_or_nothing(tmp_path):
    dwi.write(tmp_path/'a.hdf5')
    raw, rng, refused = (tmp_path/'a.hdf5').read_bytes(), np.random.default_rng(1), 0
    for k in range(8): # each is first looked through by another process
        bad = bytearray(raw[:rng.integers(100, len(raw))] if k % 4 == 0 else raw)
        for _ in range(rng.integers(1, 30)): bad[rng.integers(len(bad))] = rng.integers(256)
        (tmp_path/'b.hdf5').write_bytes(bad)
        refused += outcome(tmp_path/'b.hdf5', tmp_path/f'{k}') is None
    assert 2 < refused


CRASHES = 'import os; os.abort()', 'import time; time.sleep(60)'


@pytest.mark.parametrize('code', CRASHES)
def test_a_file_that_ends_its_reader_is_refused(tmp_path, monkeypatch, code):
    dwi.write(tmp_path/'a.hdf5')
    monkeypatch.setattr(untrusted, '_PROBE', code)
    monkeypatch.setattr(untrusted, 'PROBE_SECONDS', 2)
    with pytest.raises(StoreError, match='ends or holds up'): import_store(tmp_path/'a.hdf5', tmp_path/'store')
    assert not (tmp_path/'store').exists()


# ---- one group as a file

def test_extract(tmp_path):
    some_store(tmp_path/'one', 3)
    store = H5Store(tmp_path/'one')
    s = store['sub-0'].streamlines('tracto').load()
    back = read_nifti(extract(store, 'sub-0', 'ct', tmp_path/'ct.nii.gz'))
    assert np.array_equal(back.data, store['sub-0'].volume('ct').data)
    img = nib.load(extract(store, 'sub-0', 'big', tmp_path/'big.nii'))
    assert img.shape == (32, 31, 30) and np.array_equal(img.get_fdata().T, store['sub-0'].volume('big').data)
    got = read_tractogram(extract(tmp_path/'one', 'sub-0', 'tracto', tmp_path/'s.trx'))
    assert np.array_equal(got.points, s.points) and np.array_equal(got.per_line['i8'], s.per_line['i8'])
    assert np.array_equal(got.per_point['d'], s.per_point['d'])
    with pytest.raises(StoreError, match='no room for data'): extract(store, 'sub-0', 'tracto', tmp_path/'s.tck')
    assert (extract(store, 'sub-0', 'scores', tmp_path/'t.csv')).read_text().splitlines()[0] == 'reader,agatston,n,b'
    with pytest.raises(StoreError, match='NAME'): extract(store, 'sub-0', 'scores', tmp_path/'t.xlsx')
    with pytest.raises(JfrError): extract(store, 'sub-0', 'ct', tmp_path/'ct.trk')
    with pytest.raises(StoreError, match='NO_GROUP'): extract(store, 'sub-0', 'none here', tmp_path/'x.nii')


def test_channels_are_extracted_as_four_axes(tmp_path):
    rng = np.random.default_rng(0)
    g = grid(rng)
    with StoreWriter(tmp_path/'one') as w: w.add('a', dict(sh=FeatureVolume(rng.normal(size=(*g.shape, 3)).astype('f4'), g)))
    img = nib.load(extract(tmp_path/'one', 'a', 'sh', tmp_path/'sh.nii.gz'))
    sh = H5Store(tmp_path/'one')['a'].volume('sh')
    assert img.shape == (6, 5, 4, 3) and np.array_equal(np.asarray(img.dataobj).transpose(2, 1, 0, 3), sh.data)
    assert np.allclose(img.affine, g.affine[:, [2, 1, 0, 3]], atol=1e-4)


# ---- real lines

def test_real_lines_and_their_image(shared_data, tmp_path):
    home = shared_data/'tracto/dipy'
    s = read_tractogram(home/'tracks300.trk')
    v = read_nifti(home/'aniso_vox.nii.gz')
    with StoreWriter(tmp_path/'one') as w: w.add('a', dict(t1=v), dict(tracks=s))
    pack_store(tmp_path/'one', tmp_path/'a.hdf5')
    import_store(tmp_path/'a.hdf5', tmp_path/'two')
    assert contents(tmp_path/'one') == contents(tmp_path/'two')
    trk = nib.streamlines.load(home/'tracks300.trk')
    inverse = np.linalg.inv(trk.affine)
    with h5py.File(tmp_path/'a.hdf5') as f:
        for i in (0, 17, len(s)-1):
            o, n = f['a/tracks/offsets'][i], f['a/tracks/lengths'][i]
            want = nib.affines.apply_affine(inverse, trk.streamlines[i])+.5
            assert np.abs(f['a/tracks/data'][o:o+n]-want).max() < 1e-4
        img = nib.load(home/'aniso_vox.nii.gz')
        assert np.array_equal(f['a/t1/data'][..., 0], np.asarray(img.dataobj).astype('f4'))
