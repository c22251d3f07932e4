"The landmark rule on random oblique grids: a voxel found by value stays where it is in the patient."
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jfr2020.ground.errors import GeometryError
from jfr2020.ground.geometry import Geometry, lps2ras
from jfr2020.ground.volume import CTVolume, MaskVolume, Volume, check_landmark, crop, flip, onto, pad

seeds = st.integers(0, 2**32-1)


def rotation(rng): # a random proper rotation
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    q *= np.sign(np.diag(r))
    return q * np.sign(np.linalg.det(q))


def random_volume(rng, kind=Volume, shape=None):
    "Random values on a random oblique grid"
    shape = shape or rng.integers(4, 10, 3)
    A = np.eye(4)
    A[:3, :3] = rotation(rng) @ np.diag(rng.uniform(.3, 4, 3)) * rng.choice([-1, 1])
    A[:3, 3] = rng.uniform(-300, 300, 3)
    data = rng.permutation(int(np.prod(shape))).reshape(shape).astype('i2') # one brightest voxel
    return kind(data, Geometry(shape, A))


@pytest.mark.parametrize('row', [(0,0,0,1), (1e-8,0,-1e-8,1), (1.1e-8,0,0,1), (0,0,-2e-8,1), (0,0,0,1+1e-5), (0,0,0,1-1e-5), (0,0,0,1+1.1e-5),
                                 (0,0,0,-1), (0,0,0,0), (np.nan,0,0,1), (0,0,0,np.nan), (0,np.inf,0,1), (0,0,0,-np.inf), (3,0,0,1)])
def test_the_last_row_is_judged_as_allclose_judges_it(row):
    A = np.eye(4); A[3] = row
    if np.allclose(row, [0,0,0,1]): assert Geometry((1,1,1), A).shape == (1,1,1)
    else:
        with pytest.raises(GeometryError, match='last row'): Geometry((1,1,1), A)


@given(seeds)
def test_index_and_world_undo_each_other(seed):
    rng = np.random.default_rng(seed)
    g = random_volume(rng).geometry
    idx = rng.uniform(-20, 20, (9, 3))
    assert np.abs(g.to_index(g.to_world(idx)) - idx).max() < 1e-8
    assert np.allclose(lps2ras(lps2ras(g.affine)), g.affine)
    assert np.isclose(g.voxel_mm3, np.prod(g.spacing))


@given(seeds)
def test_crop_pad_flip_and_slicing_keep_the_landmark(seed):
    rng = np.random.default_rng(seed)
    v = random_volume(rng)
    top = np.argwhere(v.data == v.data.max())[0]
    check_landmark(v, crop(v, top - rng.integers(0, 12, 3), top + rng.integers(1, 12, 3)))
    check_landmark(v, pad(v, rng.integers(0, 4, 3), rng.integers(0, 4, 3)))
    check_landmark(v, flip(v, int(rng.integers(3))))
    step = rng.choice([-2, -1, 1, 2], 3)
    check_landmark(v, v[tuple(slice(int(t) % abs(int(s)) if s > 0 else int(t), None, int(s)) for t, s in zip(top, step))])


@given(seeds)
def test_a_moved_voxel_is_found_out(seed):
    rng = np.random.default_rng(seed)
    v = random_volume(rng)
    moved = Volume(np.roll(v.data, 1, int(rng.integers(3))), v.geometry)
    with pytest.raises(GeometryError, match='landmark moved'): check_landmark(v, moved)


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_linear_fields_are_reproduced_on_any_grid(seed):
    "Linear interpolation of a linear field is exact, inside"
    rng = np.random.default_rng(seed)
    v = random_volume(rng)
    slope = rng.normal(size=3)
    field = (v.geometry.to_world(np.argwhere(np.ones(v.shape))) @ slope).reshape(v.shape)
    target = random_volume(rng).geometry
    idx = rng.uniform(1, np.array(v.shape) - 2, 3) # put the target's middle voxel inside
    A = target.affine.copy()
    A[:3, 3] += v.geometry.to_world([idx])[0] - target.to_world([np.array(target.shape)//2])[0]
    target = Geometry(target.shape, A)
    world = target.to_world(np.argwhere(np.ones(target.shape)))
    at = v.geometry.to_index(world)
    inside = ((at >= 0) & (at <= np.array(v.shape) - 1)).all(1)
    got = onto(Volume(field, v.geometry), target).data.ravel()
    want = world @ slope
    assert inside.any()
    assert np.abs(got - want)[inside].max() < 1e-3 * (1 + np.abs(want).max())


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_labels_stay_labels_and_blobs_stay_put(seed):
    rng = np.random.default_rng(seed)
    g = random_volume(rng, shape=(12, 14, 16)).geometry
    mid = rng.uniform([4, 5, 6], [7, 8, 9])
    d2 = ((g.to_world(np.argwhere(np.ones(g.shape))) - g.to_world([mid])[0])**2).sum(1).reshape(g.shape)
    blob = CTVolume((1000*np.exp(-d2/(2*(1.5*max(g.spacing))**2))).astype('f4'), g)
    fine = g.with_spacing(np.array(g.spacing)*rng.uniform(.4, .9, 3))
    check_landmark(blob, onto(blob, fine), tol=float(np.linalg.norm(g.spacing)))
    labels = MaskVolume(rng.integers(0, 6, g.shape).astype('u1'), g)
    assert set(np.unique(onto(labels, fine).data)) <= set(np.unique(labels.data))
