"Agreement of readers: against the literature, against independent libraries, against brute force, and where nothing is defined."
import io
import json
import math
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from scipy import ndimage as ndi
from scipy import stats

from jfr2020.agreement.statistics import (AgreementError, Estimate, bootstrap, concordance_correlation, concordance_index, confusion, disagreement, icc,
                               ordinal_auc, proportion, classes_of_scores, somers_d, weighted_kappa)
from jfr2020.calcium.categories import SCHEMES
from jfr2020.agreement.detection import FROC_AT, detection_estimates, froc, froc_estimates, froc_scan, match_lesions, vessel_confusion
from jfr2020.agreement.bland_altman import bland_altman, show_bland_altman
from jfr2020.ground.errors import ConfigError
from jfr2020.agreement.tables import EVALUATE_SCHEMA, evaluate_json, evaluate_pairs, evaluate_scores, named_measures, pair_scores, read_score_table, show_evaluation, threshold_measures
from jfr2020.ground.geometry import Geometry
from jfr2020.ground.volume import MaskVolume

COHEN = np.array([[88, 14, 18], [10, 40, 10], [2, 6, 12]]) # Cohen 1960, 1968


def spread(counts): return [np.repeat(i, counts.ravel()) for i in np.indices(counts.shape).reshape(2, -1)]


def readers(n=120, seed=0):
    rng = np.random.default_rng(seed)
    a = np.where(rng.random(n) < .25, 0, np.exp(rng.normal(4, 1.8, n))).round(1)
    return a, np.where(rng.random(n) < .1, 0, a*np.exp(rng.normal(0, .5, n))).round(1)


# shares

@pytest.mark.parametrize('k,n', [(0, 1), (1, 1), (3, 10), (10, 10), (81, 263), (1, 10000)])
def test_wilson_equals_scipy(k, n):
    e, s = proportion(k, n), stats.binomtest(k, n).proportion_ci(method='wilson')
    assert (e.value, e.low, e.high) == pytest.approx((k/n, s.low, s.high), abs=1e-12)


# bootstrap

def test_percentile_and_bca_equal_scipy():
    x = np.random.default_rng(1).exponential(10, 50)
    for ours, theirs in (('percentile', 'percentile'), ('bca', 'BCa')):
        e = bootstrap(lambda r: dict(m=x[r].mean()), 50, method=ours, draws=20000)['m']
        s = stats.bootstrap((x,), np.mean, method=theirs, n_resamples=20000, rng=np.random.default_rng(5)).confidence_interval
        assert (e.low, e.high) == pytest.approx((s.low, s.high), rel=.02)


def test_the_interval_covers_as_often_as_it_says():
    truth, hits = .6, 0
    for k in range(200):
        x = np.random.default_rng(k).random(80) < truth
        e = bootstrap(lambda r, x=x: dict(m=x[r].mean()), 80, draws=400, seed=k)['m']
        hits += e.low <= truth <= e.high
    assert .89 <= hits/200 <= .99


def test_patients_are_drawn_whole():
    seen = []
    groups = np.array(['a', 'b', 'b', 'c', 'a', 'a'])
    bootstrap(lambda r: seen.append(r) or dict(m=0.), 6, groups=groups, draws=50)
    for rows in seen[1:]:
        n = np.bincount(rows, minlength=6)
        assert n[0] == n[4] == n[5] and n[1] == n[2]
        assert n[0]+n[1]+n[3] == 3


def test_the_same_seed_gives_the_same_digits_and_the_global_generator_is_left_alone():
    a, b = readers(40)
    np.random.seed(3); before = np.random.get_state()[1].copy()
    assert concordance_correlation(a, b, draws=50, seed=4) == concordance_correlation(a, b, draws=50, seed=4)
    assert concordance_correlation(a, b, draws=50, seed=4) != concordance_correlation(a, b, draws=50, seed=5)
    assert (np.random.get_state()[1] == before).all()


# ICC

