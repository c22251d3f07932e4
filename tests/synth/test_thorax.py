"The synthetic chest: same seed same scan, calcium where and as much as it was asked for, and every option does what it says."
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jfr2020.synth.body import Physique, draw_physique, make_pipes, make_trunk
from jfr2020.calcium.score import AGATSTON, calcium_score
from jfr2020.synth.deposits import DECOYS, Deposit, cover, density_hu, draw_agatston
from jfr2020.ground.errors import ConfigError
from jfr2020.synth.heart import make_coronaries, make_heart
from jfr2020.synth.shapes import Ellipsoid, Tube, blend
from jfr2020.synth.thorax import Scan, VESSEL_LABELS, chest_phantom, make_patient, make_raster
from jfr2020.ground.volume import OUTSIDE

SMALL = dict(matrix=64, increment=6., thickness=6.)


@pytest.fixture(scope='module')
def case(): return chest_phantom(3, agatston=300, matrix=160)


def patients(n=5): return [Physique(), Physique(sex='F', width=.86, depth=.86, height=.88, heart_scale=.88),
                           *[draw_physique(np.random.default_rng(k)) for k in range(n)]]


# --- solids

@given(st.tuples(*[st.floats(-60, 60)]*3), st.tuples(*[st.floats(5, 40)]*3))
@settings(max_examples=100, deadline=None)
def test_ellipsoid_sign(p, r):
    "The distance is negative exactly where the defining quadratic is below 1, and no longer than the straight way to the middle"
    q = sum((a/b)**2 for a,b in zip(p, r))
    d = float(Ellipsoid((0,0,0), r).distance(*(np.float32(v) for v in p)))
    if abs(q-1) > 1e-3: assert (d < 0) == (q < 1)
    if np.ptp(r) == 0: assert abs(d-(np.linalg.norm(p)-r[0])) < 1e-2


def test_blend_is_at_least_the_union():
    a, b = np.random.default_rng(0).normal(0, 10, (2,1000))
    assert (blend(a, b, 8.) <= np.minimum(a, b)).all() and (blend(a, b, 8.) >= np.minimum(a, b)-2).all()


# --- anatomy, over the population

def test_coronaries_lie_on_every_heart():
    for a in patients():
        heart, aorta = make_heart(a), make_pipes(a)[0]['aorta']
        arteries = make_coronaries(heart, aorta)
        for name,t in arteries.items():
            if name == 'LM': continue
            p = t.points[20:].T
            assert heart.muscle(*p).min() > -.5 and heart.pericardium(*p).max() < 1, (name, a)
        lad, lcx, rca = (arteries[n].points for n in ('LAD','LCX','RCA'))
        assert (lad[:,0] < 0).all() # on the patient's left
        assert lad[:,2].min() < lad[0,2]-40 and lad[:,0].min() < lad[0,0]-25 # to the apex: down and left
        assert rca[:,0].max() > 5 > lad[:,0].max() # on the right
        assert lcx[:,1].min() < heart.middle[1]-20 # at the back


def test_coronaries_leave_the_aorta_and_do_not_come_back():
    for a in patients(12):
        whole = make_pipes(a)[0]['aorta']; top = whole.points[:,2].argmax()
        aorta = Tube(whole.points[:top], whole.radius[:top]) # the ascending part
        for name,t in make_coronaries(make_heart(a), whole).items():
            off = (np.linalg.norm(t.points[:,None]-aorta.points, axis=-1)-aorta.radius).min(1)
            if name in ('LM','RCA'): # the ostium is on the wall, above the valve, and on its own side
                assert abs(off[0]) < .4 and t.points[0,2] > aorta.points[0,2]+5
                assert (t.points[0,0] < aorta.points[0,0]) == (name == 'LM')
            assert off[8:].min(initial=99) > 2 and (name != 'RCA' or off[40:].min(initial=99) > 8), (name, a)


def test_heart_apex_points_left_front_down():
    for a in patients():
        u = make_heart(a).axes[0]
        assert u[0] < -.4 and u[1] > .2 and u[2] < -.3


def test_heart_is_inside_the_chest():
    for a in patients():
        heart, trunk = make_heart(a), make_trunk(a)
        x, y = np.linspace(-110, 80, 60)[None], np.linspace(-70, 100, 60)[:,None]
        for z in np.linspace(heart.bounds[0][2], heart.bounds[1][2], 9):
            out = (heart.pericardium(x, y, z) < 0) & (trunk.cage.distance(x, y, z) > 2)
            assert out.mean() < .01, (z, a)


def test_population_has_its_zeros_and_its_tail():
    rng = np.random.default_rng(1)
    for sex,zero,p90 in (('M', .24, 557), ('F', .45, 139.8)):
        s = np.array([draw_agatston(rng, sex) for _ in range(8000)])
        assert abs((s==0).mean()-zero) < .02 and .8 < np.percentile(s, 90)/p90 < 1.25


