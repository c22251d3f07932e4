"The fast score equals the definition to the last digit; sums add up; what is dark never counts; classes have no hole."
import csv, math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from jfr2020.calcium.score import (AGATSTON, VESSELS, Calibration, ScoreRule, agatston, agatston_by_definition, calcium_score,
                             label_lesions, vessel_labels)
from jfr2020.calcium.categories import SCHEMES, cac_drs, risk_category
from jfr2020.ground.errors import ConfigError, GeometryError
from jfr2020.ground.geometry import Geometry
from jfr2020.calcium.variants import GRANI, KVP_RANGE, RULES, thresholds
from jfr2020.ground.volume import CTVolume, MaskVolume, flip

REAL = Path(__file__).resolve().parents[3]/'shared'/'data'
MANY = settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
LEVELS = np.array([-1024, 0, 100, 129, 129.5, 130, 130.5, 131, 199, 199.9, 200, 299, 300, 399, 400, 401, 3071])


@st.composite
def rules(draw):
    unit = draw(st.sampled_from(['lesion', 'lesion', 'fragment', 'object']))
    small = dict(min_area_mm2=draw(st.sampled_from([0, .5, 1., 2.])), round_area=draw(st.booleans()),
                 min_pixels=draw(st.integers(1, 4))) if unit == 'lesion' else \
            dict(min_area_mm2=0, min_voxels=draw(st.integers(1, 5)), over_mm3=draw(st.sampled_from([0., 1., 2.])))
    return ScoreRule('drawn', 'a test', threshold_hu=draw(st.sampled_from([128, 129.5, 130, 130.1, 145])),
                     strict=draw(st.booleans()),
                     edges_hu=draw(st.sampled_from([(200, 300, 400), (199, 299, 399), (250.5,), ()])), unit=unit,
                     connectivity=draw(st.sampled_from([4, 8] if unit == 'lesion' else [6, 26])),
                     slice_rule=draw(st.sampled_from(['increment', 'thickness', 'none'])), **small)


@st.composite
def scans(draw):
    "A random CT on a random axial grid and a random mask: sparse or dense, plain noise or few levels, int16 or float32"
    shape = tuple(draw(st.integers(1, n)) for n in (5, 9, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32-1)))
    hu = rng.choice(LEVELS, shape) if draw(st.booleans()) else rng.normal(100, 150, shape)
    hu[rng.random(shape) < draw(st.sampled_from([0, .3, .7]))] = -50
    dtype = draw(st.sampled_from([np.int16, np.float32]))
    pixel = draw(st.sampled_from([(.5, .5), (.43, .43), (.7, .5), (.3333, .3333)]))
    spacing = (draw(st.sampled_from([.6, 1.5, 2.5, 3.])), *pixel)
    g = Geometry.from_spacing(shape, spacing, centre=(5,-7,9))
    labels = rng.choice(draw(st.sampled_from([[1], [0, 2], [1, 2, 3, 4], [0, 1, 4, 5, 77]])), shape)
    return CTVolume(hu.astype(dtype), g), MaskVolume(labels.astype(np.uint8), g)


@MANY
@given(scans(), rules())
def test_fast_equals_definition(scan, rule):
    assert agatston(*scan, rule, 2.) == agatston_by_definition(*scan, rule, 2.)
    assert calcium_score(*scan, rule, thickness_mm=2.).agatston == agatston_by_definition(*scan, rule, 2.)


@MANY
@given(scans(), rules())
def test_sums_add_up(scan, rule):
    ct, mask = scan
    s = calcium_score(ct, mask, rule, thickness_mm=2., calibration=Calibration(.00077, 'a test'))
    for parts in (s.lesions, s.vessels.values()):
        for what in ('agatston', 'volume_mm3', 'mass_mg'):
            total = math.fsum(getattr(p, what) for p in parts)
            assert math.isclose(total, getattr(s, what), rel_tol=1e-9, abs_tol=1e-9)
    assert sum(v.lesions for v in s.vessels.values()) == len(s.lesions)
    assert [l.id for l in s.lesions] == list(range(1, len(s.lesions)+1))
    assert all(a.agatston >= b.agatston for a,b in zip(s.lesions, s.lesions[1:]))
    assert (s.agatston == 0) == (not s.lesions) and (s.density is None) == (not s.lesions)