def anova(x): # from the formula of the textbook, by loops
    n, k = x.shape; m = x.mean()
    r = sum(k*(x[i].mean()-m)**2 for i in range(n))/(n-1)
    c = sum(n*(x[:,j].mean()-m)**2 for j in range(k))/(k-1)
    e = sum((x[i,j]-x[i].mean()-x[:,j].mean()+m)**2 for i in range(n) for j in range(k))/((n-1)*(k-1))
    return r, c, e


@settings(max_examples=40, deadline=None)
@given(st.integers(3, 12), st.integers(2, 5), st.integers(0, 10**6))
def test_icc_by_the_textbook(n, k, seed):
    x = np.random.default_rng(seed).normal(0, 1, (n, k))+np.random.default_rng(seed+1).normal(0, 2, (n, 1))
    r, c, e = anova(x)
    a, cons = icc(x), icc(x, 'C')
    assert a.value == pytest.approx((r-e)/(r+(k-1)*e+k/n*(c-e)))
    assert cons.value == pytest.approx((r-e)/(r+(k-1)*e))
    assert a.low <= a.value <= a.high <= 1 and cons.low <= cons.value <= cons.high <= 1
    assert icc(x+100).value == pytest.approx(a.value) and icc(x*7).value == pytest.approx(a.value)


def test_icc_of_shrout_and_fleiss_with_the_intervals_of_other_programs():
    x = np.array([[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]]) # doi 10.1037/0033-2909.86.2.420
    a, c = icc(x), icc(x, 'C')
    assert [round(v, 2) for v in (a.value, a.low, a.high)] == [.29, .02, .76]
    assert [round(v, 2) for v in (c.value, c.low, c.high)] == [.71, .34, .95]


def test_the_icc_interval_covers_as_often_as_it_says():
    rho, hits = .8, dict(A=0, C=0)
    for k in range(400):
        rng = np.random.default_rng(k)
        x = rng.normal(0, math.sqrt(rho), (30, 1))+rng.normal(0, math.sqrt(1-rho), (30, 2))
        for kind in 'AC':
            e = icc(x, kind); hits[kind] += e.low <= rho <= e.high
    assert all(.92 <= h/400 <= .98 for h in hits.values()), hits


def test_quadratic_kappa_is_the_icc_of_many_patients(): # Fleiss and Cohen 1973, doi 10.1177/001316447303300309
    rng = np.random.default_rng(0)
    a = rng.integers(0, 5, 20000); b = np.clip(a+rng.integers(-1, 2, 20000), 0, 4)
    assert weighted_kappa(a, b, 5, 'quadratic', draws=0).value == pytest.approx(icc(np.column_stack([a, b])).value, abs=1e-4)


# kappa

@pytest.mark.parametrize('weights', ['none', 'linear', 'quadratic'])
@pytest.mark.parametrize('seed', range(4))
def test_kappa_equals_scikit_learn(weights, seed):
    metrics = pytest.importorskip('sklearn.metrics')
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 4, 60); b = np.where(rng.random(60) < .5, a, rng.integers(0, 4, 60))
    theirs = metrics.cohen_kappa_score(a, b, labels=range(5), weights=None if weights == 'none' else weights)
    assert weighted_kappa(a, b, 5, weights, draws=0).value == pytest.approx(theirs)


def test_kappa_of_cohen_and_its_published_error():
    a, b = spread(COHEN)
    assert round(weighted_kappa(a, b, 3, 'none', draws=0).value, 3) == .492
    assert round(weighted_kappa(a, b, 3, [[0, 1, 3], [1, 0, 6], [3, 6, 0]], draws=0).value, 3) == .348
    p = COHEN/200; row, col = p.sum(1), p.sum(0); po, pe = np.trace(p), row@col # Fleiss, Cohen, Everitt 1969, doi 10.1037/h0028106
    k = (po-pe)/(1-pe)
    x = sum(p[i,i]*((1-pe)-(row[i]+col[i])*(1-po))**2 for i in range(3))
    y = (1-po)**2*sum(p[i,j]*(col[i]+row[j])**2 for i in range(3) for j in range(3) if i != j)
    se = math.sqrt((x+y-(po*pe-2*pe+po)**2)/200)/(1-pe)**2
    e = weighted_kappa(a, b, 3, 'none')
    assert (e.low, e.high) == pytest.approx((k-1.96*se, k+1.96*se), abs=.015)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=40))