# --- the scan

def test_same_seed_same_scan():
    a, b, c = (chest_phantom(s, agatston=50, **SMALL) for s in (7,7,8))
    assert (a.ct.data == b.ct.data).all() and (a.lesions.data == b.lesions.data).all()
    assert a.ct.shape != c.ct.shape or (a.ct.data != c.ct.data).any()
    assert a.truth['plaques'] == b.truth['plaques'] and a.patient.physique == b.patient.physique


def test_axes_of_the_scan(case):
    "Liver low and right, aorta left of the spine, lungs on both sides: the image is not mirrored"
    at = lambda p: tuple(case.ct.geometry.to_index([p])[0].round().astype(int))
    clean, a = case.clean.data, case.patient
    z = a.heart.middle[2]
    aorta = a.pipes['aorta'].points; aorta = aorta[np.abs(aorta[:,2]-z) < 2]
    aorta = aorta[aorta[:,1] < -20].mean(0)
    assert abs(clean[at((*aorta[:2], z))]-40) < 8 and aorta[0] < 0
    assert clean[at((-aorta[0]+30, aorta[1]+40, z))] < -600 # mirrored, it would be there
    assert case.ct.geometry.code == 'SPL'


def test_lesions_belong_to_their_artery(case):
    g, low_high = case.lesions.geometry, np.array(case.truth['heart_box_mm'])
    names = {v: k for k,v in VESSEL_LABELS.items()}
    found = set(np.unique(case.lesions.data)) - {0}
    assert found
    for label in found:
        p = g.to_world(np.argwhere(case.lesions.data==label))
        line = case.truth['coronaries_mm'][names[label]]
        near = np.linalg.norm(p[:,None]-line[None,::4], axis=-1).min(1)
        assert near.max() < 9 # radius 2.3, bead 1.7, half a slice, blur
        assert ((p > low_high[0]) & (p < low_high[1])).all()


def test_lesions_reach_the_threshold_and_add_up(case):
    t = case.truth['threshold']
    assert t == AGATSTON.threshold_hu == density_hu(100)
    assert (case.clean.data[case.lesions.data>0] >= t).all()
    assert sum(q['voxels'] for q in case.truth['plaques']) == (case.lesions.data>0).sum()
    assert sum(q['voxels'] for q in case.truth['decoys']) == (case.decoys.data>0).sum()
    assert not ((case.lesions.data>0) & (case.decoys.data>0)).any()


@pytest.mark.parametrize('target,tol', [(0,0), (30,.4), (150,.3), (600,.25), (1500,.25)])
def test_score_is_about_the_target(target, tol):
    case = chest_phantom(11, agatston=target, matrix=128, decoys=None)
    got = calcium_score(case.clean, case.lesions).agatston
    assert abs(got-target) <= tol*target


def test_zero_has_no_calcium_near_the_arteries():
    "Noise-free, nothing inside the pericardium reaches the threshold, in any patient"
    for seed in (0, 2, 3):
        c = chest_phantom(seed, agatston=0, decoys=None, **SMALL)
        assert not c.lesions.data.any() and c.mass_mg == 0 and not c.truth['plaques']
        assert c.clean.data[c.heart.data>0].max() < c.truth['threshold']


def test_noise_alone_changes_little():
    "A zero patient scanned with 16 HU of noise: few voxels of the heart reach the threshold"
    c = chest_phantom(2, agatston=0, decoys=None, matrix=128)
    inside = c.ct.data[c.heart.data>0]
    assert (inside >= c.truth['threshold']).mean() < 1e-4


def test_mass_is_preserved():
    "What a plaque adds to the image, over all voxels, is its volume times its HU over what it replaced"
    ball = Deposit('LAD', Tube([[-45,36,20]], [3.]), 800.)
    kw = dict(matrix=160, decoys=None, noise=0, agatston=0, physique=Physique(), coverage=(0,45))
    with_, without = chest_phantom(0, plaques=(ball,), **kw), chest_phantom(0, plaques=(), **kw)
    added = float((with_.clean.data.astype(float)-without.clean.data).sum())*with_.ct.geometry.voxel_mm3
    assert ball.volume_mm3*(800-50) < added*1.02 and added < ball.volume_mm3*(800+100)*1.02
    assert with_.truth['plaques'][0]['mass_mg'] == pytest.approx(ball.volume_mm3*800/1.3/1000, rel=1e-3)


# --- options

