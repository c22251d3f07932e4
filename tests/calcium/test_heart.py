"The heart's box: real series read by eye, synthetic patients with known coronaries, and seven ways to lose a heart."
import csv, time

import numpy as np
import pytest

from jfr2020.calcium.anatomy import coarse_ct, find_anatomy, odd_slices
from jfr2020.ground.errors import GeometryError, NotScoreable
from jfr2020.ground.geometry import Geometry
from jfr2020.calcium.heart import SURE, TRIM_MM, WHOLE_MM, find_heart, trim_slices
from jfr2020.calcium.intensity import padding_mask
from jfr2020.synth.thorax import chest_phantom
from jfr2020.ground.volume import CTVolume, crop, flip

SEEDS = (100, 101)
PADS = (-1000, -1024, -2000, -2048, -3024)


def points(mask): return mask.geometry.to_world(np.argwhere(mask.data > 0))


def coronaries(case): return np.concatenate(list(case.truth['coronaries_mm'].values()))


def in_field(ct, pts):
    i = ct.geometry.to_index(pts)
    return pts[((i > -.5) & (i < np.array(ct.shape)-.5)).all(1)]


def patient(seed, **scan):
    "A full chest of 3.9 mm pixels and 6 mm slices"
    return chest_phantom(seed, **{'agatston': 400, 'fov': 'chest', 'coverage': 'chest', 'matrix': 96, 'increment': 6, 'thickness': 6, **scan})


@pytest.fixture(scope='module')
def chests(): return [patient(s) for s in SEEDS]


@pytest.fixture(scope='module')
def chest(chests): return chests[0]


@pytest.fixture(scope='module')
def cardiac():
    "A cardiac scan: 220 mm on the heart"
    return chest_phantom(31, agatston=200, matrix=96, increment=4, thickness=4)


# ---- real series ----------------------------------------------------------------------------------------------------

def reference_boxes(shared):
    "Name -> (2,3) RAS+ mm, read by eye; the file is in the frame of DICOM"
    lo, hi = ('patient_x_mm_min', 'patient_y_mm_min', 'ipp_z_first_mm'), ('patient_x_mm_max', 'patient_y_mm_max', 'ipp_z_last_mm')
    out = {}
    with open(shared/'heart_boxes.csv') as f:
        for r in csv.DictReader(f):
            a, b = (np.array([float(r[k]) for k in ks]) for ks in (lo, hi))
            out[r['series_dir']] = np.array([[-b[0], -b[1], a[2]], [-a[0], -a[1], b[2]]])
    return out


@pytest.mark.parametrize('name', ['ct/ricord1a_001012', 'ct/lungdx_A0002_B40f'])
def test_real_heart_is_held(shared_data, name):
    from jfr2020.dicom.reading import get_dicom_series
    ct, _ = get_dicom_series(shared_data/name)
    want, box, tol = reference_boxes(shared_data)[name], find_heart(ct), np.array([10, 10, 15])
    assert (box.corners_mm[0] <= want[0]+tol).all() and (box.corners_mm[1] >= want[1]-tol).all(), (box, want)
    assert box.size_mm.prod() <= 2.5*(want[1]-want[0]).prod()
    assert box.confidence > SURE
    kept = trim_slices(ct)
    assert kept.start <= box.start[0] and kept.stop >= box.stop[0]
    assert kept.stop-kept.start < .75*ct.shape[0]


def test_real_abdomen_has_no_heart(shared_data):
    from jfr2020.dicom.reading import get_dicom_series
    ct, _ = get_dicom_series(shared_data/'ct/totalseg_example_ct_dicom_noheart')
    with pytest.raises(NotScoreable) as e: find_heart(ct)
    assert e.value.code == 'NO_HEART' and 'mL' in e.value.cause
    kept = trim_slices(ct)
    assert kept.slice == slice(0, ct.shape[0])


def test_real_half_chest_keeps_the_field(shared_data):
    from jfr2020.dicom.reading import get_dicom_series
    ct, _ = get_dicom_series(shared_data/'ct/ibsi1_pat1_contrast_crop')
    box = find_heart(ct)
    assert box.confidence < SURE and box.start[1:] == (0, 0) and box.stop[1:] == ct.shape[1:]


