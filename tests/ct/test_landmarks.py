"Landmarks stay in the patient: every transform that changes the grid, on random oblique grids."
import inspect
import random
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jfr2020.ct import crops
from jfr2020.ct.crops import CropHeart, TrimSlices
from jfr2020.data import transforms
from jfr2020.data.transforms import CropOrPad, FlipLR, GridTransform, Onto, RandomCrop, RandomTurn
from jfr2020.ground.geometry import Geometry
from jfr2020.ground.volume import CTVolume, MaskVolume, check_landmark


def oblique(seed, shape):
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    A = np.eye(4)
    A[:3, :3], A[:3, 3] = q*rng.uniform(.6, 2.5, 3), rng.uniform(-100, 100, 3)
    return Geometry(shape, A)


def blob(g, at):
    mm = g.to_world(np.indices(g.shape).reshape(3, -1).T)
    d2 = ((mm-g.to_world([at]))**2).sum(1).reshape(g.shape)
    return CTVolume((1000*np.exp(-d2/(2*3.5**2))).astype('f4'), g)


SHARP = dict(CropOrPad=lambda: CropOrPad((22, 30, 18)), RandomCrop=lambda: RandomCrop((19, 21, 20), positive=0), FlipLR=lambda: FlipLR(p=1),
             CropHeart=lambda: CropHeart(3), TrimSlices=TrimSlices, GridTransform=GridTransform)
SOFT = dict(Onto=lambda: Onto((1.3, .9, 1.7)), RandomTurn=lambda: RandomTurn(15, .1))


def test_every_grid_transform_has_a_landmark_test():
    known = {n for room in (transforms, crops) for n, c in vars(room).items() if inspect.isclass(c) and issubclass(c, GridTransform)}
    assert known == {*SHARP, *SOFT}


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), name=st.sampled_from([*SHARP, *SOFT]))
def test_landmarks_stay_on_oblique_grids(seed, name):
    g = oblique(seed, (20, 23, 21))
    v = blob(g, (10, 11, 10))
    mask = MaskVolume((v.data > 600).astype('u1'), g)
    random.seed(seed)
    box = SimpleNamespace(start=(6, 5, 4), stop=(16, 18, 17))
    with pytest.MonkeyPatch.context() as m: # where the heart is, is another test's question
        m.setattr(crops, 'find_heart', lambda ct: box)
        m.setattr(crops, 'trim_slices', lambda ct: slice(5, 17))
        out, labels = {**SHARP, **SOFT}[name]()((v, mask), split_idx=0)
    assert out.geometry.matches(labels.geometry) and labels.data.any()
    if name in SHARP: check_landmark(v, out)
    else: check_landmark(v, out, tol=max(*out.spacing, *g.spacing))
    if name in SHARP: assert np.array_equal(labels.data > 0, out.data > 600)
