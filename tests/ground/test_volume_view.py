"Pictures: the same patient gives the same picture, however the file stores its axes."
import subprocess, sys
from itertools import permutations

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

matplotlib.use('agg')
import matplotlib.pyplot as plt

from jfr2020.ground.errors import ConfigError, GeometryError
from jfr2020.ground.geometry import Geometry
from jfr2020.ground.volume_view import PLANES, WINDOWS, Window, get_window, mip, montage, show, slider, upright
from jfr2020.ground.volume import CTVolume, MaskVolume, Volume, check_landmark

SHAPE = (5, 6, 7)


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close('all')


def ct(seed=0, affine=None):
    data = np.random.default_rng(seed).permutation(np.prod(SHAPE)).reshape(SHAPE).astype('i2') - 100
    axial = Geometry.from_spacing(SHAPE, (3, .7, .5), (11, -7, 40))
    return CTVolume(data, axial if affine is None else Geometry(SHAPE, affine))


def stored(v, order, flips):
    "The same patient with array axes in another order and direction"
    g = Geometry([v.shape[k] for k in order], v.geometry.affine[:, [*order, 3]])
    return type(v)(v.data.transpose(order), g)[tuple(slice(None, None, -1 if f else 1) for f in flips)]


def pictures(v, **kw):
    return [(np.array(a.images[0].get_array()), a.images[0].get_extent(), a.get_title()) for a in v.show(**kw)]


WAYS = st.tuples(st.permutations(range(3)), st.tuples(*[st.booleans()]*3))


@settings(max_examples=25, deadline=None)
@given(WAYS, st.tuples(*[st.floats(0, .999)]*3))
def test_same_picture_however_stored(way, where):
    v = ct()
    at = v.geometry.to_world([np.floor(np.array(where)*SHAPE)])[0]
    for (a, e, t), (b, f, s) in zip(pictures(v, at=at), pictures(stored(v, *way), at=at)):
        assert np.array_equal(a, b) and np.allclose(e, f) and t == s
    plt.close('all')


@settings(max_examples=60, deadline=None)
@given(WAYS, st.tuples(*[st.floats(-.6, .6)]*3))
def test_upright_moves_nothing(way, angles):
    R = np.eye(3)
    for k, t in enumerate(angles):
        c, s, r = np.cos(t), np.sin(t), np.eye(3)
        i, j = [a for a in range(3) if a != k]
        r[i, i], r[i, j], r[j, i], r[j, j] = c, -s, s, c
        R = R @ r
    A = np.array(ct().geometry.affine)
    A[:3] = R @ A[:3]
    v = stored(ct(affine=A), *way)
    u = upright(v)
    check_landmark(v, u)
    assert np.shares_memory(u.data, v.data)
    near = u.geometry.axes
    best = max(sum(abs(near[p[i], 2-i]) for i in range(3)) for p in permutations(range(3)))
    assert np.isclose(near[0, 2] - near[1, 1] - near[2, 0], best)
    assert near[0, 2] > 0 > near[1, 1] and near[2, 0] < 0


def test_a_voxel_is_drawn_at_its_millimetres():
    v = ct()
    k = np.argwhere(v.data == v.data.max())[0]
    x, y, z = v.geometry.to_world([k])[0]
    for a, (h, w) in zip(v.show(at=(x, y, z)), [(y, x), (z, x), (z, y)]):
        image, (left, right, bottom, top) = np.array(a.images[0].get_array()), a.images[0].get_extent()
        row, column = np.argwhere(image == v.data.max())[0]
        assert np.isclose(left + (column+.5)*(right-left)/image.shape[1], w)
        assert np.isclose(top + (row+.5)*(bottom-top)/image.shape[0], h)


@pytest.mark.parametrize('flips', [(0, 0, 0), (1, 0, 1), (0, 1, 1)])
def test_boxes_of_every_kind_are_drawn_alike(flips):
    v = stored(ct(), (0, 1, 2), flips)
    start, stop = np.array([1, 2, 2]), np.array([4, 5, 6])

    class Span: pass
    span, corner = Span(), Span()
    span.start, span.stop = start, stop
    corner.corners_mm = v.geometry.to_world([start-.5, stop-.5])
    ends = v.geometry.to_world([start-.5, stop-.5])
    for box in ((start, stop), span, corner):
        r = v.show(boxes=[box], planes='axial').patches[0]
        xs, ys = sorted([r.get_x(), r.get_x()+r.get_width()]), sorted([r.get_y(), r.get_y()+r.get_height()])
        assert np.allclose(xs, sorted(ends[:, 0])) and np.allclose(ys, sorted(ends[:, 1]))
    assert not v.show(boxes=[((0, 0, 0), (1, 1, 1))], planes='axial').patches # the box does not reach this slice


def test_mask_lies_over_its_voxels():
    v = ct()
    m = np.zeros(SHAPE, 'u1')
    m[2, 3, 4], m[2, 1, 1] = 2, 4
    a = v.show(mask=MaskVolume(m, v.geometry), at='mask', planes='axial')
    over = np.array(a.images[1].get_array())
    assert {tuple(i) for i in np.argwhere(over[..., 3] > 0)} == {(3, 4), (1, 1)}
    assert not np.allclose(over[3, 4], over[1, 1])


def test_windows():
    assert get_window('lung') is WINDOWS['lung'] and get_window(Window(1, 2)) == Window(1, 2) == get_window((1, 2))
    for bad in (0, -1, np.nan, np.inf):
        with pytest.raises(ConfigError): Window(0, bad)
    a = ct().show(planes='axial', window=(100, 50))
    assert a.images[0].get_clim() == (75, 125)


def test_refusals_name_what_there_is():
    v = ct()
    for draw, name in ((show, 'planes'), (mip, 'plane'), (montage, 'plane'), (slider, 'plane')):
        with pytest.raises(ConfigError, match='axial, coronal, sagittal'): draw(v, **{name: 'side'})
    with pytest.raises(ConfigError, match='beside a mask'): show(v, at='mask')
    with pytest.raises(GeometryError, match='onto'): montage(v, MaskVolume(np.ones((1, 6, 7), 'u1'), v[:1].geometry))


def test_flat_and_constant_volumes_are_drawn():
    g = Geometry.from_spacing((1, 4, 4), (3, 1, 1))
    for v in (Volume(np.zeros((1, 4, 4)), g), CTVolume(np.zeros((1, 4, 4), 'i2'), g)):
        assert len(v.show()) == 3
        assert len(v.montage()) == 1
    assert set(PLANES) == {'axial', 'coronal', 'sagittal'}


def test_importing_does_not_load_matplotlib():
    code = "import sys, jfr2020.ground.volume_view; sys.exit(bool({'matplotlib', 'ipywidgets', 'scipy', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


def test_without_widgets_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'ipywidgets', None)
    with pytest.raises(ValueError, match=r"jfr2020\[dev\]"): slider(ct())
