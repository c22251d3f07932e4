"The diffusion phantom: harmonics against scipy, volumes against the lines they come from, any grid, any order of making."
import itertools

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import factorial, lpmv

from jfr2020.synth.dwi import arc_bundle, dwi_phantom, fibre_harmonics, sh_basis, sh_degrees, sphere_points
from jfr2020.datasets import synthetic_dwi as dwicohort
from jfr2020.datasets.synthetic_dwi import DWI_FILES, DWI_TRACTS, SUBJECTS_FOLDER, write_dwi_cohort, write_dwi_subject
from jfr2020.ground.errors import ConfigError, StoreError
from jfr2020.ground.geometry import Geometry
from jfr2020.ground.streamlines import Streamlines

seeds = st.integers(0, 2**31)
grids = st.builds(lambda *a: oblique(*a), seeds, st.tuples(*[st.integers(9, 20)]*3))


def oblique(seed, shape):
    "Any turn, any mirror, three spacings that make every side about 100 mm, any place"
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]*rng.choice([-1, 1], 3)
    A = np.eye(4)
    A[:3, :3] = turn*(rng.uniform(80, 120, 3)/shape)
    A[:3, 3] = rng.uniform(-200, 200, 3)
    return Geometry(shape, A)


def test_the_basis_is_the_one_that_is_stated():
    d = np.random.default_rng(0).normal(size=(50, 3))
    d /= np.linalg.norm(d, axis=1, keepdims=True)
    theta, phi = np.arccos(d[:, 2]), np.arctan2(d[:, 1], d[:, 0])
    want = []
    for l in range(0, 9, 2):
        for m in range(-l, l+1):
            size = np.sqrt((2*l+1)/(4*np.pi)*factorial(l-abs(m))/factorial(l+abs(m))*(2 if m else 1))
            turn = np.sin(-m*phi) if m < 0 else np.cos(m*phi)
            want.append(size*turn*lpmv(abs(m), l, np.cos(theta))) # lpmv has the sign of Condon and Shortley
    assert np.allclose(sh_basis(d, 8), np.stack(want, 1), atol=1e-6)
    assert np.array_equal(sh_basis(d, 4), sh_basis(d, 8)[:, :15])


def test_the_basis_is_finite_at_the_poles():
    b = sh_basis([[0, 0, 1], [0, 0, -1], [1, 0, 0]], 12)
    assert np.isfinite(b).all() and b.shape == (3, len(sh_degrees(12))) == (3, 91)


