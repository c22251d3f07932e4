"Reports: one static page, no script, no request, both languages, whatever text the images bring."
import re, subprocess, sys
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import jfr2020
from jfr2020.calcium.score import calcium_score
from jfr2020.calcium.case import CaseResult, case_json
from jfr2020.ground.notice import NOTICE
from jfr2020.calcium.categories import SCHEMES, cac_drs, risk_category
from jfr2020.ground.errors import ConfigError, DicomSeriesError, Finding, NotScoreable
from jfr2020.ground.geometry import Geometry
from jfr2020.calcium.lesions import REJECTIONS
from jfr2020.report.pictures import Picture, draw_picture, outline, overview_picture, plane_pictures, scene, slice_pictures
from jfr2020.report.html import PAGE_BYTES, case_picture, case_report, cohort_report
from jfr2020.ground.volume import CTVolume, MaskVolume, flip
from jfr2020.report.languages import LANGUAGES, PHRASES, TITLES, Words

ASSETS = Path(jfr2020.__file__).parent/'report'/'assets'
NASTY = ['<script>alert(1)</script>', '"><img src=x onerror=alert(1)>', "'><svg/onload=alert(1)>", '</title><script>1</script>',
         '</style><script>1</script>', '<!--', '-->', '<iframe src=javascript:alert(1)>', '{{ 7*7 }}', '{% raw %}', '{{ case.ct }}',
         '&lt;script&gt;', '<a href="http://evil.example/">x</a>', '<link rel=stylesheet href=//evil.example>',
         '<meta http-equiv=refresh content=0>', '\x00\x1b[31m', '\u202egnp.exe', 'a'*5000, '</section></main>',
         '" style="background:url(http://evil.example)" x="', '${7*7}', '<base href=//evil.example>']


class Facts:
    def __init__(self, **kw): vars(self).update(kw)


class Box:
    def __init__(self, g, start, stop, reason='by hand'):
        self.start, self.stop, self.confidence, self.reason = start, stop, .8, reason
        self.corners_mm = np.sort(g.to_world(np.array([start, stop])-.5), axis=0)


def make(seed=0, depth=12, size=64, lesions=True, noise=12, **kw):
    g = Geometry.from_spacing((depth, size, size), (3, 2, 2))
    d, h, w = np.indices(g.shape)
    hu = np.where((h-size/2)**2+(w-size/2)**2 < (size/3)**2, 40, -80)
    hu = hu+np.random.default_rng(seed).normal(0, noise, g.shape)
    if lesions: hu[4:6, 28:32, 40:46], hu[8, 40:44, 24:27] = 420, 300
    ct = CTVolume(hu.astype('i2'), g)
    m = MaskVolume(np.where(ct.data >= 200, np.where(w > 35, 2, 4), 0).astype('u1'), g)
    s = calcium_score(ct, m)
    more = dict(box=Box(g, (2, 12, 12), (depth-1, size-10, size-10)), ct=ct, mask=m, geometry=g) | kw
    return CaseResult('1.2.3', 'a/scan', score=s, category=risk_category(s.agatston),
                      cac_drs=cac_drs(s.agatston, s.n_vessels), **more)


REFUSED = CaseResult('1.2.4', 'a/other', refusal=DicomSeriesError('one slice missing', 'MISSING_SLICE', 'export again'))


