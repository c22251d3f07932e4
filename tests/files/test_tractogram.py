"Files of streamlines: against nibabel and trx-python, against the bytes, and against files that lie."
import json
import os
import struct
import tempfile
import warnings
import zipfile

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jfr2020.ground.errors import StoreError
from jfr2020.ground.geometry import Geometry
from jfr2020.files.tractogram import TractogramError, read_tractogram, write_tractogram
from jfr2020.ground.streamlines import Streamlines, replace

GRID = Geometry.from_spacing((30, 40, 50), (2, 1.5, 1), (5, -10, 20))


def oblique(seed=0):
    "A grid turned and with any order and direction of axes"
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    A = np.eye(4)
    A[:3, :3] = q*[2, 1.5, 1]
    A[:3, 3] = rng.uniform(-90, 90, 3)
    return Geometry((30, 40, 50), A)


def make(S=20, data=True, geometry=GRID, seed=0):
    rng = np.random.default_rng(seed)
    n = rng.integers(1, 30, S)
    points = geometry.to_world(rng.uniform(-.5, 29.5, (n.sum(), 3))) if geometry else rng.uniform(-90, 90, (n.sum(), 3))
    both = dict(per_line=dict(bundle=np.arange(S), w=rng.random((S, 3), 'f4')),
                per_point=dict(fa=rng.random(n.sum(), 'f4'), peak=rng.random((n.sum(), 3), 'f4'))) if data else {}
    return Streamlines(points, np.r_[0, np.cumsum(n)], geometry=geometry, **both)


def nibabel_says(path, lazy=False):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        f = nib.streamlines.load(path, lazy_load=lazy)
        lines = [np.array(x) for x in f.streamlines]
    return f, lines


def same_lines(s, lines, tol):
    assert [len(x) for x in lines] == s.lengths.tolist()
    if len(s.points):
        assert np.abs(np.concatenate(lines)-s.points).max() <= tol


REAL = ['nibabel/simple.trk', 'nibabel/complex.trk', 'nibabel/standard.trk', 'nibabel/standard.LPS.trk', 'nibabel/empty.trk',
        'nibabel/simple.tck', 'nibabel/standard.tck', 'nibabel/empty.tck', 'nibabel/multiline_header_field.tck',
        'dipy/tracks300.trk', 'dipy/EuDX_small_25.trk', 'mrtrix_sift_phantom/tracks.tck']


@pytest.mark.parametrize('name', REAL)
@pytest.mark.parametrize('lazy', [False, True])
def test_real_files_read_as_nibabel_reads_them(shared_data, name, lazy):
    path = shared_data/'tracto'/name
    s = read_tractogram(path)
    f, lines = nibabel_says(path, lazy)
    same_lines(s, lines, 1e-5)
    if not lazy:
        assert set(s.per_line) == set(f.tractogram.data_per_streamline)
        for k, v in f.tractogram.data_per_streamline.items():
            assert np.array_equal(s.per_line[k], v)
        for k, v in f.tractogram.data_per_point.items():
            assert np.array_equal(s.per_point[k], np.concatenate(list(v)))


@pytest.mark.parametrize('name', REAL)
def test_real_files_go_round_through_every_format(shared_data, tmp_path, name):
    s = read_tractogram(shared_data/'tracto'/name)
    s = replace(s, geometry=s.geometry or GRID)
    for kind in ('trk', 'trx', 'tck'):
        bare = replace(s, per_line={}, per_point={}) if kind == 'tck' else s
        t = read_tractogram(write_tractogram(bare, tmp_path/f't.{kind}'), s.geometry)
        assert np.array_equal(t.offsets, s.offsets)
        assert np.abs(t.points-s.points).max(initial=0) <= (2e-5 if kind == 'trk' else 0)
        for k, v in bare.per_line.items():
            assert np.array_equal(t.per_line[k], v)
        for k, v in bare.per_point.items():
            assert np.array_equal(t.per_point[k], v)
        assert len(s) == 0 or t.geometry.matches(s.geometry)