def test_kappa_is_symmetric_and_at_most_one(pairs):
    a, b = map(np.array, zip(*pairs))
    one, other = (weighted_kappa(x, y, 4, draws=0).value for x, y in ((a, b), (b, a)))
    assert one is None and other is None or one == pytest.approx(other) and one <= 1+1e-12
    table = confusion(a, b, 'abcd')
    assert table.n == len(pairs) and table.up+table.down == table.off(1) and table.off(4) == 0


def test_classes_at_every_edge_of_every_scheme():
    for name, s in SCHEMES.items():
        edges = np.array([e+d for e in s.edges for d in (-.5, 0, .5) if e+d >= 0])
        assert classes_of_scores(edges, name).tolist() == [s.index(e) for e in edges]


def test_weights_are_checked():
    assert (disagreement(4, 'none') == 1-np.eye(4)).all()
    for bad in (np.ones((4, 4)), np.zeros((3, 3)), -disagreement(4), np.full((4, 4), np.nan)):
        with pytest.raises(ConfigError): disagreement(4, bad)


# order

def by_pairs(t, p):
    more = [(p[i]-p[j])*(t[i]-t[j]) for i in range(len(t)) for j in range(i) if t[i] != t[j]]
    return np.mean([1 if m > 0 else .5 if m == 0 else 0 for m in more]) if more else None


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), min_size=1, max_size=30))
def test_concordance_equals_the_count_of_pairs(pairs):
    t, p = map(np.array, zip(*pairs))
    c, d = concordance_index(t, p, draws=0).value, somers_d(t, p, draws=0).value
    assert c == (None if by_pairs(t, p) is None else pytest.approx(by_pairs(t, p)))
    if c is not None and len(np.unique(p)) > 1: assert d == pytest.approx(stats.somersd(t, p).statistic)


@pytest.mark.parametrize('n', [40, 200])
def test_concordance_of_many_distinct_references_equals_the_count_of_pairs(n):
    rng = np.random.default_rng(n)
    t, p = rng.normal(size=n).round(1), rng.normal(size=n).round(1)
    t[:35] = np.arange(35) # more than are counted in a table
    assert concordance_index(t, p, draws=0).value == pytest.approx(by_pairs(t, p))
    assert concordance_index(t, t*0, draws=0).value == .5 and concordance_index(t, t, draws=0).value == 1


def test_order_equals_scikit_learn():
    metrics = pytest.importorskip('sklearn.metrics')
    rng = np.random.default_rng(0)
    t = rng.integers(0, 4, 200); p = np.round(t+rng.normal(0, 1.5, 200), 1)
    two = t % 2
    assert concordance_index(two, p, draws=0).value == pytest.approx(metrics.roc_auc_score(two, p))
    pairs = [metrics.roc_auc_score(t[m] == j, p[m]) for i in range(4) for j in range(i+1, 4) for m in [(t == i) | (t == j)]]
    assert ordinal_auc(t, p, draws=0).value == pytest.approx(np.mean(pairs))


def test_classes_nobody_is_in_do_not_count():
    p = [1., 2., 3., 2.5]
    assert ordinal_auc([0, 4, 4, 7], p, draws=0).value == ordinal_auc([0, 1, 1, 2], p, draws=0).value


# differences

def test_bland_altman_of_known_differences():
    rng = np.random.default_rng(0)
    a = rng.uniform(0, 1000, 5000); b = a+rng.normal(-20, 50, 5000)
    r = bland_altman(a, b)
    assert r.bias.low < -20 < r.bias.high and r.low.low < -20-1.96*50 < r.low.high and r.high.low < -20+1.96*50 < r.high.high
    fit = stats.linregress(r.means, r.differences)
    assert r.slope.value == pytest.approx(fit.slope)