class Page(HTMLParser):
    "Tags and attributes that a browser would see"
    void = {'meta', 'link', 'br', 'img', 'base', 'input'}

    def __init__(self, html):
        super().__init__()
        self.tags, self.attrs, self.open, self.text, self.bad = [], [], [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attrs += [(tag, k, v) for k, v in attrs]
        if tag not in self.void: self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attrs += [(tag, k, v) for k, v in attrs]

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag: self.bad.append(tag)

    def handle_data(self, data): self.text.append(data)


def check_static(html):
    "No script, no handler, no address outside of the page; well formed; the policy and the notice are there"
    p = Page(html)
    assert not p.bad and not p.open, (p.bad, p.open)
    assert not {'script', 'iframe', 'img', 'link', 'object', 'embed', 'form', 'base', 'video'} & set(p.tags)
    for tag, k, v in p.attrs:
        assert not k.startswith('on') and 'javascript:' not in (v or '')
        if k in ('src', 'href', 'srcset', 'action', 'xlink:href', 'data'):
            assert v.startswith('data:image/jpeg;base64,') if tag == 'image' else re.fullmatch(r'[\w./%-]+', v), (tag, v[:60])
    assert "default-src 'none'" in html and len(html.encode()) <= PAGE_BYTES
    css = html.split('<style>')[1].split('</style>')[0]
    assert 'url(' not in css and '@import' not in css
    assert p.tags.count('style') == 1 and p.tags.count('meta') == 4
    return p


@pytest.mark.parametrize('lang', LANGUAGES)
def test_pages_are_static_and_say_what_counts(lang):
    t = Words(lang)
    case = make(findings=(Finding('KVP', 'at 100 kV'), Finding('METAL', '3 mm3')), seconds=dict(read=.1, total=1.),
                facts=Facts(kvp=100., kernel='B35f', thickness_mm=3., manufacturer='M', model='X', description='CaSc'))
    html = case_report(case, lang)
    text = ' '.join(check_static(html).text)
    for said in (NOTICE[lang], case.score.printed, case.cac_drs, t('slices'), t('region'), t.title('KVP'), t('protocol'),
                 'at 100 kV', 'B35f', 'by hand', case.score.rule.source, t('density')):
        assert said in text, said
    assert f'<html lang="{lang}">' in html
    check_static(case_report(REFUSED, lang))
    assert t.title('MISSING_SLICE') in case_report(REFUSED, lang)
    both = cohort_report([case, REFUSED], lang, links={'1.2.3': 'r/1.html'}, truth={'1.2.3': 500.})
    assert t('agreement') in both and 'r/1.html' in both
    check_static(both)


@pytest.mark.parametrize('text', NASTY, ids=range(len(NASTY)))
def test_text_of_the_images_stays_text(text):
    finding = (Finding(text, text),)
    facts = Facts(description=text, modality=text, manufacturer=text, model=text, kernel=text, contrast=text, syntax=text)
    box = Box(make(lesions=False).geometry, (2, 12, 12), (11, 50, 50), text)
    plain = check_static(case_report(make()))
    case = replace(make(box=box), series_uid=text, input=text, findings=finding, facts=facts, settings=dict(slice_rule=text),
                   rejected=(dict(rule=text, volume_mm3=1., peak_hu=200, centre_mm=(0, 0, 0)),), seconds={text: 1.},
                   model=dict(name=text, sha256=text))
    page = check_static(case_report(case))
    assert set(page.tags) <= set(plain.tags) | {'ul', 'details', 'summary', 'code', 'li', 'span', 'dl', 'dt', 'dd', 'table', 'br', 'circle'}
    said = ' '.join(page.text)
    assert text[:80].replace('\x00', '') in said.replace('\x00', '').replace('\ufffd', '') and '49' != said.strip()
    bad = CaseResult(text, text, refusal=NotScoreable(text, text, text), ct=case.ct, findings=finding)
    check_static(case_report(bad))
    pages = cohort_report([case, bad], name=text, links={text: text}, truth={text: 3.})
    html = pages.replace('%3A', ':')
    assert '<script' not in html and 'onerror=alert(1)>' not in re.sub(r'&[^;]+;', '', pages)
    p = Page(pages)
    assert not p.bad and not p.open and 'script' not in p.tags and 'img' not in p.tags
    assert all(':' not in v for t_, k, v in p.attrs if (t_, k) == ('a', 'href'))


def test_nothing_of_the_template_language_runs():
    html = case_report(replace(REFUSED, series_uid='{{ 7*7 }}'))
    assert '{{ 7*7 }}' in html


def rooms_of(module): # files of the library that it brings, in a fresh process
    code = f'import sys, {module}; print(*(m.__file__ for n, m in sys.modules.items() if n.startswith("jfr2020.")), sep="\\n")'
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    return [Path(p) for p in out.splitlines()]


def test_words_are_complete():
    for f in ASSETS.glob('*.j2'):
        for key in re.findall(r"\bt\('(\w+)'", f.read_text()): assert key in PHRASES, (f.name, key)
    code = (Path(jfr2020.__file__).parent/'report'/'html.py').read_text() + ''.join(f.read_text() for f in ASSETS.glob('*.j2'))
    known = {'axial', 'coronal', 'sagittal', 'LM', 'LAD', 'LCX', 'RCA', 'other'} # planes and vessels are looked up by name
    unused = {k for k in PHRASES if k not in known and not re.search(rf"['\"]{k}['\"]", code)}
    assert not unused, unused
    code = ''.join(f.read_text() for f in rooms_of('jfr2020.cli.score')) # what a store finds stands in no report
    said = {test.__name__.lstrip('_') for test, _ in REJECTIONS} | set(re.findall(r"Finding\(\s*'([A-Z_]+)'", code))
    assert not said - set(TITLES), 'give them a title in nbs/report/01_languages.ipynb'
    for table in (PHRASES, TITLES):
        for both in table.values(): assert len(both) == len(LANGUAGES) and all(both), both


def test_french_page_holds_no_english_phrase():
    fr = case_report(make(findings=(Finding('KVP', 'x'),)), 'fr')
    text = ' '.join(Page(fr).text)
    for en, other in PHRASES.values():
        if en != other and len(en) > 12 and '{' not in en: assert en not in text, en


def test_worst_case_fits():
    big = make(depth=150, size=256, lesions=False, noise=25)
    data = big.ct.data.copy()
    at = np.random.default_rng(1)
    for d in range(150):
        for _ in range(6):
            h, w = at.integers(40, 210, 2)
            data[d, h:h+4, w:w+5] = 500
    ct = CTVolume(data, big.geometry)
    m = MaskVolume((data >= 400).astype('u1')*2, ct.geometry)
    s = calcium_score(ct, m)
    case = replace(big, ct=ct, mask=m, score=s, category=risk_category(s.agatston), cac_drs=cac_drs(s.agatston, 1),
                   rejected=tuple(dict(rule='bone', volume_mm3=float(k), peak_hu=400, centre_mm=(1, 2, 3)) for k in range(3000)))
    html = case_report(case)
    check_static(html)
    assert len(s.lesions) > 300 and re.search(r'\d+ calcified slices with less calcium are not shown', html)
    noisy = MaskVolume((data > 0).astype('u1')*5, ct.geometry) # a mask that is no calcium at all
    check_static(case_report(replace(case, mask=noisy, score=calcium_score(ct, noisy))))
    check_static(cohort_report([case_json(REFUSED)]*5000))


def test_pages_without_pixels_or_with_a_refused_scan():
    assert PHRASES['no_pictures'][0] in case_report(replace(make(), ct=None, mask=None))
    seen = case_report(CaseResult('1', 'x', refusal=NotScoreable('no lung', 'NO_HEART'), ct=make().ct))
    assert seen.count('<figure>') == 3 and PHRASES['glance'][0] in seen
    zero = make(lesions=False)
    assert PHRASES['zero'][0] in case_report(zero) and zero.score.agatston == 0


@pytest.mark.parametrize('scheme', list(SCHEMES))
def test_every_scheme_marks_its_class(scheme):
    case = make()
    c = risk_category(case.score.agatston, scheme)
    html = case_report(replace(case, category=c))
    marked = re.findall(r'class="on"[^>]*>([^<]*)<', html)
    assert marked == [c.label.replace('>=', '≥').replace('>', '&gt;').replace('<', '&lt;')]


def test_outline_is_the_border():
    rng = np.random.default_rng(0)
    for _ in range(30):
        a = rng.random((9, 11)) < .4
        edges, area = outline(a, (2., 3.))
        pad = np.pad(a, 1)
        want = 3*np.abs(np.diff(pad.astype(int), axis=0)).sum() + 2*np.abs(np.diff(pad.astype(int), axis=1)).sum()
        got = sum(float(x) for x in re.findall(r'[hv](-?[\d.]+)', edges))
        assert np.isclose(got, want)
        cells = [(float(x), float(y), float(n), float(k)) for x, y, n, k in
                 re.findall(r'M([\d.]+) ([\d.]+)h([\d.]+)v([\d.]+)', area)]
        back = np.zeros_like(a)
        for x, y, n, _ in cells: back[round(y/2), round(x/3):round((x+n)/3)] = True
        assert np.array_equal(back, a)


@pytest.mark.parametrize('axes', [(), (0,), (1,), (2,), (0, 1, 2)])
def test_pictures_do_not_depend_on_storage(axes):
    case = make()
    ct, m = case.ct, case.mask
    for a in axes: ct, m = flip(ct, a), flip(m, a)
    other = replace(case, ct=ct, mask=m, geometry=ct.geometry, score=calcium_score(ct, m))
    a, b = scene(case), scene(other)
    strip = lambda p: dict(asdict(p), slice=None)
    assert [strip(p) for p in slice_pictures(a)[0]] == [strip(p) for p in slice_pictures(b)[0]]
    assert overview_picture(a) == overview_picture(b) and plane_pictures(a) == plane_pictures(b)
    d = np.flatnonzero(m.data.any((1, 2)))
    assert sorted(p.slice for p in slice_pictures(b)[0]) == list(d)


def test_heart_box_is_drawn_where_it_is():
    case = make()
    for p in plane_pictures(scene(case)):
        (x, y, w, h), = p.boxes
        k = dict(axial=(1, 2), coronal=(0, 2), sagittal=(0, 1))[p.plane]
        size = (np.array(case.box.stop)-case.box.start)*case.geometry.spacing
        assert np.allclose((h, w), (size[k[0]], size[k[1]]))
        first = case.box.start[k[0]] if k[0] else case.geometry.shape[0]-case.box.stop[0]
        assert np.isclose(y, first*case.geometry.spacing[k[0]]) and np.isclose(x, case.box.start[k[1]]*case.geometry.spacing[k[1]])


def test_cohort_counts_and_agreement():
    case = make()
    a = case.score.agatston
    entries = [case_json(replace(case, series_uid=str(k))) for k in range(5)] + [case_json(REFUSED)]
    html = cohort_report(entries, truth={str(k): a+k for k in range(4)})
    assert 'same category: 4 / 4; median absolute difference: 1.5' in html
    assert len(re.findall('<circle', html)) == 4
    assert cohort_report([]) and cohort_report([REFUSED], 'fr')
    p = case_picture(case)
    assert Picture(**asdict(p)) == p and p.size < 20_000
    assert '<svg' in cohort_report(entries, pictures={'1': p}).split('</style>')[1]


def test_cohort_by_place_where_uids_are_empty():
    case = make()
    lost = [replace(REFUSED, series_uid='', input=f'in/{n}') for n in 'ab']
    a, p = case.score.agatston, case_picture(case)
    for cases in ([*lost, case], [case_json(c) for c in (*lost, case)]):
        html = cohort_report(cases, links=['r/a.html', 'r/b.html', 'r/c.html'], truth=[None, None, a], pictures=[None, None, p])
        check_static(html)
        assert re.findall('<a href="([^"]*)">([^<]*)', html) == [(f'r/{n}.html', m) for n, m in zip('abc', ('a', 'b', 'scan'))]
        assert html.count('<circle') == 1 and html.count('data:image') == 1
        with pytest.raises(ConfigError, match='one entry for each case'): cohort_report(cases, links=['r/a.html'])
    assert cohort_report([], links=[], truth=[], pictures=[])


def test_candidates_turned_down_are_pointed_at():
    turned = [dict(rule='bone', why='a rib', volume_mm3=9000., peak_hu=600, centre_mm=(0, 0, 0)),
              dict(rule='outside', why='beyond the box', volume_mm3=20., peak_hu=200, centre_mm=(60, 0, 0)),
              dict(rule='lung', why='touches air', volume_mm3=12., peak_hu=200, centre_mm=(10, -5, 1))]
    case = make(rejected=tuple(turned))
    html = case_report(case)
    assert html.index('touches air') < html.index('a rib') < html.index('beyond the box') and '<b>a</b>' in html and '<b>b</b>' not in html
    circle, = re.findall('<circle cx="([0-9.]+)" cy="([0-9.]+)"', html)
    p = overview_picture(scene(case), rings=[('a', (10, -5, 1))])
    assert np.allclose([float(c) for c in circle], p.rings[0][:2], atol=.01)
    x0, y0 = case.geometry.to_world([[0, scene(case).low[1], scene(case).low[2]]])[0][:2] + [1, 1] # faces, 2 mm pixels
    assert np.allclose(p.rings[0][:2], (x0-10, y0+5))


def test_reports_repeat():
    assert case_report(make()) == case_report(make())


def test_picture_follows_the_voxel_shape():
    p = draw_picture(np.zeros((10, 40), 'i2'), (3., .5), 'coronal')
    assert (p.width, p.height, p.letters) == (20., 30., ('R', 'L', 'S', 'I'))