def test_standard_files_are_the_same_lines_in_three_conventions(shared_data):
    folder = shared_data/'tracto'/'nibabel'
    a, b, c = (read_tractogram(folder/f'standard{x}') for x in ('.trk', '.LPS.trk', '.tck'))
    assert np.abs(a.points-b.points).max() < 1e-5 and np.abs(a.points-c.points).max() < 1e-5
    assert a.geometry.shape == (7, 5, 4) and np.allclose(a.geometry.spacing, (2, 3, 1))


def test_no_magic_number_is_refused(shared_data):
    with pytest.raises(TractogramError, match='no_magic_number.tck: .*mrtrix tracks') as e:
        read_tractogram(shared_data/'tracto'/'nibabel'/'no_magic_number.tck')
    assert e.value.code == 'NOT_TCK' and isinstance(e.value, StoreError)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_written_files_are_read_by_nibabel_at_the_same_place(seed):
    s = make(geometry=oblique(seed), seed=seed)
    with tempfile.TemporaryDirectory() as home:
        f, lines = nibabel_says(write_tractogram(s, os.path.join(home, 's.trk')))
        same_lines(s, lines, 1e-4)
        assert np.allclose(f.affine[:, [2, 1, 0, 3]], s.geometry.affine, atol=1e-4)
        assert tuple(f.header['dimensions'][::-1]) == s.geometry.shape
        for k, v in s.per_line.items():
            assert np.array_equal(f.tractogram.data_per_streamline[k], v.astype('f4'))
        for k, v in s.per_point.items():
            assert np.array_equal(np.concatenate(list(f.tractogram.data_per_point[k])), v)
        back = read_tractogram(os.path.join(home, 's.trk'))
        assert np.abs(back.points-s.points).max() < 5e-5 and back.geometry.matches(s.geometry)
        _, lines = nibabel_says(write_tractogram(replace(s, per_line={}, per_point={}), os.path.join(home, 's.tck')))
        same_lines(s, lines, 0)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(['RAS', 'LPS', 'RPI', 'LAI']))
def test_nibabels_files_are_read_at_the_same_place(seed, order):
    s = make(seed=seed)
    A = np.diag([1, 1.5, 2, 1.])
    A[:3, 3] = [-7, 11, 30]
    header = dict(dimensions=(50, 40, 30), voxel_sizes=(1, 1.5, 2), voxel_to_rasmm=A, voxel_order=order)
    t = nib.streamlines.Tractogram(list(s), dict(w=s.per_line['w']), affine_to_rasmm=np.eye(4))
    with tempfile.TemporaryDirectory() as home:
        path = os.path.join(home, 'n.trk')
        nib.streamlines.save(t, path, header=header)
        back = read_tractogram(path)
    assert np.abs(back.points-s.points).max() < 1e-4 and np.array_equal(back.per_line['w'], s.per_line['w'])
    assert np.allclose(back.geometry.affine, A[:, [2, 1, 0, 3]])


