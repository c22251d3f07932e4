"Volume files of other tools: round trips, numbers, and files that lie."
import gzip, os, tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jfr2020.ground.errors import JfrError
from jfr2020.ground.geometry import Geometry, lps2ras
from jfr2020.files.nifti import VolumeFileError, as_labels, read_mask, read_nifti, read_nifti_ct, write_nifti
from jfr2020.ground.volume import OUTSIDE, CTVolume, FeatureVolume, MaskVolume, Volume, check_landmark

DATA = Path(__file__).parents[3]/'shared/data'


def grid(seed, shape=(3, 4, 5), oblique=True):
    rng = np.random.default_rng(seed)
    A = np.array(Geometry.from_spacing(shape, rng.uniform(.3, 8, 3), rng.uniform(-300, 300, 3)).affine)
    if oblique: A[:3] = np.linalg.qr(rng.normal(size=(3, 3)))[0] @ A[:3]
    return Geometry(shape, A)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(['i2', 'f4', 'u1', 'u2']), st.sampled_from(['.nii', '.nii.gz']))
def test_round_trip_on_oblique_grids(seed, kind, suffix):
    g, rng = grid(seed), np.random.default_rng(seed)
    data = rng.permutation(60).reshape(g.shape).astype(kind)
    v = Volume(data, g) if kind[0] in 'if' else MaskVolume(data, g)
    with tempfile.TemporaryDirectory() as tmp:
        read = read_mask if isinstance(v, MaskVolume) else read_nifti
        back = read(write_nifti(v, Path(tmp)/f'v{suffix}'))
        again = read(write_nifti(back, Path(tmp)/f'w{suffix}'))
    assert np.array_equal(back.data, data)
    assert back.data.dtype == (data.dtype if kind != 'u2' else np.uint8) # labels take the smallest type
    assert back.geometry.matches(g, tol=1e-3)
    check_landmark(v, back, tol=1e-3)
    assert np.array_equal(again.geometry.affine, back.geometry.affine) # float32 once, then exact


def test_sheared_grid_keeps_its_sform(tmp_path):
    A = np.array(grid(1).affine)
    A[:3, 0] += .2*A[:3, 1]
    v = Volume(np.zeros((3, 4, 5), 'i2'), Geometry((3, 4, 5), A))
    assert read_nifti(write_nifti(v, tmp_path/'v.nii')).geometry.matches(v.geometry)


def test_other_tools_see_the_same_patient(tmp_path):
    g = grid(3)
    v = CTVolume(np.arange(60, dtype='i2').reshape(g.shape), g)
    img = nib.load(write_nifti(v, tmp_path/'v.nii.gz'))
    assert img.shape == (5, 4, 3) and img.get_data_dtype() == np.int16 and img.header.get_xyzt_units()[0] == 'mm'
    for d, h, w in ((0, 0, 0), (2, 3, 4), (1, 0, 3)):
        assert img.dataobj[w, h, d] == v.data[d, h, w]
        assert np.allclose((img.affine @ [w, h, d, 1])[:3], g.to_world([[d, h, w]])[0], atol=1e-3)
    assert int(img.header['qform_code']) == int(img.header['sform_code']) == 1
    sitk = pytest.importorskip('SimpleITK')
    s = sitk.ReadImage(str(tmp_path/'v.nii.gz'))
    assert np.array_equal(sitk.GetArrayFromImage(s), v.data)
    far = np.array(s.TransformIndexToPhysicalPoint((4, 3, 2)))*[-1, -1, 1]
    assert np.allclose(far, g.to_world([[2, 3, 4]])[0], atol=1e-3)


@pytest.mark.parametrize('slope,inter,kind', [(1, -1024, 'i2'), (2, 3, 'i2'), (.5, 0, 'f4'), (40, 0, 'f4')])
def test_scaling_is_exact_or_float(tmp_path, slope, inter, kind):
    stored = np.arange(0, 4000, 100, dtype='u2').reshape(2, 4, 5)
    img = nib.Nifti1Image(stored, np.eye(4))
    img.header.set_slope_inter(slope, inter)
    img.set_sform(np.eye(4), 1)
    raw = bytearray(img.to_bytes())
    raw[112:120] = np.array([slope, inter], '<f4').tobytes()
    (tmp_path/'s.nii').write_bytes(raw)
    v = read_nifti(tmp_path/'s.nii')
    assert v.data.dtype == kind
    assert np.array_equal(v.data, (stored.T*float(slope)+inter).astype(kind))


