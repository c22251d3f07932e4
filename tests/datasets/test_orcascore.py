"orCaScore: its files (MetaImage, against ITK), its lesions and its measures, against slow versions of the rules."
import pickle
import zlib

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jfr2020.calcium.score import agatston
from jfr2020.datasets.cases import load_ct, load_mask
from jfr2020.ground.errors import GeometryError, JfrError
from jfr2020.ground.geometry import Geometry
from jfr2020.files.metaimage import META_TYPES, metaimage_geometry, read_metaimage, write_metaimage
from jfr2020.files.nifti import VolumeFileError
from jfr2020.datasets.orcascore import (OrcaCounts, OrcaError, check_orca_mask, from_orca_labels, majority_labels, orca_components, orca_measures,
                               read_orcascore, to_orca_labels, write_orca_submission, write_orcascore)
from jfr2020.synth.thorax import chest_phantom
from jfr2020.ground.volume import CTVolume, MaskVolume, Volume, check_landmark


def grid(seed, shape=(3, 4, 5)):
    rng = np.random.default_rng(seed)
    A = np.array(Geometry.from_spacing(shape, rng.uniform(.3, 8, 3), rng.uniform(-300, 300, 3)).affine)
    A[:3] = np.linalg.qr(rng.normal(size=(3, 3)))[0] @ A[:3]
    return Geometry(shape, A)


# MetaImage

@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(sorted(META_TYPES.values())), st.sampled_from(['v.mhd', 'v.mha']), st.booleans())
def test_metaimage_round_trip(tmp_path_factory, seed, kind, name, packed):
    g, rng = grid(seed), np.random.default_rng(seed)
    v = Volume(rng.permutation(60).astype(kind).reshape(g.shape), g)
    path = write_metaimage(v, tmp_path_factory.mktemp('m')/name, packed)
    back = read_metaimage(path)
    assert np.array_equal(back.data, v.data) and back.geometry.matches(g, tol=1e-6)
    assert metaimage_geometry(path).matches(g, tol=1e-6)
    check_landmark(v, back, tol=1e-6)


@pytest.mark.parametrize('packed', [True, False])
@pytest.mark.parametrize('name', ['v.mhd', 'v.mha'])
def test_metaimage_against_itk(tmp_path, packed, name):
    sitk = pytest.importorskip('SimpleITK', reason='extra bench')
    for seed in range(5):
        g = grid(seed)
        v = Volume(np.random.default_rng(seed).permutation(60).astype('i2').reshape(g.shape)-30, g)
        image = sitk.ReadImage(str(write_metaimage(v, tmp_path/name, packed)))
        assert np.array_equal(sitk.GetArrayFromImage(image), v.data)
        for d, h, w in ((0, 0, 0), (2, 3, 4), (1, 0, 4)):
            x, y, z = image.TransformIndexToPhysicalPoint((w, h, d))
            assert np.allclose(g.to_world([[d, h, w]])[0], (-x, -y, z), atol=1e-6)
        sitk.WriteImage(image, str(tmp_path/f'itk{name[1:]}'), packed)
        back = read_metaimage(tmp_path/f'itk{name[1:]}')
        assert np.array_equal(back.data, v.data) and back.geometry.matches(g, tol=1e-6)


def header(tmp_path, body=b'', **change):
    words = dict(NDims='3', BinaryData='True', CompressedData='False', Offset='0 0 0', ElementSpacing='.5 .5 3', DimSize='6 5 4',
                 ElementType='MET_SHORT', ElementDataFile='x.raw') | change
    last = words.pop('ElementDataFile')
    words |= dict(ElementDataFile=last) # it ends the header
    (tmp_path/'x.raw').write_bytes(body)
    (tmp_path/'x.mhd').write_text(''.join(f'{k} = {v}\n' for k, v in words.items() if v is not None))
    return tmp_path/'x.mhd'


def test_metaimage_big_endian_and_other_words(tmp_path):
    a = np.arange(120, dtype='>i2').reshape(4, 5, 6)
    got = read_metaimage(header(tmp_path, a.tobytes(), BinaryDataByteOrderMSB='True', Offset=None, Position='1 2 3', ElementSpacing=None,
                                ElementSize='.5 .5 3'))
    assert np.array_equal(got.data, a) and np.allclose(got.geometry.affine[:3, 3], (-1, -2, 3))
    with pytest.raises(VolumeFileError, match='TOO_LONG|TRUNCATED'): read_metaimage(header(tmp_path, a.tobytes()[:-1]))
    with pytest.raises(VolumeFileError, match='TOO_LONG'): read_metaimage(header(tmp_path, a.tobytes()+b'1'))