@pytest.mark.parametrize('scale', ['raw', 'log1p', 'sqrt'])
@pytest.mark.parametrize('data', [([0, 0], [0, 0]), ([5], [9]), ([0, 1e5], [3, 0]), ([1, 1, 1], [2, 2, 2])])
def test_every_picture_is_drawn(scale, data):
    from matplotlib.figure import Figure
    ax = Figure().subplots()
    show_bland_altman(bland_altman(*data, scale), ax)
    low, high = ax.get_ylim()
    d = bland_altman(*data, scale).differences
    assert low < d.min() and d.max() < high


@pytest.mark.parametrize('factor', [1.01, 1.08, 1.3, 1.9, 2.6, 30., 2000.])
def test_factors_are_marked_on_both_sides_however_small(factor):
    from matplotlib.figure import Figure
    ax = Figure().subplots()
    show_bland_altman(bland_altman([9999.]*2, [1e4*factor-1, 1e4/factor-1], 'log1p'), ax)
    low, high = ax.get_ylim()
    marks = {t.get_text(): y for t,y in zip(ax.get_yticklabels(), ax.get_yticks()) if low < y < high}
    assert marks.pop('=') == 0 and 2 <= sum(m[0] == '×' for m in marks) <= 3
    assert {'×÷'['÷×'.index(m[0])]+m[1:] for m in marks} == {*marks}
    assert all(y == pytest.approx(np.log(float(m[1:])) * (1 if m[0] == '×' else -1)) for m,y in marks.items())


# what is undefined, and what is refused

@pytest.mark.parametrize('f', [concordance_correlation, concordance_index, somers_d, bland_altman, lambda a, b: icc(np.column_stack([a, b])),
                               lambda a, b: weighted_kappa(classes_of_scores(a), classes_of_scores(b), 5), lambda a, b: threshold_measures(a, b, 100)])
@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_no_measure_takes_what_is_no_number(f, bad):
    with pytest.raises((AgreementError, ConfigError)): f([1., 2., bad], [1., 2., 3.])
    with pytest.raises((AgreementError, ConfigError)): f([1., 2., 3.], [1., bad, 3.])


def test_lengths_and_shapes_are_checked():
    for bad in (([1, 2], [1]), ([], []), ([[1, 2]], [[1, 2]]), (['a'], [1])):
        with pytest.raises(AgreementError): concordance_index(*bad)
    with pytest.raises(AgreementError): icc(np.zeros((3, 1)))


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('a,b', [([0]*7, [0]*7), ([5], [5]), ([3]*4, [3]*4), ([0]*5, [2, 0, 0, 1, 0]), ([1, 2], [2, 1]), ([7, 7, 9], [0, 0, 0])])
def test_degenerate_cohorts_give_defined_values_or_say_why_not(a, b, tmp_path):
    for name, s in (('a', a), ('b', b)): (tmp_path/name).write_text('series_uid,agatston\n'+''.join(f'u{k},{v}\n' for k, v in enumerate(s)))
    for method in ('percentile', 'bca'):
        e = evaluate_scores(tmp_path/'b', tmp_path/'a', draws=60, method=method)
        for k, m in named_measures(e).items():
            assert (m.value is None) <= bool(m.why), k
            assert (m.low is None) == (m.high is None)
            if m.value is not None: assert math.isfinite(m.value), k
            if m.low is not None: assert m.low <= m.high
        json.dumps(evaluate_json(e), allow_nan=False)
        show_evaluation(e).savefig(io.BytesIO(), format='png')
        assert 'nan' not in repr(e)


# tables

def table(path, rows, head='series_uid,status,agatston'):
    path.write_text('\n'.join([head, *rows])+'\n', encoding='utf-8'); return path


def test_every_row_of_both_tables_is_accounted_for(tmp_path):
    pred = table(tmp_path/'p.csv', ['a,scored,5', 'b,refused,', 'c,scored,', 'd,scored,7', 'f,refused,', ',refused,', 'g,scored,1'])
    truth = table(tmp_path/'t.csv', ['a,6', 'b,9', 'c,3', 'e,2', 'f,', 'g,', ',1'], 'series_uid,agatston')
    p = pair_scores(pred, truth)
    assert p.counts == dict(paired=1, refused=1, no_prediction=1, no_reference=1, neither=1, only_in_reference=1, only_in_prediction=1, nameless=2)
    assert {f.code for f in p.findings} == {'REFUSED', 'NO_PREDICTION', 'ONLY_IN_REFERENCE', 'ONLY_IN_PREDICTION', 'NAMELESS'}