def test_trk_against_its_bytes():
    "A header and one line packed by hand: voxel (1,2,3) of 2 x 3 x 4 mm, axes LPS, at its centre"
    head = bytearray(1000)
    head[:6] = b'TRACK\0'
    struct.pack_into('<3h', head, 6, 10, 20, 30)
    struct.pack_into('<3f', head, 12, 2, 3, 4)
    struct.pack_into('<h', head, 36, 1)
    head[38:44] = b'fa\0\0\0\0'
    struct.pack_into('<h', head, 238, 2)
    head[240:244] = b'uv\x002'
    A = np.diag([2, 3, 4, 1.])
    A[:3, 3] = [-100, -50, 7]
    struct.pack_into('<16f', head, 440, *A.ravel())
    head[948:951] = b'LPS'
    struct.pack_into('<iii', head, 988, 1, 2, 1000)
    body = struct.pack('<i', 1)+struct.pack('<4f', 1.5*2, 2.5*3, 3.5*4, .25)+struct.pack('<2f', 8, 9)
    for order in '<>':
        raw = bytes(head)+body if order == '<' else swapped(head)+struct.pack('>i', 1)+np.frombuffer(body[4:], '<f4').astype('>f4').tobytes()
        with tempfile.TemporaryDirectory() as home:
            path = os.path.join(home, 'h.trk')
            with open(path, 'wb') as f:
                f.write(raw)
            s = read_tractogram(path)
            same_lines(s, nibabel_says(path)[1], 1e-5)
        # the header's voxel counts from the left and the back: RAS voxel (10-1-1, 20-1-2, 3)
        assert np.allclose(s.points, [[8*2-100, 17*3-50, 3*4+7]])
        assert s.per_point['fa'].tolist() == [[.25]] and s.per_line['uv'].tolist() == [[8, 9]]


def swapped(head):
    from nibabel.streamlines.trk import header_2_dtype
    return np.frombuffer(bytes(head), header_2_dtype.newbyteorder('<')).astype(header_2_dtype.newbyteorder('>')).tobytes()


def test_big_endian_and_double_tck(tmp_path):
    s = make(data=False)
    rows = np.concatenate([np.r_[x, [[np.nan]*3]] for x in s]+[[[np.inf]*3]])
    for name, kind in (('Float32BE', '>f4'), ('Float64LE', '<f8'), ('Float64BE', '>f8')):
        head = f'mrtrix tracks\nroi: a: b\nroi: c\ndatatype: {name}\nfile: . 200\ncount: {len(s)}\nEND\n'.encode()
        (tmp_path/'t.tck').write_bytes(head.ljust(200, b'\0')+rows.astype(kind).tobytes())
        assert np.array_equal(read_tractogram(tmp_path/'t.tck').points, s.points)


def test_lines_without_points_and_of_one_point(tmp_path):
    s = Streamlines(np.arange(9).reshape(3, 3), [0, 0, 1, 1, 3, 3], dict(a=np.arange(5)), geometry=GRID)
    for kind in ('trk', 'trx', 'tck'):
        t = read_tractogram(write_tractogram(replace(s, per_line={}) if kind == 'tck' else s, tmp_path/f's.{kind}'))
        assert np.array_equal(t.offsets, s.offsets) and np.allclose(t.points, s.points, atol=1e-5)
        assert kind == 'tck' or t.per_line['a'].ravel().tolist() == [0, 1, 2, 3, 4]
        none = replace(s[[0, 2, 4]], per_line={})
        assert read_tractogram(write_tractogram(none, tmp_path/f'n.{kind}')).offsets.tolist() == [0]*4


def test_trx_python_reads_ours_and_we_read_its(tmp_path):
    tmm = pytest.importorskip('trx.trx_file_memmap')
    s = replace(make(), per_line={**make().per_line, 'groups/left': np.arange(20) % 3 == 0, 'ok': np.arange(20) > 4,
                                  'big': np.arange(20)+2**40})
    before = {p for p in os.listdir(tempfile.gettempdir()) if p.startswith('trx_')}
    t = tmm.load(str(write_tractogram(s, tmp_path/'s.trx')))
    same_lines(s, list(t.streamlines), 0)
    for k in ('bundle', 'w', 'big', 'ok'):
        assert np.array_equal(np.asarray(t.data_per_streamline[k]).reshape(s.per_line[k].shape), s.per_line[k])
    for k, v in s.per_point.items():
        assert np.array_equal(np.asarray(t.data_per_vertex[k]._data), v)
    assert t.groups['left'].ravel().tolist() == list(range(0, 20, 3))
    assert np.allclose(t.header['VOXEL_TO_RASMM'], s.geometry.affine[:, [2, 1, 0, 3]])
    assert tuple(t.header['DIMENSIONS']) == s.geometry.shape[::-1]
    for how in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        tmm.save(t, str(tmp_path/'theirs.trx'), how)
        back = read_tractogram(tmp_path/'theirs.trx')
        assert np.array_equal(back.points, s.points) and np.array_equal(back.offsets, s.offsets)
        assert set(back.per_line) == set(s.per_line) and set(back.per_point) == set(s.per_point)
        for k, v in s.per_line.items():
            assert np.array_equal(back.per_line[k], v) and back.per_line[k].dtype == v.dtype
        assert back.geometry.matches(s.geometry)
    t.close()
    ours = {p for p in os.listdir(tempfile.gettempdir()) if p.startswith('trx_')}
    read_tractogram(tmp_path/'theirs.trx')
    assert {p for p in os.listdir(tempfile.gettempdir()) if p.startswith('trx_')} <= ours | before