@pytest.mark.parametrize('change', [dict(NDims='2'), dict(NDims='4'), dict(DimSize='6 5'), dict(DimSize='6 5 0'), dict(DimSize='6 5 -4'),
    dict(DimSize='99999 5 4'), dict(ElementType='MET_LONG'), dict(ElementType='x'), dict(ElementNumberOfChannels='3'), dict(BinaryData='False'),
    dict(HeaderSize='-1'), dict(ElementDataFile='LIST'), dict(ElementDataFile='../x.raw'), dict(ElementDataFile='x%03d.raw'),
    dict(ElementDataFile=None), dict(ElementDataFile='no.raw'), dict(ElementSpacing='0 1 1'), dict(ElementSpacing='nan 1 1'), dict(Offset='1 2'),
    dict(Offset=None), dict(TransformMatrix='1 0 0 0 1 0 0 0 0'), dict(TransformMatrix='a'), dict(ElementDataFile='.')])
def test_metaimage_refusals(tmp_path, change):
    with pytest.raises(JfrError): read_metaimage(header(tmp_path, bytes(240), **change))


def test_metaimage_words_behind_the_last(tmp_path):
    path = header(tmp_path, bytes(240))
    assert read_metaimage(path).data.shape == (4, 5, 6)
    path.write_text(path.read_text() + 'Offset = 9 9 9\n')
    with pytest.raises(VolumeFileError, match='NOT_METAIMAGE'): read_metaimage(path)


def test_metaimage_bombs_and_links(tmp_path):
    bomb = zlib.compress(bytes(50 << 20), 9)
    with pytest.raises(VolumeFileError, match='TOO_LONG'): read_metaimage(header(tmp_path, bomb, CompressedData='True'))
    with pytest.raises(VolumeFileError, match='claims'): read_metaimage(header(tmp_path, bomb[:99], CompressedData='True', DimSize='4000 4000 60'))
    whole = zlib.compress(bytes(240))
    for cut in range(0, len(whole), 3):
        with pytest.raises(VolumeFileError): read_metaimage(header(tmp_path, whole[:cut] + b'\xff'*3, CompressedData='True'))
    path = header(tmp_path, bytes(240))
    (tmp_path/'x.raw').rename(tmp_path/'y'); (tmp_path/'x.raw').symlink_to(tmp_path/'y')
    with pytest.raises(VolumeFileError, match='NO_FILE'): read_metaimage(path)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=400))
def test_metaimage_noise(tmp_path_factory, raw):
    path = tmp_path_factory.mktemp('n')/'x.mhd'
    path.write_bytes(raw)
    with pytest.raises(VolumeFileError): read_metaimage(path)


# lesions and measures, slowly

def flood(on):
    "Face-connected groups, one voxel at a time"
    left, out = {tuple(p) for p in np.argwhere(on)}, []
    while left:
        group, todo = set(), [left.pop()]
        while todo:
            p = todo.pop(); group.add(p)
            for axis in range(3):
                for step in (-1, 1):
                    q = tuple(x+step*(i == axis) for i, x in enumerate(p))
                    if q in left: left.remove(q); todo.append(q)
        out.append(group)
    return out


def majority(group, labels):
    votes = [sum(labels[p] == k for p in group) for k in range(5)]
    return votes.index(max(votes))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(.1, .5), st.sampled_from(['i2', 'f4']))
def test_measures_against_the_rule(seed, density, dtype):
    rng = np.random.default_rng(seed)
    g = Geometry.from_spacing((3, 6, 6), (3, .5, .5))
    hu = np.where(rng.random(g.shape) < density, rng.integers(129, 133, g.shape), 40).astype(dtype)
    ct = CTVolume(hu, g)
    ref, sub = (MaskVolume(np.where(rng.random(g.shape) < .7, rng.integers(1, 4, g.shape), 0).astype('u1'), g) for _ in range(2))
    groups = flood(hu > 130)
    assert orca_components(ct)[1] == len(groups)
    a, b = ([majority(s, m.data) for s in groups] for m in (ref, sub))
    got = orca_measures(ct, ref, sub)
    for name, hit in (('all', lambda x: x > 0), ('LAD', lambda x: x == 1), ('LCX', lambda x: x == 2), ('RCA', lambda x: x == 3)):
        pairs = [(hit(x), hit(y), len(s)*.75) for x, y, s in zip(a, b, groups)]
        count = [sum(w(x, y) for x, y, _ in pairs) for w in (lambda x, y: x and y, lambda x, y: y and not x, lambda x, y: x and not y)]
        mm3 = [sum(v for x, y, v in pairs if w(x, y)) for w in (lambda x, y: x and y, lambda x, y: y and not x, lambda x, y: x and not y)]
        c = got[name]
        assert (c.tp, c.fp, c.fn) == tuple(count) and np.allclose((c.tp_mm3, c.fp_mm3, c.fn_mm3), mm3)
    seen = majority_labels(ct, ref)
    for s, k in zip(groups, a): assert {int(seen.data[p]) for p in s} == {k}
    assert not seen.data[hu <= 130].any()
    assert not check_orca_mask(ct, seen)
    assert orca_measures(ct, ref, seen) == orca_measures(ct, seen, ref) == orca_measures(ct, ref, ref)