@MANY
@given(scans(), rules())
def test_lesions_are_what_the_table_says(scan, rule):
    from scipy import ndimage as ndi
    ct, mask = scan
    s, painted = calcium_score(ct, mask, rule, thickness_mm=2.), label_lesions(ct, mask, rule).data
    assert painted.max(initial=0) == len(s.lesions)
    assert (ct.data[painted > 0] >= rule.first(ct.data.dtype)).all() and mask.data[painted > 0].all()
    for l in s.lesions:
        here = painted == l.id
        d = np.flatnonzero(here.any((1, 2)))
        assert {VESSELS[k] for k in vessel_labels(mask.data)[here]} == {l.vessel}
        assert (l.voxels, l.slices, l.peak_hu) == (here.sum(), (d[0], d[-1]), ct.data[here].max())
        assert math.isclose(l.mean_hu, ct.data[here].astype(float).mean(), rel_tol=1e-9)
        assert np.allclose(l.centre_mm, ct.geometry.to_world(np.argwhere(here)).mean(0))
        assert ndi.label(here, np.ones((3, 3, 3)))[1] == 1
    if rule.unit == 'lesion': # no two lesions of a vessel touch
        for v in VESSELS: assert ndi.label((painted > 0) & (vessel_labels(mask.data) == v), np.ones((3, 3, 3)))[1] == \
            sum(VESSELS[v] == l.vessel for l in s.lesions)


@MANY
@given(scans())
def test_where_the_array_begins_does_not_matter(scan):
    ct, mask = scan
    want = calcium_score(ct, mask)
    for axis in range(3):
        got = calcium_score(flip(ct, axis), flip(mask, axis))
        assert (got.agatston, got.volume_mm3, len(got.lesions)) == (want.agatston, want.volume_mm3, len(want.lesions))
    wider = ct.geometry.sliced((-1,)*3, (1,)*3, np.array(ct.shape)+2)
    everywhere = CTVolume(np.pad(ct.data, 1, constant_values=3000), wider)
    padded = MaskVolume(np.pad(mask.data, 1), everywhere.geometry)
    assert agatston(everywhere, padded) == want.agatston # bright all around, but outside of the mask


@MANY
@given(scans(), st.integers(-1024, 129))
def test_below_the_threshold_is_nothing(scan, hu):
    ct, mask = scan
    dark = CTVolume(np.where(ct.data < 130, hu, ct.data).astype(ct.data.dtype), ct.geometry)
    a, b = calcium_score(ct, mask), calcium_score(dark, mask)
    assert (a.agatston, a.volume_mm3, a.lesions) == (b.agatston, b.volume_mm3, b.lesions)


@pytest.mark.parametrize('dtype', ['i2', 'f4'])
def test_no_touching_across_rows_and_slices(dtype):
    "The end of a row is far from the start of the next, though they are neighbours in memory"
    g = Geometry.from_spacing((2, 6, 6), (3, 1, 1))
    a = np.full(g.shape, 0, dtype); a[0,1,5] = a[0,2,0] = a[0,5,5] = a[1,0,0] = 500
    ct, m = CTVolume(a, g), MaskVolume(np.ones(g.shape, 'u1'), g)
    assert len(calcium_score(ct, m).lesions) == 4


def test_connectivity_decides():
    g = Geometry.from_spacing((1, 6, 6), (3, .8, .8))
    a = np.zeros(g.shape, 'i2'); a[0,1,1] = a[0,2,2] = 250 # 0.64 mm2 each, 1.28 together
    ct, m = CTVolume(a, g), MaskVolume(np.ones(g.shape, 'u1'), g)
    assert math.isclose(agatston(ct, m), 1.28*2) and agatston(ct, m, replace(AGATSTON, connectivity=4)) == 0