def test_the_same_lines_are_the_same_bytes(tmp_path):
    for kind in ('trk', 'trx'):
        a, b = (write_tractogram(make(), tmp_path/f'{k}.{kind}').read_bytes() for k in 'ab')
        assert a == b
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.trk', 'a.trx', 'b.trk', 'b.trx']
    with zipfile.ZipFile(tmp_path/'a.trx') as z:
        assert {i.date_time for i in z.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_types_survive_trx(tmp_path):
    kinds = ['i1', 'u1', 'i2', 'u2', 'i4', 'u4', 'i8', 'u8', 'f2', 'f4', 'f8', '?', '>f4', '>i4']
    s = Streamlines(np.zeros((3, 3)), [0, 1, 3], {f'a{i}': np.array([[0, 1], [1, 0]]).astype(k) for i, k in enumerate(kinds)},
                    geometry=GRID)
    t = read_tractogram(write_tractogram(s, tmp_path/'s.trx'))
    for i, k in enumerate(kinds):
        assert t.per_line[f'a{i}'].dtype == np.dtype(k).newbyteorder('=') and t.per_line[f'a{i}'].tolist() == s.per_line[f'a{i}'].tolist()


def refused(path, code):
    with pytest.raises(TractogramError) as e:
        read_tractogram(path)
    assert e.value.code == code and path.name in e.value.cause and str(path.parent) not in str(e.value)
    return e.value


def test_every_cut_of_a_file_is_refused(tmp_path):
    s = make(6)
    for kind in ('trk', 'tck', 'trx'):
        raw = write_tractogram(replace(s, per_line={}, per_point={}) if kind == 'tck' else s, tmp_path/f's.{kind}').read_bytes()
        path = tmp_path/f'cut.{kind}'
        for size in [0, 3, 10, *range(20, len(raw), 37), len(raw)-1]:
            path.write_bytes(raw[:size])
            with pytest.raises(TractogramError) as e:
                read_tractogram(path)
            assert 'cut.' in e.value.cause


def test_bytes_too_many_are_refused(tmp_path):
    s = make(3, data=False)
    raw = write_tractogram(s, tmp_path/'s.trk').read_bytes()
    for more in (b'\0', b'\0\0', bytes(4)):
        (tmp_path/'more.trk').write_bytes(raw+more)
        refused(tmp_path/'more.trk', 'COUNT' if len(more) == 4 else 'TRUNCATED')
    raw = write_tractogram(s, tmp_path/'s.tck').read_bytes()
    (tmp_path/'more.tck').write_bytes(raw+bytes(12))
    refused(tmp_path/'more.tck', 'TRUNCATED')
    (tmp_path/'more.tck').write_bytes(raw[:-24]+raw[-12:])  # the mark of the end, but not of the last line
    assert 'last line' in refused(tmp_path/'more.tck', 'TRUNCATED').cause


def test_any_changed_byte_is_read_or_refused_and_nothing_else(tmp_path):
    rng = np.random.default_rng(0)
    for kind in ('trk', 'tck', 'trx'):
        s = replace(make(4), per_line={}, per_point={}) if kind == 'tck' else make(4)
        raw = bytearray(write_tractogram(s, tmp_path/f's.{kind}').read_bytes())
        path = tmp_path/f'bad.{kind}'
        for _ in range(400):
            bad = bytearray(raw)
            for at in rng.integers(0, len(raw), rng.integers(1, 4)):
                bad[at] = rng.integers(0, 256)
            path.write_bytes(bad)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter('error', RuntimeWarning)
                    t = read_tractogram(path)
            except TractogramError:
                continue
            assert np.isfinite(t.points).all()


def trk_with(tmp_path, at, fmt, *values, s=None):
    raw = bytearray(write_tractogram(s or make(3), tmp_path/'s.trk').read_bytes())
    struct.pack_into(fmt, raw, at, *values)
    (tmp_path/'lie.trk').write_bytes(raw)
    return tmp_path/'lie.trk'


@pytest.mark.parametrize('at, fmt, values, code', [
    (0, '<5s', (b'TRUCK',), 'NOT_TRK'), (996, '<i', (999,), 'NOT_TRK'), (992, '<i', (7,), 'NOT_TRK'),
    (988, '<i', (4,), 'COUNT'), (988, '<i', (2,), 'COUNT'), (988, '<i', (2**31-1,), 'COUNT'),
    (1000, '<i', (-1,), 'TRUNCATED'), (1000, '<i', (2**31-1,), 'TRUNCATED'), (1004, '<f', (np.nan,), 'POINTS'),
    (1004, '<f', (np.inf,), 'POINTS'), (1004, '<f', (3e38,), 'POINTS'), (36, '<h', (3,), 'NAMES'), (36, '<h', (-1,), 'NAMES'),
    (238, '<h', (0x7fff,), 'TRUNCATED'), (12, '<f', (0,), 'NO_AFFINE'), (12, '<f', (np.nan,), 'NO_AFFINE'),
    (500, '<f', (0,), 'NO_AFFINE'), (992, '<i', (1,), 'NO_AFFINE'), (948, '<3s', (b'SAR',), 'VOXEL_ORDER'),
    (948, '<3s', (b'XYZ',), 'VOXEL_ORDER'), (948, '<3s', (b'LA\0',), 'VOXEL_ORDER')])
def test_trk_that_lies(tmp_path, at, fmt, values, code):
    refused(trk_with(tmp_path, at, fmt, *values), code)


def test_trk_without_affine_takes_the_reference(tmp_path):
    s = make(3)
    path = trk_with(tmp_path, 500, '<f', 0, s=s)
    assert np.abs(read_tractogram(path, GRID).points-s.points).max() < 2e-5
    with pytest.raises(TractogramError, match='reference') as e:
        read_tractogram(path, Geometry.from_spacing((3, 4, 5), (1, 1, 1)))
    assert e.value.code == 'REFERENCE'


def test_trk_of_unknown_count_is_read_to_its_end(tmp_path):
    s = make(3)
    assert len(read_tractogram(trk_with(tmp_path, 988, '<i', 0, s=s))) == 3


@pytest.mark.parametrize('old, new, code', [
    (b'Float32LE', b'Float16LE', 'TYPE'), (b'file: . ', b'file: x ', 'TYPE'), (b'count: 0000000003', b'count: 0000000004', 'COUNT'),
    (b'file: . 67', b'file: . 11', 'TRUNCATED'), (b'file: . 67', b'file: . 9999999', 'TRUNCATED'), (b'END', b'FIN', 'TRUNCATED'),
    (b'mrtrix', b'MRTRIX', 'NOT_TCK'), (b'file:', b'fool:', 'TYPE')])
def test_tck_that_lies(tmp_path, old, new, code):
    raw = write_tractogram(make(3, data=False), tmp_path/'s.tck').read_bytes()
    assert old in raw
    (tmp_path/'lie.tck').write_bytes(raw.replace(old, new))
    refused(tmp_path/'lie.tck', code)


def test_tck_points_that_are_not_finite(tmp_path):
    raw = bytearray(write_tractogram(make(3, data=False), tmp_path/'s.tck').read_bytes())
    struct.pack_into('<f', raw, 67, np.nan)  # one coordinate only: no end of a line
    (tmp_path/'nan.tck').write_bytes(raw)
    assert 'line 0, point 0' in refused(tmp_path/'nan.tck', 'POINTS').cause
    struct.pack_into('<3f', raw, 67, *[np.inf]*3)
    (tmp_path/'nan.tck').write_bytes(raw)
    refused(tmp_path/'nan.tck', 'POINTS')


def trx_with(tmp_path, change, how=zipfile.ZIP_STORED):
    with zipfile.ZipFile(write_tractogram(make(3), tmp_path/'s.trx')) as z:
        files = {n: z.read(n) for n in z.namelist()}
    change(files)
    with zipfile.ZipFile(tmp_path/'lie.trx', 'w', how) as z:
        for name, data in files.items():
            z.writestr(name, data)
    return tmp_path/'lie.trx'


def header(**new):
    def change(files):
        files['header.json'] = json.dumps({**json.loads(files['header.json']), **new}).encode()
    return change


@pytest.mark.parametrize('change, code', [
    (header(NB_STREAMLINES=4), 'COUNT'), (header(NB_VERTICES=10**12), 'COUNT'), (header(NB_STREAMLINES=-3), 'COUNT'),
    (header(NB_VERTICES='many'), 'DAMAGED'), (header(VOXEL_TO_RASMM=[1, 2]), 'DAMAGED'), (header(DIMENSIONS=None), 'DAMAGED'),
    (header(NB_VERTICES=float('inf')), 'DAMAGED'), (header(DIMENSIONS=[2**80]*3), 'DAMAGED'),
    (header(VOXEL_TO_RASMM=np.zeros((4, 4)).tolist()), 'GEOMETRY'),
    (lambda f: f.update({'header.json': b'[' * 5000}), 'DAMAGED'), (lambda f: f.pop('header.json'), 'DAMAGED'),
    (lambda f: f.pop('positions.3.float32'), 'DAMAGED'), (lambda f: f.pop('offsets.uint64'), 'DAMAGED'),
    (lambda f: f.update({'positions.3.float32': f['positions.3.float32'][:-4]}), 'COUNT'),
    (lambda f: f.update({'offsets.uint64': np.array([0, 9, 2, 3], 'u8').tobytes()}), None),
    (lambda f: f.update({'offsets.float64': f.pop('offsets.uint64')}), 'TYPE'),
    (lambda f: f.update({'dps/w.float32': b'1234'*3}), 'NAMES'), (lambda f: f.update({'positions.float32': b'1234'}), 'NAMES'),
    (lambda f: f.update({'dps/x.float31': b'1234'*3}), 'TYPE'), (lambda f: f.update({'dps/x.y.float32': b'1234'*3}), 'TYPE'),
    (lambda f: f.update({'groups/g.uint32': np.array([3], 'u4').tobytes()}), 'COUNT'),
    (lambda f: f.update({'extra/x.uint32': np.array([3], 'u4').tobytes()}), 'TYPE'),
    (lambda f: f.update({'header.json': b' '*(2 << 20)}), 'LIMIT'),
    (lambda f: f.update({'positions.3.float32': np.full(f['positions.3.float32'].__len__()//4, np.nan, 'f4').tobytes()}), 'POINTS')])
def test_trx_that_lies(tmp_path, change, code):
    path = trx_with(tmp_path, change)
    if code:
        refused(path, code)
    else:
        with pytest.raises(TractogramError):
            read_tractogram(path)


def test_trx_of_older_and_other_programs(tmp_path):
    s = make(3)
    def older(f):
        f['offsets.uint32'] = np.frombuffer(f.pop('offsets.uint64'), 'u8')[:-1].astype('u4').tobytes()
        f['positions.3.float64'] = np.frombuffer(f.pop('positions.3.float32'), 'f4').astype('f8').tobytes()
        f['dpg/left/n.int32'] = b'1234'
    with pytest.warns(UserWarning, match='lie.trx: data per group'):
        t = read_tractogram(trx_with(tmp_path, older, zipfile.ZIP_DEFLATED))
    assert np.array_equal(t.offsets, s.offsets) and np.array_equal(t.points, s.points)


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path):
    n = 4_000_000

    def bomb(f):
        header(NB_VERTICES=10*n)(f)
        f['positions.3.float32'] = bytes(12*n)
        for k in [k for k in f if k.startswith('dpv/')]:
            del f[k]
    path = trx_with(tmp_path, bomb, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 20
    with open(path, 'r+b') as f:  # the directory now claims that the same packed bytes hold ten times as much
        raw = f.read()
        at = raw.rindex(b'positions.3.float32')-46
        f.seek(at+24)
        f.write(struct.pack('<I', 12*10*n))
    with zipfile.ZipFile(path) as z:
        assert z.getinfo('positions.3.float32').file_size == 12*10*n
    assert 'positions claims' in refused(path, 'LIMIT').cause


@pytest.mark.parametrize('data, code', [
    (dict(per_line={'a name of twenty-one.': np.zeros(3)}), 'NAMES'), (dict(per_line={'nineteen letters ok': np.zeros((3, 2))}), 'NAMES'),
    (dict(per_point={f'n{i}': np.zeros(6) for i in range(11)}), 'NAMES'), (dict(per_line={'é': np.zeros(3)}), 'NAMES'),
    (dict(per_line={'a': np.array([1, 2, 2**24+1])}), 'PRECISION'), (dict(geometry=None), 'NO_AFFINE'),
    (dict(geometry=Geometry.from_spacing((40_000, 2, 2), (1, 1, 1))), 'LIMIT')])
def test_what_trk_would_lose_is_refused(tmp_path, data, code):
    s = replace(Streamlines(np.zeros((6, 3)), [0, 2, 4, 6], geometry=GRID), **data)
    old = tmp_path/'s.trk'
    old.write_bytes(b'before')
    with pytest.raises(TractogramError, match='s.trk') as e:
        write_tractogram(s, old)
    assert e.value.code == code and old.read_bytes() == b'before' and len(list(tmp_path.iterdir())) == 1


def test_limits_of_trk_that_still_fit(tmp_path):
    s = Streamlines(np.zeros((6, 3)), [0, 2, 4, 6], {f'{i}'*20: np.arange(3)+i for i in range(10)},
                    {'eighteen letters..': np.arange(12).reshape(6, 2)}, GRID)
    t = read_tractogram(write_tractogram(s, tmp_path/'s.trk'))
    assert list(t.per_line) == list(s.per_line) and np.array_equal(t.per_line['3'*20], s.per_line['3'*20])
    assert np.array_equal(t.per_point['eighteen letters..'], s.per_point['eighteen letters..'])


@pytest.mark.parametrize('name', ['a.b', 'a/b', '../a', '.', 'groups/', 'a\\b'])
def test_names_that_are_no_file_names_stay_out_of_trx(tmp_path, name):
    with pytest.raises(TractogramError) as e:
        write_tractogram(replace(make(3, data=False), per_line={name: np.zeros(3)}), tmp_path/'s.trx')
    assert e.value.code == 'NAMES' and not list(tmp_path.iterdir())


def test_other_names_and_absent_files(tmp_path):
    for path, code in ((tmp_path/'a.vtk', 'TYPE'), (tmp_path/'a', 'TYPE'), (tmp_path/'a.trk', 'NO_FILE')):
        refused(path, code)
    assert len(read_tractogram(write_tractogram(make(3), tmp_path/'A.TRK'))) == 3
