"What makes a scan unscoreable, on synthetic patients and on real series"
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from jfr2020.calcium.anatomy import find_anatomy
from jfr2020.ground.errors import NotScoreable
from jfr2020.calcium.heart import find_heart
from jfr2020.calcium.scoreable import METAL_MM3, NOISE_LIMIT_HU, blood, check_scoreable, is_sharp_kernel
from jfr2020.synth.thorax import chest_phantom
from jfr2020.ground.volume import CTVolume, flip

DATA = Path(__file__).resolve().parents[3]/'shared'/'data'


def look(ct, facts=None):
    anatomy = find_anatomy(ct); box = find_heart(ct, anatomy)
    return blood(ct, anatomy, box), lambda: check_scoreable(ct, facts, anatomy, box)


@pytest.fixture(scope='module')
def plain(): return chest_phantom(3, matrix=128, agatston=0, decoys=None, noise=16.)


def test_a_usual_scan_is_scored(plain):
    seen, check = look(plain.ct)
    assert 35 < seen.median_hu < 55 and abs(seen.noise_hu-16) < 2 and seen.bright == 0
    assert {f.code for f in check()} - {'HEART_AT_EDGE'} == {'KVP_UNKNOWN', 'NO_THICKNESS'} # there are no headers


@pytest.mark.parametrize('axis', range(3))
def test_the_order_of_the_array_does_not_matter(plain, axis):
    a, b = look(plain.ct)[0], look(flip(plain.ct, axis))[0]
    assert abs(a.median_hu-b.median_hu) < 1 and abs(a.noise_hu-b.noise_hu) < 1


def test_contrast_is_refused():
    with pytest.raises(NotScoreable, match='CONTRAST'): look(chest_phantom(3, matrix=128, agatston=0, decoys=None, contrast=350.).ct)[1]()


@pytest.mark.parametrize('sd, codes', [(10., set()), (27., {'NOISE'})])
def test_noise_is_measured_and_said(sd, codes):
    seen, check = look(chest_phantom(5, matrix=128, agatston=0, decoys=None, noise=sd).ct)
    assert abs(seen.noise_hu-sd) < .12*sd+1
    assert {f.code for f in check()}-{'HEART_AT_EDGE', 'KVP_UNKNOWN', 'NO_THICKNESS'} == codes


def test_too_much_noise_is_refused():
    case = chest_phantom(5, matrix=128, agatston=0, decoys=None, noise=NOISE_LIMIT_HU*1.4)
    with pytest.raises(NotScoreable, match='NOISE'): look(case.ct)[1]()


def test_metal_in_the_heart_is_refused_and_a_little_is_said(plain):
    at = plain.ct.geometry.to_index([np.mean(plain.truth['heart_box_mm'], 0)])[0].round().astype(int)
    for mm3, ends in ((METAL_MM3/2, 'said'), (METAL_MM3*3, 'refused')):
        n = int(np.ceil(mm3/plain.ct.geometry.voxel_mm3)); hu = plain.ct.data.copy()
        hu[at[0],at[1],at[2]:at[2]+n] = 3071
        _, check = look(CTVolume(hu, plain.ct.geometry))
        if ends == 'said': assert {'METAL','SATURATED'} <= {f.code for f in check()}
        else:
            with pytest.raises(NotScoreable, match='METAL'): check()


def test_a_heart_that_is_cut_is_refused_or_said():
    ct = chest_phantom(3, matrix=128, agatston=0, decoys=None, coverage='truncated').ct
    try: codes = {f.code for f in look(ct)[1]()}
    except NotScoreable as e: codes = {e.code}
    assert codes & {'HEART_AT_EDGE', 'TRUNCATED_HEART', 'NO_HEART'}


BAD = [None, 0., -3., float('nan'), float('inf')] # no voltage and no thickness

@pytest.mark.parametrize('facts, code', [(dict(), None), (dict(kernel='B70f'), 'KERNEL'), (dict(thickness_mm=1.), 'THICKNESS'),
    (dict(thickness_mm=2.5), None), (dict(contrast='agent X'), 'CONTRAST_HINT'),
    *((dict(kvp=v), 'KVP_UNKNOWN') for v in BAD), *((dict(thickness_mm=v), 'NO_THICKNESS') for v in BAD)])
def test_each_header_fact_says_its_own(plain, facts, code):
    facts = SimpleNamespace(**dict(kvp=120., thickness_mm=3.) | facts)
    said = [f for f in look(plain.ct, facts)[1]() if f.code != 'HEART_AT_EDGE']
    assert [f.code for f in said] == ([code] if code else [])
    assert not any(w in f.text for f in said for w in ('nan', 'inf ', '-3'))


@pytest.mark.parametrize('name, sharp', [('B60s', True), ('B31s', False), ('H70h', True), ('SOFT', False), ('LUNG', True), ('', False),
                                         ('FC03', False), ('FC52', True), ('Bl57d', True), ('Sa36f', False), ('C', False)])
def test_kernels_by_name(name, sharp): assert is_sharp_kernel(name) is sharp


def real(name):
    path = DATA/'ct'/name
    if not path.exists(): pytest.skip(f'{path} is not here')
    from jfr2020.dicom.reading import get_dicom_series
    return get_dicom_series(path/'image' if (path/'image').exists() else path) # a reader that fails is a failure here


@pytest.mark.data
def test_the_cut_contrast_series_is_refused():
    ct, series = real('ibsi1_pat1_contrast_crop')
    with pytest.raises(NotScoreable) as e: look(ct, series.facts)[1]()
    assert e.value.code in ('CONTRAST', 'TRUNCATED_HEART')


@pytest.mark.data
@pytest.mark.parametrize('name', ['ricord1a_001012', 'lungdx_A0002_B40f'])
def test_full_chests_without_contrast_are_scored_with_remarks(name):
    ct, series = real(name)
    assert {'THICKNESS','NOT_GATED'} <= {f.code for f in look(ct, series.facts)[1]()}