def test_real_angiography_holds_the_heart_mask(shared_data):
    from jfr2020.files.nifti import read_mask, read_nifti_ct
    folder = shared_data/'ct_nifti'/'totalseg_pulmonary_cta'
    ct, heart = read_nifti_ct(folder/'ct_cropped.nii.gz'), read_mask(folder/'heart.nii.gz')
    if ct.geometry.code != 'SPL': ct = ct[tuple(slice(None, None, 1 if a == b else -1) for a, b in zip(ct.geometry.code, 'SPL'))]
    box = find_heart(ct)
    assert box.holds(points(heart)).mean() > .99 and box.confidence > SURE


# ---- synthetic patients ---------------------------------------------------------------------------------------------

def test_every_coronary_is_in_the_box(chests):
    for c in chests:
        a = find_anatomy(c.ct); box = find_heart(c.ct, a)
        assert len(points(c.lesions)) and box.holds(points(c.lesions)).all(), c
        assert box.holds(coronaries(c)).all(), c
        assert np.prod(np.subtract(box.stop, box.start)) <= .25*c.ct.data.size
        assert (box.holds(points(c.heart)).mean() > .97) and box.confidence >= .8


def test_no_lesion_is_ever_trimmed(chests):
    for c in chests:
        kept, d = trim_slices(c.ct), c.ct.geometry.to_index(coronaries(c))[:, 0]
        assert (np.round(d) >= kept.start).all() and (np.round(d) < kept.stop).all(), c
        assert kept.stop-kept.start < c.ct.shape[0]


def held(ct, case):
    "All that is known of the coronaries within the field is in the box"
    box = find_heart(ct)
    assert box.holds(in_field(ct, points(case.lesions))).all() and box.holds(in_field(ct, coronaries(case)), margin=.5).all()
    return box


def rounded(ct, value=-2048):
    "The scan in a round field, corners filled with `value`"
    n, m = ct.shape[1:]
    h, w = np.mgrid[-1:1:n*1j, -1:1:m*1j]
    return ct.like(np.where(h**2+w**2 < 1.02, ct.data, value).astype('i2'))


def noisy(ct, sd=60):
    return ct.like((ct.data+np.random.default_rng(0).normal(0, sd, ct.shape)).clip(-1024, 3071).astype('i2'))


def thick(ct):
    n = ct.shape[0]//2
    return CTVolume(ct.data[:2*n].reshape(n, 2, *ct.shape[1:]).mean(1).astype('f4'), ct.geometry.sliced((.5, 0, 0), (2, 1, 1), (n, *ct.shape[1:])))


def narrow(ct): k = ct.shape[1]//8; return ct[:, k:-k, k:-k]