@pytest.mark.parametrize('order', '<>')
def test_byte_orders_versions_and_trailing_axis(tmp_path, order):
    data = np.arange(24, dtype=order+'i2').reshape(2, 3, 4)
    for cls in (nib.Nifti1Image, nib.Nifti2Image):
        img = cls(data[..., None], np.diag([2, 3, 4, 1]), cls.header_class(endianness=order))
        img.set_data_dtype(data.dtype)
        nib.save(img, tmp_path/'e.nii')
        v = read_nifti(tmp_path/'e.nii')
        assert np.array_equal(v.data, data.T) and v.data.dtype == np.int16 and v.spacing == (4, 3, 2)


def test_qform_alone_is_enough(tmp_path):
    img = nib.Nifti1Image(np.zeros((2, 3, 4), 'i2'), None)
    A = np.diag([-2., -3., 4., 1])
    A[:3, 3] = 5, 6, 7
    img.set_qform(A, 1)
    img.header.set_sform(None, 0)
    nib.save(img, tmp_path/'q.nii')
    assert np.allclose(read_nifti(tmp_path/'q.nii').geometry.affine, A[:, [2, 1, 0, 3]])


def code(call, *a):
    with pytest.raises(VolumeFileError) as e: call(*a)
    return e.value.code


def saved(path, **change):
    "A good file with some header bytes changed"
    img = nib.Nifti1Image(np.zeros((4, 5, 6), 'i2'), np.eye(4))
    raw = bytearray(img.to_bytes())
    h = img.header.copy()
    h['vox_offset'], h['sform_code'], h['magic'] = 352, 1, b'n+1'
    for k, v in change.items(): h[k] = v
    raw[:348] = h.binaryblock
    path.write_bytes(gzip.compress(bytes(raw)) if path.suffix == '.gz' else bytes(raw))
    return path


@pytest.mark.parametrize('name', ['a.nii', 'a.nii.gz'])
def test_liars_are_refused_before_unpacking(tmp_path, name):
    assert read_nifti(saved(tmp_path/name)).shape == (6, 5, 4)
    assert code(read_nifti, saved(tmp_path/name, dim=[3, 32767, 32767, 32767, 1, 1, 1, 1])) == 'LIMIT'
    assert code(read_nifti, saved(tmp_path/name, dim=[3, 2000, 1000, 100, 1, 1, 1, 1])) == 'TRUNCATED'
    assert code(read_nifti, saved(tmp_path/name, dim=[4, 4, 5, 2, 3, 1, 1, 1])) == 'DIMENSIONS'
    assert code(read_nifti, saved(tmp_path/name, pixdim=[1, 1, 1, 3, 1, 1, 1, 1])) == 'SPACING'
    assert code(read_nifti, saved(tmp_path/name, xyzt_units=3)) == 'UNIT'
    assert code(read_nifti, saved(tmp_path/name, sform_code=0, qform_code=0)) == 'NO_AFFINE'
    with pytest.raises(JfrError): read_nifti(saved(tmp_path/name, dim=[3, -4, 5, 6, 1, 1, 1, 1]))
    with pytest.raises(JfrError): read_nifti(saved(tmp_path/name, srow_x=[np.nan]*4))
    with pytest.raises(JfrError): read_nifti(saved(tmp_path/name, srow_x=[0]*4))


def test_cut_and_damaged_files(tmp_path):
    g = grid(2, (8, 20, 20))
    v = Volume(np.random.default_rng(0).integers(0, 999, g.shape).astype('i2'), g)
    for name in ('v.nii', 'v.nii.gz'):
        whole = write_nifti(v, tmp_path/name).read_bytes()
        for n in (0, 10, 200, 400, len(whole)//2, len(whole)-20):
            (tmp_path/name).write_bytes(whole[:n])
            assert code(read_nifti, tmp_path/name) in ('TRUNCATED', 'NOT_NIFTI')
    (tmp_path/'t.nii').write_text('no volume')
    assert code(read_nifti, tmp_path/'t.nii') == 'NOT_NIFTI'
    assert code(read_nifti, tmp_path/'absent.nii') == code(read_mask, tmp_path/'absent.nii') == 'NO_FILE'


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 347), st.integers(0, 255))
def test_one_changed_header_byte_reads_or_is_refused(at, byte):
    with tempfile.TemporaryDirectory() as tmp:
        path = saved(Path(tmp)/'m.nii')
        raw = bytearray(path.read_bytes())
        raw[at] = byte
        path.write_bytes(raw)
        try: assert read_nifti(path).data.size <= 120
        except JfrError: pass