def test_what_excel_writes_is_read(tmp_path):
    (tmp_path/'x.csv').write_bytes('\ufeffseries_uid;agatston\r\n1.2;207,5\r\n1.3;0\r\n'.encode())
    assert [r.score for r in read_score_table(tmp_path/'x.csv', 'series_uid').values()] == [207.5, 0]


@pytest.mark.parametrize('raw', [b'', b'\n\n', b'\xff\xfe\x00', b'series_uid,agatston\n1,0x10\n', b'series_uid,agatston\n1,1e999\n', b'series_uid,agatston\n1,nan\n',
                                 b'series_uid,agatston\n1,-0.5\n', b'agatston\n5\n', b'series_uid\n5\n', b'series_uid,agatston\n"1,5\n', b'series_uid,agatston\n'+b'1'*200000+b',5\n', b'series_uid,agatston,agatston\n1,5,6\n', b'series_uid,agatston\n1\n', b'series_uid,agatston\n1,5,9,9\n'])
def test_strange_tables_are_refused_or_read_but_never_a_traceback(raw, tmp_path):
    (tmp_path/'x.csv').write_bytes(raw)
    good = table(tmp_path/'g.csv', ['1,5'], 'series_uid,agatston')
    try: evaluate_scores(tmp_path/'x.csv', good, draws=10)
    except AgreementError as e: assert str(tmp_path) not in str(e)
    else: assert raw.endswith(b'9,9\n')


def test_a_folder_is_no_table(tmp_path):
    with pytest.raises(AgreementError): pair_scores(tmp_path, tmp_path)


def test_several_series_of_a_patient_widen_the_interval_and_are_said(tmp_path):
    a, b = readers(30, 3)
    row = lambda s: [f'p{k},u{k}-{j},{v}' for k, v in enumerate(s) for j in range(4)]
    head = 'patient,series_uid,agatston'
    four = evaluate_scores(table(tmp_path/'p', row(b), head), table(tmp_path/'t', row(a), head), draws=300)
    bare = [r.split(',', 1)[1] for r in row(b)], [r.split(',', 1)[1] for r in row(a)]
    apart = evaluate_scores(table(tmp_path/'p2', bare[0], 'series_uid,agatston'), table(tmp_path/'t2', bare[1], 'series_uid,agatston'), draws=300)
    wide = lambda e: e.measures['kappa_linear'].high-e.measures['kappa_linear'].low
    assert wide(four) > 1.5*wide(apart)
    assert 'REPEATED' in {f.code for f in four.findings} and not apart.findings


def test_joined_by_patient_no_name_is_told(tmp_path):
    pred = table(tmp_path/'p', ['Zorglub,0', 'Folamour,9'], 'patient,agatston'); truth = table(tmp_path/'t', ['Zorglub,12', 'Folamour,8'], 'patient,agatston')
    e = evaluate_scores(pred, truth, draws=20)
    assert e.false_zeros and 'Zorglub' not in repr(e)+json.dumps(evaluate_json(e))