def test_protocol_options():
    c = chest_phantom(0, agatston=0, matrix=64, increment=1.5, thickness=3, fov=200, coverage=(0,30))
    assert c.ct.spacing == pytest.approx((1.5, 200/64, 200/64)) and c.ct.data.dtype == np.int16
    chest = chest_phantom(0, agatston=0, fov='chest', coverage='chest', matrix=48, increment=12., thickness=6.)
    assert chest.ct.spacing[1]*48 == pytest.approx(370) and chest.ct.shape[0]*12 > 280
    cut = chest_phantom(0, agatston=0, coverage='truncated', **SMALL)
    assert 0 < cut.heart.data.sum() < .8*chest_phantom(0, agatston=0, **SMALL).heart.data.sum()
    box = chest_phantom(0, agatston=0, coverage=(-20,40), **SMALL)
    assert box.ct.shape[0] == 10


def test_abdomen_has_no_heart():
    c = chest_phantom(0, agatston=500, coverage='abdomen', fov='chest', **SMALL)
    assert not c.heart.data.any() and not c.lesions.data.any() and not c.truth['plaques']


def test_circle_pads_and_masks_the_corners():
    c = chest_phantom(1, agatston=100, circle=True, **SMALL)
    assert (c.ct.data[:,0,0] == OUTSIDE).all() and (c.clean.data[:,-1,-1] == OUTSIDE).all()
    assert (c.ct.data == OUTSIDE).mean() > .15


def test_shift_moves_patient_and_truth():
    kw = dict(agatston=200, noise=0, matrix=96, decoys=None)
    a, b = (chest_phantom(5, shift=s, **kw) for s in ((0,0,0), (220/96*5,0,0)))
    assert b.centres_mm == pytest.approx(a.centres_mm+[220/96*5,0,0], abs=1.)
    assert np.abs(np.roll(b.clean.data, 5, axis=2)-a.clean.data)[:,10:-10,10:-10].mean() < 2 # x grows to the right of the patient
    assert a.ct.geometry.matches(b.ct.geometry)


def test_contrast_fills_the_chambers():
    c = chest_phantom(1, agatston=0, contrast=350., decoys=None, **SMALL)
    assert 300 < np.percentile(c.clean.data[c.heart.data>0], 80) < 360


def test_noise_and_blur():
    a = chest_phantom(1, agatston=0, noise=30, **SMALL)
    assert (a.ct.data-a.clean.data).std() == pytest.approx(30, abs=2)
    sharp, soft = (chest_phantom(1, agatston=0, noise=0, psf=p, matrix=128, coverage=(0,9)) for p in (0,4.))
    edge = lambda c: np.abs(np.diff(c.clean.data, axis=2)).max()
    assert edge(soft) < .7*edge(sharp)


def test_every_decoy_is_drawn_where_it_is_asked():
    c = chest_phantom(1, agatston=0, decoys=DECOYS, fov='chest', coverage=(-70,110), matrix=192)
    assert [d['name'] for d in c.truth['decoys']] == list(DECOYS)
    assert set(np.unique(c.decoys.data)) >= set(range(1, len(DECOYS)+1))
    assert c.ct.data.max() > 1500 # the clip
    for d in c.truth['decoys']: assert d['voxels'] > 0, d


def test_vessels_option():
    c = chest_phantom(1, agatston=200, vessels=('RCA',), matrix=96)
    assert set(np.unique(c.lesions.data)) == {0, VESSEL_LABELS['RCA']}


def test_women_are_smaller():
    rng = np.random.default_rng(0)
    w, m = ([draw_physique(rng, s).width for _ in range(200)] for s in 'FM')
    assert np.mean(w) < np.mean(m)-.04
    assert make_trunk(Physique(sex='F')).breasts and not make_trunk(Physique()).breasts


@pytest.mark.parametrize('bad', [dict(fov='leg'), dict(coverage='leg'), dict(matrix=4), dict(increment=0), dict(noise=-1), dict(decoys=('pebble',)), dict(kvp=100)])
def test_refusals(bad):
    with pytest.raises(ConfigError): chest_phantom(0, **{**SMALL, **bad})


def test_deposit_outside_the_scan_is_nobodys_business():
    p = make_patient(Physique())
    raster, _ = make_raster(Scan(matrix=32, increment=6.), p)
    assert cover(Deposit('LAD', Tube([[0,0,900]], [2.]), 500.), raster) is None


def test_repr_reads_like_a_report(case):
    text = repr(case)
    assert 'Synthetic chest 3' in text and 'plaques' in text and 'mg' in text and '3/3 mm' in text


# --- cost

def test_memory_and_time_are_bounded():
    start = time.process_time(); tracemalloc.start()
    c = chest_phantom(1, agatston=0, matrix=128, increment=6., thickness=6.)
    peak = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
    assert peak < 40*c.ct.data.size + 40e6 # clean, noise and their copies in float32, two masks; one slice at a time beside
    assert time.process_time()-start < 30
