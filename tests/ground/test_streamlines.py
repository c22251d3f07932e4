"Packed streamlines: what must hold for any set of lines, empty and one-point lines among them."
import copy
import pickle

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jfr2020.ground.errors import ConfigError, GeometryError
from jfr2020.ground.geometry import Geometry
from jfr2020.ground.streamlines import (Streamlines, add_noise, compress_lines, draw_cuts, join, line_rows, lines_inside,
                                 resample_count, resample_step, reverse, split)

GRID = Geometry.from_spacing((10, 12, 14), (2, 1.5, 1))


def make(lengths, seed=0, step=1.):
    "Smooth random lines of these numbers of points, with data of three types"
    rng = np.random.default_rng(seed)
    lines = []
    for n in lengths:
        turns = np.cumsum(rng.normal(scale=.3, size=(n, 3)), 0) + rng.normal(size=3)
        turns /= np.linalg.norm(turns, axis=1, keepdims=True)
        lines.append(np.cumsum(step*turns, 0) + rng.uniform(-50, 50, 3))
    total = sum(lengths)
    return Streamlines.from_list(
        lines, dict(bundle=np.arange(len(lengths)), w=rng.random((len(lengths), 3))),
        dict(fa=np.arange(total, dtype='f4'), label=np.arange(total)), GRID)


def loop(s):
    return [np.array(x) for x in s]