def test_the_measures_are_those_of_pandas_and_scipy(tmp_path):
    a, b = readers(80, 5)
    rows = lambda s: [f'u{k},{v}' for k, v in enumerate(s)]
    e = evaluate_scores(table(tmp_path/'p', rows(b), 'series_uid,agatston'), table(tmp_path/'t', rows(a), 'series_uid,agatston'), draws=50)
    m = {k: v.value for k, v in e.measures.items()}
    assert m['pearson'] == pytest.approx(stats.pearsonr(a, b).statistic) and m['spearman'] == pytest.approx(stats.spearmanr(a, b).statistic)
    assert m['mean_difference'] == pytest.approx(np.abs(a-b).mean()) and m['median_difference'] == pytest.approx(np.median(np.abs(a-b)))
    assert m['icc_a_log1p'] == pytest.approx(icc(np.column_stack([np.log1p(a), np.log1p(b)])).value)
    for name, s in SCHEMES.items():
        x, y = classes_of_scores(a, name), classes_of_scores(b, name)
        assert e.kappas[name]['linear'].value == pytest.approx(weighted_kappa(x, y, len(s.labels), draws=0).value)
        assert e.kappas[name]['same'].value == pytest.approx(np.mean(x == y))
    for t in (100, 300, 400):
        tp, fp, fn = ((a >= t) & (b >= t)).sum(), ((a < t) & (b >= t)).sum(), ((a >= t) & (b < t)).sum()
        assert e.thresholds[t]['f1'].value == pytest.approx(2*tp/(2*tp+fp+fn))
    assert evaluate_json(e)['schema'] == EVALUATE_SCHEMA
    assert pd.DataFrame(e.classes.counts).equals(pd.DataFrame(pd.crosstab(pd.Categorical(classes_of_scores(a), range(5)), pd.Categorical(classes_of_scores(b), range(5)), dropna=False).values))


def test_the_same_tables_give_the_same_evaluation(tmp_path):
    a, b = readers(30, 7)
    rows = lambda s, order: [f'u{k},{s[k]}' for k in order]
    truth = table(tmp_path/'t', rows(a, range(30)), 'series_uid,agatston')
    one, two = (table(tmp_path/n, rows(b, o), 'series_uid,agatston') for n, o in (('p1', range(30)), ('p2', range(29, -1, -1))))
    assert evaluate_json(evaluate_scores(one, truth, draws=50)) == evaluate_json(evaluate_scores(two, truth, draws=50))


@pytest.mark.data
def test_the_published_scores_of_deepcac(tmp_path):
    "Paired scores that its authors published (stats/Results_NLST.csv of their code): figures computed by other code before"
    import os
    where = os.environ.get('DEEPCAC_NLST_CSV')
    if not where: pytest.skip('DEEPCAC_NLST_CSV does not name a copy of the published Results_NLST.csv')
    t = pd.read_csv(where)
    for name, column in (('p', 'CAC_AI'), ('t', 'CAC_manual')):
        t[['PID', column]].rename(columns=dict(PID='series_uid') | {column: 'agatston'}).to_csv(tmp_path/name, index=False)
    e = evaluate_pairs(pair_scores(tmp_path/'p', tmp_path/'t'), 'rumberger', draws=0)
    m = {k: v.value for k, v in e.measures.items()}
    got = [m[k] for k in ('icc_a', 'icc_c', 'icc_a_log1p', 'spearman', 'pearson')]
    assert got == pytest.approx([.771, .786, .880, .893, .863], abs=6e-4)
    b = e.differences['raw']
    assert (b.bias.value, b.low.value, b.high.value) == pytest.approx((-136.2, -1023.6, 751.2), abs=.06)
    known = dict(rumberger=(.692, .611, .763, .862), deepcac=(.720, .618, .755, .857), ai_cac=(.735, .642, .760, .855), utrecht_ldct=(.778, .692, .793, .875))
    for s, figures in known.items(): assert [v.value for v in e.kappas[s].values()] == pytest.approx(figures, abs=6e-4)
    above = {t: [e.thresholds[t][k].value for k in ('sensitivity', 'specificity', 'f1')] for t in (0, 100, 300, 400)}
    assert above[0][:2] == pytest.approx([.917, .621], abs=6e-4)
    for t, figures in {100: (.914, .941, .919), 300: (.798, .971, .856), 400: (.777, .993, .865)}.items(): assert above[t] == pytest.approx(figures, abs=6e-4)


# lesions

def masks(seed, shape=(6, 20, 20), n=7):
    rng = np.random.default_rng(seed)
    def one():
        m = np.zeros(shape, np.uint8)
        for _ in range(rng.integers(0, n)):
            c, s = [rng.integers(0, k) for k in shape], rng.integers(1, 5, 3)
            m[tuple(slice(a, a+b) for a, b in zip(c, s))] = rng.integers(1, 6)
        return m
    g = Geometry.from_spacing(shape, (2.5, .7, .7))
    return MaskVolume(one(), g), MaskVolume(one(), g)