def test_far_outside_the_range_of_int16():
    g = Geometry.from_spacing((1, 4, 4), (3, 1, 1))
    ct, m = CTVolume(np.full(g.shape, 32767, 'i2'), g), MaskVolume(np.ones(g.shape, 'u1'), g)
    assert agatston(ct, m, replace(AGATSTON, threshold_hu=40000, edges_hu=())) == 0
    assert math.isclose(agatston(ct, m), 64)


def test_float_hu_that_are_not_numbers_are_refused():
    g = Geometry.from_spacing((1, 4, 4), (3, 1, 1))
    a = np.full(g.shape, 200, 'f4'); a[0,2,2] = np.nan
    with pytest.raises(GeometryError, match='NOT_FINITE'):
        calcium_score(CTVolume(a, g), MaskVolume(np.ones(g.shape, 'u1'), g))
    calcium_score(CTVolume(a, g), MaskVolume((a == 200).astype('u1'), g)) # outside of the mask nobody asks


def test_isotropic_volume_of_cubic_voxels_is_the_volume():
    g = Geometry.from_spacing((9, 9, 9), (.5, .5, .5))
    a = np.random.default_rng(3).integers(0, 400, g.shape).astype('i2')
    s = calcium_score(CTVolume(a, g), MaskVolume(np.ones(g.shape, 'u1'), g), replace(AGATSTON, min_area_mm2=0))
    assert math.isclose(s.volume_mm3, s.volume_iso_mm3, rel_tol=1e-9)


def test_isotropic_volume_stays_out_of_bone_beside_the_mask():
    g = Geometry.from_spacing((5, 8, 8), (3, .5, .5))
    a = np.zeros(g.shape, 'i2'); a[1,2:5,2:5] = 300; a[2] = 900
    m = np.zeros(g.shape, 'u1'); m[1] = 2
    ct, mask = CTVolume(a, g), MaskVolume(m, g)
    thick = calcium_score(ct, mask).volume_iso_mm3/(9*.25)
    assert thick <= 1.5 + 3*(1-130/300) + .5 # half a slice towards the bone, less than a slice away from it


def by_interpolation(ct, counted):
    "mm3 on cubic voxels by scipy, without neighbours that do not count"
    from scipy import ndimage as ndi
    dz, h, _ = ct.spacing
    z = ((np.arange(round(len(ct.data)*dz/h))+.5)*h/dz-.5).clip(0, len(ct.data)-1)
    at = np.stack(np.meshgrid(z, *(np.arange(n) for n in ct.shape[1:]), indexing='ij'))
    near = ndi.map_coordinates(counted.astype(float), at, order=1) > 0
    return (near & (ndi.map_coordinates(ct.data.astype(float), at, order=1) >= 130-1e-9)).sum()*h**3


def test_isotropic_volume_equals_plain_interpolation():
    g = Geometry.from_spacing((7, 16, 16), (2.5, .7, .7))
    z, y, x = np.ogrid[-3:4, -8:8, -8:8]
    ct = CTVolume((900*np.exp(-z*z/2-y*y/9-x*x/12)).round().astype('i2'), g)
    mask = MaskVolume(np.ones(g.shape, 'u1'), g)
    s = calcium_score(ct, mask, replace(AGATSTON, min_area_mm2=0))
    assert math.isclose(s.volume_iso_mm3, by_interpolation(ct, ct.data >= 130), rel_tol=1e-9)


@MANY
@given(scans(), st.sampled_from(sorted(RULES)))
def test_named_rules_equal_definition(scan, name):
    assert agatston(*scan, RULES[name], 2.5) == agatston_by_definition(*scan, RULES[name], 2.5)


@given(st.floats(*KVP_RANGE), st.floats(*KVP_RANGE))
def test_thresholds_fall_with_voltage_and_rise_with_weight(a, b):
    low, high = (thresholds(kv) for kv in sorted((a, b)))
    for p,q in zip((low.threshold_hu, *low.edges_hu), (high.threshold_hu, *high.edges_hu)): assert p >= q
    assert (np.diff((low.threshold_hu, *low.edges_hu)) > 0).all() and low.of().kvp == min(a, b)
    assert bool(thresholds(a).findings) == (a not in GRANI) # never silent between or beyond the rows