some = st.lists(st.integers(0, 40), min_size=0, max_size=12)
full = st.lists(st.integers(2, 40), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(some, st.data())
def test_any_choice_equals_a_loop(lengths, data):
    s = make(lengths)
    ids = data.draw(st.lists(st.integers(-len(lengths), len(lengths)-1), max_size=20)) if lengths else []
    a, b, c = (data.draw(st.one_of(st.none(), st.integers(-15, 15))) for _ in range(3))
    keys = [ids, np.array(ids, dtype='i4'), slice(a, b, c or None), np.arange(len(s)) % 2 == 0]
    for key in keys:
        t = s[key]
        want = np.arange(len(s))[np.array(key, int) if isinstance(key, list) else key]
        assert [x.tolist() for x in t] == [s[int(i)].tolist() for i in want]
        assert np.array_equal(t.per_line['bundle'].ravel(), s.per_line['bundle'][want].ravel())
        rows = [r for i in want for r in range(s.offsets[i], s.offsets[i+1])]
        assert np.array_equal(t.per_point['label'].ravel(), rows)
        assert t.per_line['w'].shape == (len(want), 3) and t.geometry is GRID
        assert np.array_equal(t.lengths_mm, s.lengths_mm[want])  # to the last bit, in whatever company


@settings(max_examples=60, deadline=None)
@given(some, st.floats(.05, 30))
def test_resampling_by_step(lengths, step):
    s = make(lengths)
    r = resample_step(s, step)
    for i in range(len(s)):
        if s.lengths_mm[i] == 0:
            assert r.lengths[i] == min(s.lengths[i], 1)
            continue
        n = r.lengths[i]
        assert n == max(np.rint(s.lengths_mm[i]/step), 1)+1
        assert np.array_equal(r[i][[0, -1]], s[i][[0, -1]])  # the ends do not move, not by a bit
        assert n == 2 or abs(s.lengths_mm[i]/(n-1)-step) <= step/(2*(n-1))*(1+1e-9)
        along = np.r_[0, np.cumsum(np.linalg.norm(np.diff(s[i].astype(float), axis=0), axis=1))]
        at = np.linspace(0, along[-1], n)
        want = np.stack([np.interp(at, along, s[i][:, k]) for k in range(3)], 1)
        assert np.abs(r[i]-want).max() < 1e-3
        fa = r[[i]].per_point['fa'].ravel()
        assert np.abs(fa-np.interp(at, along, s[[i]].per_point['fa'].ravel())).max() < 1e-2
        assert np.array_equal(resample_step(s[[i]], step).points, r[i])  # alone or in company
        labels = r[[i]].per_point['label'].ravel()
        assert labels.dtype.kind == 'i' and set(labels) <= set(s[[i]].per_point['label'].ravel())


@settings(max_examples=40, deadline=None)
@given(full, st.integers(2, 60))
def test_resampling_by_count(lengths, n):
    s = make(lengths)
    r = resample_count(s, n)
    assert (r.lengths == n).all() and np.isfinite(r.points).all()
    for i in range(len(s)):
        assert np.array_equal(r[i][[0, -1]], s[i][[0, -1]])
    assert np.array_equal(r.per_line['bundle'], s.per_line['bundle'])


def test_labels_come_from_the_nearest_point():
    s = Streamlines.from_list([[[0, 0, 0], [10, 0, 0], [20, 0, 0]]],
                              per_point=dict(label=np.array([7, 8, 9]), x=np.array([0., 1., 2.])))
    r = resample_step(s, 3)  # 8 points, 20/7 mm apart
    assert r.per_point['label'].ravel().tolist() == [7, 7, 8, 8, 8, 8, 9, 9] and r.per_point['label'].dtype == 'i8'
    assert np.allclose(r.per_point['x'].ravel(), np.arange(8)*2/7) and r.per_point['x'].dtype == 'f8'


def test_lines_inside_against_a_loop():
    s = make([0, 1, 20, 30, 5]*5, step=.4)
    i = [GRID.to_index(x+[0, 0, 0]) for x in s]
    want = [bool(((p >= -.5-1e-4) & (p <= np.array(GRID.shape)-.5+1e-4)).all()) for p in i]
    assert lines_inside(s).tolist() == want
    corner = Streamlines(GRID.to_world([[-.5]*3, [9.5, 11.5, 13.5], [-.51, 0, 0], [0, 0, 13.51]]), range(5))
    assert lines_inside(corner, GRID).tolist() == [True, True, False, False]


def test_no_zero_step_comes_out_of_doubled_points():
    line = np.repeat([[0, 0, 0], [1, 0, 0], [5, 0, 0]], 4, axis=0)
    r = resample_step(Streamlines.from_list([line, line[:4]]), 1)
    assert np.allclose(r[0], np.c_[np.arange(6), np.zeros((6, 2))]) and r.lengths[1] == 1
    assert (np.linalg.norm(np.diff(r[0], axis=0), axis=1) > .99).all()


def distance(points, polyline):
    "Of each point to the nearest place of the polyline"
    best = np.full(len(points), np.inf)
    for a, b in zip(polyline[:-1], polyline[1:]):
        u = b-a
        t = np.clip((points-a) @ u / max(u @ u, 1e-12), 0, 1)
        best = np.minimum(best, np.linalg.norm(points-a-t[:, None]*u, axis=1))
    return best


@settings(max_examples=40, deadline=None)
@given(some, st.sampled_from([0., .01, .1, 1.]), st.sampled_from([2.5, 10.]), st.sampled_from([.2, 1.]))
def test_compression_stays_within_its_tolerance(lengths, tol, longest, step):
    s = make(lengths, step=step)
    c = compress_lines(s, tol, longest)
    assert len(c) == len(s)
    for i in range(len(s)):
        assert len(c[i]) <= len(s[i])
        if len(s[i]) == 0:
            continue
        assert np.array_equal(c[i][[0, -1]], s[i][[0, -1]])
        kept = c[[i]].per_point['label'].ravel() - s.offsets[i]
        assert np.array_equal(s[i][kept], c[i]) and (np.diff(kept) > 0).all()
        if len(s[i]) > 1:
            assert distance(s[i].astype(float), c[i].astype(float)).max() <= tol+2e-5
            assert np.linalg.norm(np.diff(c[i], axis=0), axis=1).max() <= longest+1e-4
        assert np.array_equal(compress_lines(s[[i]], tol, longest).points, c[i])


def test_compression_keeps_what_a_loop_keeps():
    s = make([200, 3, 77, 0, 1, 2, 150], step=.5)

    def greedy(p, tol, longest):
        keep, a = [0], 0
        for c in range(2, len(p)):
            inner = distance(p[a+1:c].astype(float), p[[a, c]].astype(float)).max()
            if inner > tol or np.linalg.norm(p[c]-p[a]) > longest:
                keep.append(c-1)
                a = c-1
        return [*keep, len(p)-1]
    c = compress_lines(s, .1, 10)
    for i in np.flatnonzero(s.lengths > 1):
        assert np.array_equal(c[int(i)], s[int(i)][greedy(s[int(i)], .1, 10)])


def test_a_straight_line_is_its_ends_up_to_the_longest_piece():
    line = np.c_[np.arange(101), np.zeros((101, 2))]
    assert compress_lines(Streamlines.from_list([line]), .1, 1000).lengths.tolist() == [2]
    assert compress_lines(Streamlines.from_list([line]), .1, 10).lengths.tolist() == [11]
    assert compress_lines(Streamlines.from_list([line*20]), .1, 10).lengths.tolist() == [101]  # longer before: they stay


@settings(max_examples=60, deadline=None)
@given(some, st.integers(1, 12), st.floats(0, 1), st.integers(0, 5))
def test_no_point_is_lost_in_splitting(lengths, least, share, seed):
    s = make(lengths)
    at = draw_cuts(s, np.random.default_rng(seed), share, least)
    t = split(s, at)
    assert np.array_equal(t.points, s.points) and t.lengths.sum() == s.lengths.sum()
    assert len(t) == len(s)+(at > 0).sum()
    assert (at[s.lengths < 2*least] == 0).all()
    cut = at > 0
    assert (at[cut] >= least).all() and (s.lengths[cut]-at[cut] >= least).all()
    owners = np.repeat(np.arange(len(s)), 1+cut)
    assert np.array_equal(t.per_line['bundle'].ravel(), owners)
    assert np.array_equal(t.per_point['fa'], s.per_point['fa'])
    for i in range(len(s)):
        assert np.array_equal(np.concatenate(loop(t[owners == i])), s[i])


def test_short_lines_are_kept_whole():
    s = make([5, 8, 12, 30])
    t = split(s, draw_cuts(s, np.random.default_rng(0), min_points=6))
    assert t.lengths[:2].tolist() == [5, 8] and t.lengths.sum() == 55 and len(t) == 6
    first = [draw_cuts(make([4]), np.random.default_rng(k), min_points=2)[0] for k in range(5)]
    assert first == [2]*5  # the only place there is


@settings(max_examples=40, deadline=None)
@given(some, st.data())
def test_reversing(lengths, data):
    s = make(lengths)
    which = np.array(data.draw(st.lists(st.booleans(), min_size=len(s), max_size=len(s))), bool)
    t = reverse(s, which)
    for i in range(len(s)):
        assert np.array_equal(t[i], s[i][::-1] if which[i] else s[i])
    assert np.array_equal(t.offsets, s.offsets)
    back = reverse(t, np.flatnonzero(which))
    assert np.array_equal(back.points, s.points) and np.array_equal(back.per_point['label'], s.per_point['label'])


def test_noise_is_truncated_normal_and_follows_its_generator():
    s = Streamlines(np.zeros((100_000, 3)), [0, 50_000, 100_000])
    a = add_noise(s, .3, np.random.default_rng(4)).points
    assert np.abs(a).max() <= .6+1e-6 and abs(a.mean()) < .003
    assert abs(a.std()-.3*.8796) < .002  # sqrt(1 - 4 phi(2) / (2 Phi(2) - 1))
    assert (np.abs(a) > .57).mean() > .003  # drawn again, not clipped: no pile at the limit
    assert (np.abs(a) >= .6-1e-6).mean() < .001
    assert np.array_equal(a, add_noise(s, .3, np.random.default_rng(4)).points)
    assert np.array_equal(add_noise(s, 0, np.random.default_rng(4)).points, s.points)


def test_joining_and_taking_apart():
    s = make([3, 0, 7, 1])
    t = join([s[:2], s[2:2], s[2:]])
    assert np.array_equal(t.points, s.points) and np.array_equal(t.offsets, s.offsets)
    for k in ('bundle', 'w'):
        assert np.array_equal(t.per_line[k], s.per_line[k])
    other = Streamlines(s.points, s.offsets, s.per_line, s.per_point, Geometry.from_spacing((10, 12, 14), (2, 1.5, 1.1)))
    with pytest.raises(GeometryError, match='set 1 belongs to'):
        join([s, other])
    with pytest.raises(GeometryError, match='set 1 belongs to None'):
        join([s, Streamlines(s.points, s.offsets, s.per_line, s.per_point)])
    with pytest.raises(GeometryError, match='per_line of set 1'):
        join([s, Streamlines(s.points, s.offsets, dict(bundle=np.arange(4)), s.per_point, GRID)])


def test_a_line_longer_than_int16_counts():
    n = 70_000
    s = Streamlines.from_list([np.c_[np.arange(n)/100, np.zeros((n, 2))], [[0, 0, 0], [0, 3, 4]]])
    assert s.lengths.tolist() == [n, 2] and abs(s.lengths_mm[0]-(n-1)/100) < .05 and s.lengths_mm[1] == 5
    r = resample_step(s, 1)
    assert r.lengths.tolist() == [701, 6]
    assert compress_lines(resample_step(s, .1), .1, 10).lengths[0] <= 73
    rows, own = line_rows(s.offsets, np.array([1, 0]))
    assert rows[:3].tolist() == [n, n+1, 0] and own.tolist() == [0, 2, n+2]


def test_nothing_at_all():
    for s in (Streamlines(np.zeros((0, 3)), [0]), Streamlines(np.zeros((0, 3)), [0, 0, 0])):
        n = len(s)
        for t in (s[:], s[[]], resample_step(s, 1), compress_lines(s), reverse(s), join([s, s]),
                  split(s, draw_cuts(s, np.random.default_rng(0))), add_noise(s, 1, np.random.default_rng(0))):
            assert len(t.points) == 0 and len(t) in (0, n, 2*n)
        assert s.lengths_mm.tolist() == [0]*n and f'{n} lines' in repr(s) and list(map(len, s)) == [0]*n
    assert len(resample_count(s[:0], 5)) == 0


def test_it_is_a_value():
    s = make([3, 4])
    for t in (pickle.loads(pickle.dumps(s)), copy.deepcopy(s)):
        assert np.array_equal(t.points, s.points) and t.geometry.matches(GRID)
        assert list(t.per_line) == ['bundle', 'w'] and list(t.per_point) == ['fa', 'label']
    for a in (s.points, s.offsets, s.per_line['w'], s.per_point['fa'], s.lengths_mm):
        with pytest.raises(ValueError, match='read-only'):
            a[0] = 1
    with pytest.raises(TypeError):
        s.per_line['more'] = np.zeros(2)
    with pytest.raises(AttributeError):
        s.points = s.points
    mine = np.zeros((2, 3), 'f4')
    Streamlines(mine, [0, 2])
    mine[0] = 1  # the caller's array stays the caller's


@pytest.mark.parametrize('points, offsets, said', [
    ([[0, 0, np.inf]], [0, 1], 'line 0, point 0'),
    ([[0, 0, 0], [0, 0, 2e6]], [0, 1, 2], 'line 1, point 0'),
    ([[0, 0, 0], [0, np.nan, 0]], [0, 0, 0, 2], 'line 2, point 1 .* 1 of 3 lines'),
    ([[0, 0]], [0, 1], r'\(N,3\)'), ([0, 0, 0], [0, 1], r'\(N,3\)'), ([['a', 'b', 'c']], [0, 1], 'numbers'),
    ([[0, 0, 0]], [1, 1], 'from 0 to 1'), ([[0, 0, 0]], [0, 2], 'from 0 to 1'), ([[0, 0, 0]], [], 'whole numbers'),
    ([[0, 0, 0]]*4, [0, 3, 2, 4], 'line 1'), ([[0, 0, 0]], [0., 1.], 'whole numbers'), ([[0, 0, 0]], [[0, 1]], 'whole numbers')])
def test_what_is_refused(points, offsets, said):
    with pytest.raises(GeometryError, match=said):
        Streamlines(np.array(points), np.array(offsets))


@pytest.mark.parametrize('data, said', [
    (dict(per_line=dict(a=[1, 2])), "per_line 'a' needs 1 rows, one a line"),
    (dict(per_point=dict(a=[[1], [2], [3]])), "per_point 'a' needs 2 rows, one a point"),
    (dict(per_line=dict(a=['x'])), 'must be numbers'), (dict(per_line=dict(a=np.zeros((1, 0)))), 'a column or more'),
    (dict(per_line=dict(a=np.zeros((1, 2, 3)))), 'needs 1 rows'), (dict(per_line={'': [1]}), 'names'),
    (dict(per_line={3: [1]}), 'names'), (dict(per_line=dict(a=[object()])), 'must be numbers'),
    (dict(geometry='here'), 'Geometry or None')])
def test_data_that_do_not_fit(data, said):
    with pytest.raises(GeometryError, match=said):
        Streamlines(np.zeros((2, 3)), [0, 2], **data)


def test_choices_and_settings_that_are_refused():
    s = make([3, 4])
    for key in (2, -3, [0, 2], [True], np.array([.5]), 'a', [[0]], True, None):
        with pytest.raises(GeometryError):
            s[key]
    for call in (lambda: resample_step(s, np.nan), lambda: resample_step(s, -1), lambda: resample_count(s, 2.5),
                 lambda: compress_lines(s, np.nan), lambda: compress_lines(s, 1, 0), lambda: add_noise(s, np.nan, None),
                 lambda: draw_cuts(s, None, -1), lambda: draw_cuts(s, None, 1, 0)):
        with pytest.raises(ConfigError):
            call()
    for at in ([0], [0., 0.], [0, 4], [-1, 0]):
        with pytest.raises(GeometryError):
            split(s, np.array(at))
    with pytest.raises(GeometryError, match='line 1 has no length'):
        resample_count(make([3, 1]), 4)