def test_kinds_that_are_no_ct(tmp_path):
    hu = np.full((4, 8, 8), -800, 'i2')
    hu[1:3] = 40
    g = grid(0, hu.shape)
    assert np.array_equal(read_nifti_ct(write_nifti(Volume(hu, g), tmp_path/'a.nii')).data, hu)
    for bad in (hu+np.int16(1024), hu-np.int16(1024), np.clip(hu, 0, 255).astype('i2'), np.zeros_like(hu),
                (hu*.001).astype('f4'), np.where(hu < 0, np.nan, hu).astype('f4'), np.full_like(hu, -2000)):
        assert code(read_nifti_ct, write_nifti(Volume(bad, g), tmp_path/'b.nii')) == 'NOT_HU'
    padded = hu.copy()
    padded[:, 0] = -3024
    ct = read_nifti_ct(write_nifti(Volume(padded, g), tmp_path/'c.nii'))
    assert ct.data.min() == OUTSIDE and ct.data.dtype == np.int16
    assert code(read_nifti_ct, write_nifti(Volume(padded+np.int16(1024), g), tmp_path/'d.nii')) == 'NOT_HU'


def test_writing_is_whole_and_repeatable(tmp_path):
    v = MaskVolume(np.eye(4, dtype='i8')[None], grid(0, (1, 4, 4)))
    a = write_nifti(v, tmp_path/'new'/'a.nii.gz').read_bytes()
    assert write_nifti(v, tmp_path/'b.nii.gz').read_bytes() == a
    assert os.listdir(tmp_path/'new') == ['a.nii.gz']
    assert nib.load(tmp_path/'b.nii.gz').get_data_dtype() == np.uint8
    g = grid(0, (1, 2, 2))
    for bad in (Volume(np.zeros((1, 2, 2), complex), g), FeatureVolume(np.zeros((1, 2, 2, 3), 'f2'), g)):
        assert code(write_nifti, bad, tmp_path/'x.nii') == 'TYPE'
    assert not (tmp_path/'x.nii').exists()


@pytest.mark.parametrize('kind', ['f4', '>f4', 'f8', 'i2'])
@pytest.mark.parametrize('name', ['sh.nii', 'sh.nii.gz'])
def test_channels_are_the_fourth_axis_for_another_reader(tmp_path, name, kind):
    g = grid(3, (3, 4, 5))
    v = FeatureVolume(np.random.default_rng(0).integers(-99, 99, (*g.shape, 7)).astype(kind)[..., ::-1], g)
    img = nib.load(write_nifti(v, tmp_path/name))
    assert img.shape == (5, 4, 3, 7) and np.array_equal(np.asarray(img.dataobj).transpose(2, 1, 0, 3), v.data)
    assert img.get_data_dtype() == np.dtype(kind).newbyteorder('<')
    assert np.allclose(img.affine[:, [2, 1, 0, 3]], g.affine, atol=1e-4)


def nrrd(path, m, space='left-posterior-superior', encoding='gzip', extra='', kind='uchar', endian=None, **change):
    A = lps2ras(m.geometry.affine) if space[0] in 'lL' else m.geometry.affine
    vec = lambda c: '('+','.join(repr(float(x)) for x in c)+')'
    h = {'type': kind, 'dimension': 3, 'space': space, 'sizes': ' '.join(map(str, m.shape[::-1])),
         'space directions': ' '.join(vec(A[:3, k]) for k in (2, 1, 0)), 'space origin': vec(A[:3, 3]),
         'encoding': encoding}
    if endian: h['endian'] = endian
    h |= {k.replace('_', ' '): v for k, v in change.items()}
    dtype = {'short': '>i2' if endian == 'big' else '<i2', 'float': '<f4'}.get(kind, 'u1')
    raw, lines = m.data.astype(dtype).tobytes(), [f'{k}: {v}\n' for k, v in h.items() if v is not None]
    text = 'NRRD0005\n# note\n' + ''.join(lines) + extra + 'Segment0_Name:=LAD\n\n'
    path.write_bytes(text.encode()+(gzip.compress(raw) if encoding in ('gzip', 'gz') else raw))
    return path


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(['left-posterior-superior', 'LPS', 'right-anterior-superior', 'RAS']),
       st.sampled_from(['raw', 'gzip', 'gz']),
       st.sampled_from([('uchar', None), ('short', 'big'), ('short', 'little'), ('float', None)]))