def lower_half_missing(ct): return ct[ct.shape[0]//2:]


KINDS = [lambda ct: ct, rounded, noisy, thick]


@pytest.mark.parametrize('kind', [*KINDS, narrow, lower_half_missing, lambda ct: rounded(narrow(ct))])
def test_cardiac_fields_keep_their_coronaries(cardiac, kind):
    ct = kind(cardiac.ct); held(ct, cardiac)
    assert trim_slices(ct).slice == slice(0, ct.shape[0])


@pytest.mark.parametrize('kind', [*KINDS, lambda ct: thick(noisy(rounded(ct)))])
def test_chests_of_all_kinds(chest, kind):
    ct = kind(chest.ct); box = held(ct, chest)
    assert np.prod(np.subtract(box.stop, box.start)) <= .25*ct.data.size


@pytest.mark.parametrize('fov', ['chest', 'cardiac'])
def test_contrast_keeps_the_coronaries(fov):
    held((c := chest_phantom(31, contrast=350., fov=fov, coverage=fov, matrix=64, increment=5, thickness=5)).ct, c)


@pytest.mark.slow
def test_many_patients():
    for s in range(200, 224):
        c = patient(s, noise=(16, 30, 60)[s % 3]); box, kept = held(c.ct, c), trim_slices(c.ct)
        d = c.ct.geometry.to_index(coronaries(c))[:, 0].round()
        assert (d >= kept.start).all() and (d < kept.stop).all() and np.prod(np.subtract(box.stop, box.start)) <= .25*c.ct.data.size, s
        c = chest_phantom(s, matrix=96); held(c.ct, c)


def test_no_heart_is_said(chest):
    belly = chest_phantom(31, fov='chest', coverage='abdomen', matrix=64, increment=6, thickness=6).ct
    top = chest.ct[int(find_heart(chest.ct).stop[0])+2:] # neck and apices only
    for ct, why in ((belly, 'lungs hold'), (top, 'windpipe|carina and diaphragm|cm2|lungs hold')):
        with pytest.raises(NotScoreable, match=why) as e: find_heart(ct)
        assert e.value.code == 'NO_HEART' and e.value.fix
        assert trim_slices(ct).slice == slice(0, ct.shape[0])


def test_the_box_is_the_patients(chest):
    "Array axes, array type and a shift of the whole scan change nothing in the patient"
    box = find_heart(chest.ct)
    for k in range(3): assert np.allclose(find_heart(flip(chest.ct, k)).corners_mm, box.corners_mm)
    assert np.allclose(find_heart(CTVolume(chest.ct.data.astype('f4'), chest.ct.geometry)).corners_mm, box.corners_mm)
    A = chest.ct.geometry.affine.copy(); A[:3, 3] += [100, -50, 700]
    assert np.allclose(find_heart(CTVolume(chest.ct.data, Geometry(chest.ct.shape, A))).corners_mm, box.corners_mm+[100, -50, 700])


def test_reformats_are_refused(chest):
    A = chest.ct.geometry.affine[:, [1, 0, 2, 3]]
    with pytest.raises(GeometryError, match='axial') as e: find_anatomy(CTVolume(chest.ct.data, Geometry(chest.ct.shape, A)))
    assert e.value.code == 'NOT_AXIAL'


def test_strange_volumes_do_not_crash():
    for shape in ((1, 8, 8), (1, 1, 1), (3, 40, 1)):
        for hu in (-1000, 40, 3000):
            v = CTVolume(np.full(shape, hu, 'i2'), Geometry.from_spacing(shape, (3, 1, 1)))
            with pytest.raises(NotScoreable): find_heart(v)
            assert trim_slices(v).slice == slice(0, shape[0])
    noise = CTVolume(np.random.default_rng(0).integers(-1024, 3071, (20, 64, 64)).astype('i2'), Geometry.from_spacing((20, 64, 64), (5, 5, 5)))
    with pytest.raises(NotScoreable): find_heart(noise)


# ---- seven ways in which a heart was lost before --------------------------------------------------------------------

def test_D1_padding_of_any_value_is_the_same_scan(chest):
    first = rounded(chest.ct, PADS[0])
    mask, box, kept, hu = padding_mask(first), find_heart(first), trim_slices(first), first.data[~padding_mask(first)]
    assert .05 < mask.mean() < .3
    for p in PADS[1:]:
        v = rounded(chest.ct, p)
        assert (padding_mask(v) == mask).all() and (v.data[~mask] == hu).all()
        assert np.allclose(find_heart(v).corners_mm, box.corners_mm) and trim_slices(v).slice == kept.slice


def test_D2_D3_nothing_changes_the_HU(chest):
    "Finding is looking: one HU scale before and after, and a crop of the image is a crop of its mask"
    before = chest.ct.data.copy()
    box = find_heart(chest.ct); trim_slices(chest.ct)
    assert (chest.ct.data == before).all()
    ct, m = chest.ct[box.slices], chest.lesions[box.slices]
    assert (ct.data[m.data > 0] == before[chest.lesions.data > 0]).all()


def test_D4_cropped_twice_is_cropped_once(chests):
    for c in chests:
        kept = trim_slices(c.ct); once = c.ct[kept.slice]
        assert once.shape[0] == kept.stop-kept.start
        assert trim_slices(once).slice == slice(0, once.shape[0])


@pytest.mark.parametrize('fault', ['air', 'metal', 'noise', 'other slice'])
def test_D5_one_odd_slice_shortens_nothing(chest, fault):
    kept, box, n = trim_slices(chest.ct), find_heart(chest.ct), chest.ct.shape[0]
    at = [kept.start, (box.start[0]+box.stop[0])//2, box.stop[0]]
    for d in at:
        data = chest.ct.data.copy()
        data[d] = {'air': -1000, 'metal': 3000, 'noise': np.random.default_rng(0).integers(-1000, 1000, data[d].shape), 'other slice': data[(d+n//2) % n]}[fault]
        got, d = trim_slices(chest.ct.like(data)), chest.ct.geometry.to_index(coronaries(chest))[:, 0].round()
        moved = max(abs(got.start-kept.start), abs(got.stop-kept.stop))*chest.ct.spacing[0]
        assert moved <= TRIM_MM+chest.ct.spacing[0] and got.confidence > SURE
        assert (d >= got.start).all() and (d < got.stop).all() and find_heart(chest.ct.like(data)).holds(coronaries(chest)).all()


def test_D6_the_lowest_heart_slice_survives(chests):
    for c in chests:
        low = points(c.heart)[:, 2].min()
        kept = trim_slices(c.ct); bottom = c.ct.geometry.to_world([[kept.start-.5, 0, 0]])[0, 2]
        assert bottom <= low and find_heart(c.ct).corners_mm[0, 2] <= low+6, c # one slice


def test_D6_a_narrow_field_is_never_empty(cardiac):
    ct = narrow(narrow(cardiac.ct))
    kept, box = trim_slices(ct), find_heart(ct)
    assert kept.slice == slice(0, ct.shape[0]) and np.prod(np.subtract(box.stop, box.start)) > .2*ct.data.size


@pytest.mark.parametrize('shift', [(35, 0), (-35, 20), (0, -40)])
def test_D7_a_heart_off_the_centre_is_followed(chest, shift):
    "The patient lies anywhere in the field: the array moves, the box with it"
    box, (w, h) = find_heart(chest.ct), np.round(np.array(shift)/chest.ct.spacing[1]).astype(int)
    moved = crop(chest.ct, (0, h, w), np.add(chest.ct.shape, (0, h, w)))
    got = find_heart(moved)
    assert got.holds(coronaries(chest)).all() and np.abs(got.corners_mm-box.corners_mm).max() < 12


# ---- pieces ---------------------------------------------------------------------------------------------------------

def test_coarse_grid_keeps_positions_and_means():
    data = np.random.default_rng(0).integers(-1000, 1000, (11, 35, 37)).astype('i2')
    v = CTVolume(data, Geometry.from_spacing(data.shape, (1.5, .7, .7), centre=(5, 6, 7)))
    c = coarse_ct(v)
    step = np.round(np.array(c.spacing)/v.spacing).astype(int)
    assert step.tolist() == [2, 4, 4] and np.allclose(c.data[0, 0, 0], data[:2, :4, :4].mean(), atol=.01)
    assert np.allclose(c.geometry.to_world([[0, 0, 0]]), v.geometry.to_world([[.5, 1.5, 1.5]]))


def test_odd_slices_only_where_neighbours_agree():
    rng = np.random.default_rng(0)
    data = rng.normal(0, 30, (20, 16, 16)).astype('f4')
    assert odd_slices(data) == [] and odd_slices(data[:2]) == []
    data[7] += 500; assert odd_slices(data) == [7]
    data[8] += 500; assert odd_slices(data) == [] # two alike: not a broken slice


def test_masks_do_not_overlap(chest):
    a = find_anatomy(chest.ct)
    parts = [a.lungs, a.airway, a.mediastinum, a.bone]
    assert max(sum((p.data > 0).astype(int) for p in parts).ravel()) == 1
    assert all(not (p.data > 0)[a.body.data == 0].any() for p in parts)
    assert not (a.spine.data > 0)[a.bone.data == 0].any()


def test_sixty_full_slices_in_a_second(chest):
    "Processor time, on one core, least of three; a chest of 60 slices of 512 x 512"
    c = chest.ct
    big = np.repeat(np.repeat(c.data, 6, 1), 6, 2)[:,32:544,32:544]
    big = np.concatenate([big, np.repeat(big[-1:], max(0, 60-len(big)), 0)])[:60]
    big = CTVolume(big, Geometry.from_spacing(big.shape, (6, c.spacing[1]/6, c.spacing[2]/6)))
    took = []
    for _ in range(3):
        t = time.process_time(); box = find_heart(big); took.append(time.process_time()-t)
    assert box.confidence > SURE and min(took) < 1., took


def test_whole_is_at_least_what_a_heart_needs():
    "What is kept of any scan is never kept again in part: the bound that makes trimming idempotent"
    from jfr2020.calcium.heart import _ABOVE_MM, _APART_MM, _BELOW_LEFT_MM, _BELOW_RIGHT_MM, _CARINA_MM
    assert max(_CARINA_MM[1], _ABOVE_MM)+max(_BELOW_RIGHT_MM, _APART_MM+_BELOW_LEFT_MM)+2*TRIM_MM < WHOLE_MM