@settings(max_examples=30, deadline=None)
@given(seeds, st.floats(5, 60), st.floats(5, 360), st.floats(.2, 3))
def test_arcs_have_the_length_and_the_tangents_of_their_circles(seed, radius, angle, step):
    s = arc_bundle(7, radius, angle, radius/2, step, centre=(10, -20, 30), seed=seed)
    r, k = s.per_line['radius_mm'][:, 0].astype(float), s.lengths-1
    theta = np.radians(angle)
    assert np.allclose(s.lengths_mm, 2*r*k*np.sin(theta/2/k), rtol=1e-4, atol=1e-3)
    assert np.allclose(s.per_line['length_mm'][:, 0], r*theta, rtol=1e-5)
    arm = s.points-np.float32([10, -20, 30])
    assert np.abs((arm*s.per_point['tangent']).sum(1)).max() < 1e-3*radius+1e-3
    assert np.allclose(np.hypot(arm[:, 0], arm[:, 1]), np.repeat(r, s.lengths), atol=1e-3)
    assert np.allclose(np.linalg.norm(s.per_point['tangent'], axis=1), 1, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(seeds, grids)
def test_harmonics_of_lines_are_the_sum_over_their_segments(seed, g):
    rng = np.random.default_rng(seed)
    lines = [g.to_world(rng.uniform(-2, np.array(g.shape)+1, (rng.integers(1, 30), 3))) for _ in range(6)]
    lines[2] = np.repeat(lines[2][:1], 4, 0) # a line that does not move
    s = Streamlines.from_list([p.astype('f4') for p in lines])
    sums, count = fibre_harmonics(s, g, 2)
    want, n = np.zeros((*g.shape, 6)), np.zeros(g.shape, int)
    for p in s:
        for a, b in itertools.pairwise(p.astype(float)):
            at = np.floor(g.to_index([(a+b)/2])[0]+.5).astype(int)
            if (a == b).all() or (at < 0).any() or (at >= g.shape).any(): continue
            want[tuple(at)] += sh_basis([(b-a)/np.linalg.norm(b-a)], 2)[0]
            n[tuple(at)] += 1
    assert np.array_equal(count.data, n) and np.allclose(sums.data, want, atol=1e-4)


def test_no_segment_is_lost_where_blocks_of_segments_meet():
    s = Streamlines(np.linspace([1, 5, 5], [9, 5, 5], 300_001, dtype='f4'), np.array([0, 100_001, 300_001]))
    g = Geometry((11, 11, 11), np.eye(4))
    assert fibre_harmonics(s, g, 0)[1].data.sum() == 300_001-2-(np.linalg.norm(np.diff(s.points, axis=0), axis=1) == 0).sum()


@settings(max_examples=12, deadline=None)
@given(seeds, grids)
def test_on_any_grid_lines_masks_and_lengths_belong_together(seed, g):
    case = dwi_phantom(n_lines=40, n_bundles=3, order=2, seed=seed, geometry=g)
    s = case.streamlines
    at = tuple(np.floor(g.to_index(s.points)+.5).astype(int).T)
    ends = tuple(a[np.r_[s.offsets[:-1], s.offsets[1:]-1]] for a in at)
    assert case.brain.data[at].all() and case.wm.data[at].all() and case.interface.data[ends].all()
    assert case.interface.data.sum() == len(set(zip(*(e.tolist() for e in ends))))
    assert not (case.wm.data & ~case.brain.data).any() and not case.sh.data[case.brain.data == 0].any()
    side = np.sqrt(((g.affine[:3, :3]*g.shape)**2).sum(1)).mean()
    low, high = np.array([80, 150])*min(1, side/(520/3))
    assert (s.lengths_mm > low-2.5).all() and (s.lengths_mm < high+1e-3).all()
    assert s.geometry is g and all(getattr(case, k).geometry is g for k in ('sh', 'fa', 'wm', 'brain', 'labels'))
    assert 0 <= case.fa.data.min() and case.fa.data.max() < 1


def peak_angle(case, order): # degrees between signal and lines in voxels of one direction
    sums, count = fibre_harmonics(case.streamlines, case.geometry, order)
    even, hit = sphere_points(3000), count.data >= 8
    basis = sh_basis(even, order)
    clear, got = sums.data[hit] @ basis.T, case.sh.data[hit] @ basis.T
    one = clear.max(1)/count.data[hit] > .9*(sh_basis([[0, 0, 1]], order)**2).sum() # all segments along one direction
    return np.degrees(np.arccos(np.abs((even[clear[one].argmax(1)]*even[got[one].argmax(1)]).sum(1)).clip(0, 1)))


@settings(max_examples=5, deadline=None)
@given(seeds, grids)
def test_the_signal_points_along_the_lines_on_any_grid(seed, g):
    angle = peak_angle(dwi_phantom(n_lines=200, n_bundles=2, order=4, seed=seed, geometry=g), 4)
    assert len(angle) > 5 and np.median(angle) < 4


def test_noise_does_what_it_says():
    quiet, loud = (dwi_phantom((16, 20, 20), (5, 5, 5), noise=k).sh.data for k in (0., .3))
    brain = dwi_phantom((16, 20, 20), (5, 5, 5)).brain.data > 0
    assert abs((loud-quiet)[brain].std()/.3-1) < .02 and abs((loud-quiet)[brain].mean()) < .01


def arrays(case):
    s = case.streamlines
    return [case.sh.data, case.fa.data, case.wm.data, case.interface.data, case.labels.data, s.points, s.offsets, *s.per_line.values()]


@settings(max_examples=8, deadline=None)
@given(seeds, st.integers(0, 5))
def test_same_arguments_same_arrays_and_no_global_generator(seed, subject):
    make = lambda **kw: arrays(dwi_phantom((14, 18, 18), (6, 6, 6), 30, 2, **{**dict(seed=seed, subject=subject), **kw}))
    before = np.random.get_state()[1].copy()
    a = make()
    assert all(np.array_equal(x, y) for x, y in zip(a, make()))
    assert not np.array_equal(a[5][:50], make(subject=subject+1)[5][:50])
    assert not np.array_equal(a[5][:50], make(seed=seed+1)[5][:50])
    assert np.array_equal(before, np.random.get_state()[1])


@pytest.mark.parametrize('bad', [dict(order=5), dict(order=-2), dict(n_lines=0), dict(n_bundles=0), dict(step_mm=0), dict(noise=-1)])
def test_what_cannot_be_is_refused(bad):
    with pytest.raises(ConfigError): dwi_phantom(**bad)


def test_a_head_without_room_says_so_soon():
    with pytest.raises(ConfigError, match='larger volume'): dwi_phantom((2, 40, 40))


SMALL = dict(shape=(12, 16, 16), spacing=(7, 6, 6), n_lines=25, order=2, n_bundles=3)


def test_another_reader_sees_volumes_and_lines_of_an_oblique_head_at_the_same_place(tmp_path):
    case = dwi_phantom(n_lines=30, order=2, geometry=oblique(5, (12, 15, 18)))
    folder = write_dwi_subject(case, tmp_path/'one')
    for name, file in DWI_FILES.items():
        img, v = nib.load(folder/file), getattr(case, name)
        axes = (2, 1, 0, 3)[:v.data.ndim]
        assert np.array_equal(np.asarray(img.dataobj).transpose(axes), v.data), name
        assert np.allclose(img.affine[:, [2, 1, 0, 3]], v.geometry.affine, atol=1e-4)
    trk = nib.streamlines.load(folder/DWI_TRACTS)
    assert np.allclose(trk.streamlines.get_data(), case.streamlines.points, atol=1e-3)
    assert np.array_equal(trk.tractogram.data_per_streamline['bundle_id'], case.streamlines.per_line['bundle_id'])
    tck = nib.streamlines.load((folder/DWI_TRACTS).with_suffix('.tck'))
    assert np.array_equal(tck.streamlines.get_data(), case.streamlines.points)


def files(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def test_the_same_seed_writes_the_same_bytes_and_subjects_do_not_depend_on_how_many(tmp_path):
    write_dwi_cohort(tmp_path/'a', 3, seed=4, **SMALL)
    write_dwi_cohort(tmp_path/'b', 3, seed=4, **SMALL)
    write_dwi_cohort(tmp_path/'c', 1, seed=4, **SMALL)
    a, b, c = (files(tmp_path/k) for k in 'abc')
    assert a == b and len(a) == 3*8+4
    assert all(a[k] == v for k, v in c.items() if k.startswith(SUBJECTS_FOLDER)) and c['testing.txt'] == b''
    one, two = (a[f'{SUBJECTS_FOLDER}/sub-0{k}/{DWI_TRACTS}'] for k in (1, 2))
    assert one != two


def test_a_subject_is_whole_or_absent_and_the_rest_can_be_written_again(tmp_path, monkeypatch):
    def no_room(*a): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(dwicohort, 'write_tractogram', no_room)
    with pytest.raises(StoreError, match='No space left') as e: write_dwi_cohort(tmp_path, 2, **SMALL)
    assert e.value.code == 'DISK' and list((tmp_path/SUBJECTS_FOLDER).iterdir()) == []
    monkeypatch.undo()
    assert [r['list'] for r in write_dwi_cohort(tmp_path, 2, **SMALL)] == ['training', 'validation']