EDGES = dict(jfr2020=[0, 1, 10, 100, 400], clearread=[0, 1, 100, 400], cac_drs=[0, 1, 100, 300]) # where a class begins
LASTS = dict(rumberger=[0, 10, 100, 400], utrecht_ldct=[10, 100, 1000], deepcac=[0, 100, 300], ai_cac=[0, 100, 400],
             hl7lt=[0, 10, 100, 400, 1000]) # where a class ends


def test_every_scheme_is_tested(): assert set(EDGES) | set(LASTS) == set(SCHEMES)


@pytest.mark.parametrize('name', EDGES)
def test_classes_that_begin_at_their_edge(name):
    assert risk_category(0, name).index == 0 and risk_category(1e-9, name).index == 1
    for k,e in enumerate(EDGES[name]):
        assert risk_category(e, name).index == k
        assert risk_category(e+.5, name).index == max(k, 1)
        if k > 1: assert risk_category(e-.5, name).index == risk_category(np.nextafter(e, 0), name).index == k-1
    assert risk_category(.5, name).index == 1


@pytest.mark.parametrize('name', LASTS)
def test_classes_that_end_at_their_edge(name):
    for k,e in enumerate(LASTS[name]):
        assert risk_category(e, name).index == k
        assert risk_category(e+.5, name).index == risk_category(np.nextafter(e, np.inf), name).index == k+1
        if e: assert risk_category(e-.5, name).index == k


@given(st.floats(0, 1e7), st.floats(0, 1e7), st.sampled_from(sorted(SCHEMES)))
def test_more_calcium_is_no_lower_class(a, b, name):
    low, high = sorted((a, b))
    c = risk_category(low, name)
    assert c.index <= risk_category(high, name).index and c.label == SCHEMES[name].labels[c.index]


@given(st.floats(0, 1e7), st.sampled_from(sorted(SCHEMES)))
def test_a_score_lies_in_its_interval(score, name):
    text = SCHEMES[name].interval(risk_category(score, name).index)
    if text == '{0}': assert score == 0; return
    low, high = (float(o) for o in text[1:-1].split(','))
    assert (low < score if text[0] == '(' else low <= score) and (score < high if text[-1] == ')' else score <= high)


def test_cac_drs_refuses_what_cannot_be():
    for score,n in ((0, 1), (5, 0), (5, 5), (5, 1.5)):
        with pytest.raises(ConfigError): cac_drs(score, n)


@pytest.mark.skipif(not (REAL/'calcium_slices.csv').exists(), reason='no real slices beside the repository')
def test_real_plaques_have_the_area_and_peak_that_was_read():
    "Components of real slices: centre, area and peak as listed beside them"
    import pydicom
    rows = list(csv.DictReader((REAL/'calcium_slices.csv').open()))
    for name in {r['file'] for r in rows}:
        ds = pydicom.dcmread(REAL/name)
        hu = (ds.pixel_array*float(ds.RescaleSlope)+float(ds.RescaleIntercept)).astype(np.int16)[None]
        g = Geometry.from_spacing(hu.shape, (float(ds.SliceThickness), *(float(p) for p in ds.PixelSpacing)))
        ct, mask = CTVolume(hu, g), MaskVolume(np.ones(hu.shape, np.uint8), g)
        lesions = calcium_score(ct, mask, replace(AGATSTON, min_area_mm2=0)).lesions
        at = g.to_index([l.centre_mm for l in lesions])[:,1:]
        assert agatston(ct, mask) == agatston_by_definition(ct, mask)
        for r in (r for r in rows if r['file'] == name):
            k = int(np.abs(at-[float(r['row']), float(r['col'])]).max(1).argmin())
            assert np.abs(at[k]-[float(r['row']), float(r['col'])]).max() <= 3 # centre of mass or of the box
            assert abs(lesions[k].volume_mm3/g.spacing[0] - float(r['area_mm2_ge130HU'])) <= .06
            assert lesions[k].peak_hu == float(r['peak_HU'])