def test_counts():
    a, b = OrcaCounts(1, 2, 3, 4., 5., 6.), OrcaCounts(1, 0, 0, 1., 0., 0.)
    assert a+b == OrcaCounts(2, 2, 3, 5., 5., 6.) and sum([a, b], OrcaCounts()) == a+b
    assert a.sensitivity == 1/4 and a.ppv == 1/3 and a.f1_mm3 == 8/19
    s, p = a.sensitivity_mm3, a.ppv_mm3
    assert a.f1_mm3 == pytest.approx(2*s*p/(s+p))
    missed = OrcaCounts(fn=1, fn_mm3=1.)
    assert (missed.sensitivity, missed.ppv, missed.f1_mm3) == (0, None, 0)


def test_labels():
    g = Geometry.from_spacing((1, 1, 5), (3, .5, .5))
    for k in range(1, 4):
        m = MaskVolume(np.full(g.shape, k, 'u1'), g)
        assert np.array_equal(to_orca_labels(from_orca_labels(m)).data, m.data)
    with pytest.raises(OrcaError): orca_measures(CTVolume(np.zeros(g.shape, 'i2'), g), m, MaskVolume(np.full(g.shape, 7, 'u1'), g))
    with pytest.raises(OrcaError): from_orca_labels(MaskVolume(np.full(g.shape, -1, 'i2'), g))


# the collection

@pytest.fixture(scope='module')
def chest(): return chest_phantom(2, agatston=500., matrix=128, decoys=None)


def test_collection(chest, tmp_path):
    root = write_orcascore(tmp_path/'Challenge_data', [chest, chest], [chest])
    train, test = read_orcascore(root), read_orcascore(root, 'test')
    assert [c.patient for c in train] == ['TRV1P1', 'TRV1P2'] and [c.patient for c in test] == ['TEV1P1'] and test[0].mask is None
    case = pickle.loads(pickle.dumps(train[0]))
    ct, mask = load_ct(case.image), load_mask(case.mask)
    assert np.array_equal(ct.data, chest.ct.data) and ct.geometry.matches(chest.ct.geometry, tol=1e-6)
    assert not check_orca_mask(ct, case.mask.raw()) and set(np.unique(mask.data)) <= {0, 2, 3, 4}
    assert agatston(ct, mask) == pytest.approx(agatston(chest.ct, chest.lesions), rel=.25)
    out = write_orca_submission(mask, tmp_path/'TRV1P1.mhd')
    text = out.read_text()
    assert 'MET_SHORT' in text and 'CompressedData = False' in text and (tmp_path/'TRV1P1.raw').stat().st_size == 2*mask.data.size
    assert np.array_equal(read_metaimage(out, MaskVolume).data, case.mask.raw().data)
    with pytest.raises(OrcaError): write_orca_submission(mask.like(np.full(mask.shape, 5, 'u1')), tmp_path/'x.mhd')
    assert not (tmp_path/'x.mhd').exists()


def test_names_in_the_wild(chest, tmp_path):
    root = write_orcascore(tmp_path, [chest])
    images, ref = root/'Training_set'/'Images', root/'Training_set'/'Reference_standard'
    (root/'Training_set').rename(root/'Training Set')
    images, ref = root/'Training Set'/'Images', root/'Training Set'/'Reference standard'
    (root/'Training Set'/'Reference_standard').rename(ref)
    write_metaimage(chest.ct, images/'TRV1P1CTAI.mhd')
    write_metaimage(chest.ct, images/'VAV2P1CTI.mhd')
    write_metaimage(chest.ct, images/'TRV1P9CTI.mhd')
    write_metaimage(chest.ct, images/'other.mhd')
    for p in list(ref.iterdir()): p.rename(p.with_name(p.name.replace('P1R', 'P1r')))
    (ref/'TRV1P1r.mhd').write_text((ref/'TRV1P1r.mhd').read_text().replace('P1R', 'P1r'))
    got = read_orcascore(tmp_path)
    assert [c.patient for c in got] == ['TRV1P1'] and [(l.place, l.finding.code) for l in got.left_out] == [('TRV1P9', 'NO_REFERENCE')]
    assert got.report[-1].finding.code == 'CONTRAST' and load_mask(got[0].mask).data.any()
    assert [c.patient for c in read_orcascore(tmp_path, 'test')] == ['VAV2P1']


def test_grids_must_agree(chest):
    ct = chest.ct
    mask = MaskVolume(np.zeros(ct.shape, 'u1'), ct.geometry)
    for f in (majority_labels, check_orca_mask):
        with pytest.raises(GeometryError): f(ct, mask[1:])