@pytest.mark.parametrize('connectivity', [6, 26])
@pytest.mark.parametrize('seed', range(12))
def test_matching_equals_a_loop_over_lesions(seed, connectivity):
    ref, pred = masks(seed)
    m = match_lesions(ref, pred, connectivity=connectivity, min_share=.3)
    structure = ndi.generate_binary_structure(3, {6: 1, 26: 3}[connectivity])
    for data, other, size, met in ((ref.data, pred.data, m.reference_mm3, m.found), (pred.data, ref.data, m.predicted_mm3, m.true)):
        parts, n = ndi.label(data > 0, structure)
        assert n == len(size)
        for k in range(n):
            at = parts == k+1
            assert size[k] == pytest.approx(at.sum()*2.5*.49) and met[k] == ((other[at] > 0).mean() > .3)
    both = ((ref.data > 0) & (pred.data > 0)).sum()*2.5*.49
    total = ((ref.data > 0).sum()+(pred.data > 0).sum())*2.5*.49
    assert m.measures['f1_mm3'] == pytest.approx(2*both/total) if total else math.isnan(m.measures['f1_mm3'])


def test_a_mask_is_itself():
    for seed in range(5):
        ref, _ = masks(seed, n=9)
        m = match_lesions(ref, ref)
        if len(m.found): assert list(m.measures.values()) == pytest.approx([1, 1, 1, 0, 1, 1, 1])
        table = vessel_confusion(ref, ref)
        assert table.counts.sum() == np.trace(table.counts) == len(m.found)


def test_every_lesion_is_in_the_table_of_vessels_once():
    for seed in range(12):
        ref, pred = masks(seed)
        m, t = match_lesions(ref, pred), vessel_confusion(ref, pred)
        assert t.counts[1:].sum() == len(m.found) and t.counts[1:,0].sum() == (~m.found).sum() and t.counts[0].sum() == (~m.true).sum()


def test_froc_equals_a_loop_over_thresholds():
    rng = np.random.default_rng(0)
    scans, kept = [], []
    for seed in range(8):
        ref, pred = masks(seed+100)
        parts, n = ndi.label(pred.data > 0)
        p = rng.random(n).round(1)
        scans.append(froc_scan(ref, pred.like(parts.astype(np.int32)), p)); kept.append((ref.data > 0, parts, p))
    f = froc(scans)
    for t, sens, false in zip(f.thresholds, f.sensitivity, f.false_per_scan):
        hit = wrong = total = 0
        for ref, parts, p in kept:
            lesions, k = ndi.label(ref, np.ones((3, 3, 3)))
            on = np.isin(parts, np.flatnonzero(p >= t)+1)
            hit += sum(on[lesions == i+1].any() for i in range(k)); total += k
            wrong += sum(p[i] >= t and not ref[parts == i+1].any() for i in range(len(p)))
        assert (sens, false) == (pytest.approx(hit/total), pytest.approx(wrong/8))
    assert f.mean_sensitivity == pytest.approx(np.mean([f.at(a) for a in FROC_AT]))
    e = froc_estimates(scans, draws=50)
    assert e['mean'].value == pytest.approx(f.mean_sensitivity)


def test_pooled_figures_are_sums_over_scans():
    pairs = [match_lesions(*masks(s)) for s in range(10)]
    e = detection_estimates(pairs, draws=100, groups=[0, 0, 1, 1, 2, 3, 4, 5, 6, 7])
    found, all_ = sum(p.found.sum() for p in pairs), sum(len(p.found) for p in pairs)
    assert e['sensitivity'].value == pytest.approx(found/all_) and e['sensitivity'].low <= found/all_ <= e['sensitivity'].high
    assert e['false_per_scan'].value == pytest.approx(sum((~p.true).sum() for p in pairs)/10)


def test_estimates_compare_and_print():
    assert Estimate(.5, n=3) == Estimate(.5, n=3) != Estimate(.5, n=4)
    with pytest.raises(ConfigError): Estimate(level=1.5)
    with warnings.catch_warnings():
        warnings.simplefilter('error'); assert 'undefined' in repr(Estimate(why='none'))