def test_nrrd_equals_nifti(seed, space, encoding, kind):
    g = grid(seed)
    m = MaskVolume(np.random.default_rng(seed).integers(0, 6, g.shape).astype('u1'), g)
    with tempfile.TemporaryDirectory() as tmp:
        got = read_mask(nrrd(Path(tmp)/'m.nrrd', m, space, encoding, kind=kind[0], endian=kind[1]))
    assert np.array_equal(got.data, m.data) and got.data.dtype == np.uint8 and got.geometry.matches(g, 1e-6)


def test_nrrd_refusals(tmp_path):
    m, p = MaskVolume(np.ones((3, 4, 5), 'u1'), grid(0)), tmp_path/'m.nrrd'
    assert code(read_mask, nrrd(p, m, space='scanner-xyz')) == 'NO_AFFINE'
    assert code(read_mask, nrrd(p, m, space_directions=None)) == 'NO_AFFINE'
    assert code(read_mask, nrrd(p, m, space_directions='none (1,0,0) (0,1,0)')) == 'NO_AFFINE'
    assert code(read_mask, nrrd(p, m, sizes='2 3 4 5')) == 'DIMENSIONS'
    assert code(read_mask, nrrd(p, m, sizes='-3 4 5')) == 'DIMENSIONS'
    assert code(read_mask, nrrd(p, m, sizes='4000 4000 200')) == 'TRUNCATED'
    assert code(read_mask, nrrd(p, m, sizes='40000 4 5')) == 'LIMIT'
    assert code(read_mask, nrrd(p, m, sizes='5 4 4')) == 'TRUNCATED'
    assert code(read_mask, nrrd(p, m, encoding='bzip2')) == 'TYPE'
    assert code(read_mask, nrrd(p, m, kind='block')) == 'TYPE'
    assert code(read_mask, nrrd(p, m, extra='data file: /etc/passwd\n')) == 'TYPE'
    p.write_bytes(b'NRRD0004\ntype: uchar\n')
    assert code(read_mask, p) == 'NOT_NRRD'
    p.write_bytes(b'NRRD0004\n' + b'#'*100000)
    assert code(read_mask, p) == 'NOT_NRRD'
    p.write_bytes(bytes(128)+b'DICM'+bytes(100))
    assert code(read_mask, p) == 'DICOM_SEG'


def test_labels():
    assert as_labels(np.array([0., 7.])).dtype == np.uint8
    for bad in (np.array([.5]), np.array([-1]), np.array([np.nan]), np.array([2.**40])):
        with pytest.raises(VolumeFileError): as_labels(bad)


@pytest.mark.data
@pytest.mark.skipif(not DATA.exists(), reason='the real series beside the checkout are absent')
def test_real_files():
    ct = read_nifti_ct(DATA/'ct_nifti/totalseg_pulmonary_cta/ct_cropped.nii.gz')
    img = nib.load(DATA/'ct_nifti/totalseg_pulmonary_cta/ct_cropped.nii.gz')
    assert ct.shape == img.shape[::-1] and np.array_equal(ct.data, np.asarray(img.dataobj).T.clip(OUTSIDE))
    heart = read_mask(DATA/'ct_nifti/totalseg_pulmonary_cta/heart.nii.gz')
    assert heart.data.max() >= 1 and not heart.geometry.matches(ct.geometry)
    for k in ('tracto/nibabel/example4d.nii.gz', 'tracto/tractseg/peaks.nii.gz'):
        assert code(read_nifti, DATA/k) == 'DIMENSIONS'
    assert code(read_nifti_ct, DATA/'tracto/tractseg/FA.nii.gz') == 'NOT_HU'
