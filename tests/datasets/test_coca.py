"The COCA readers: outlines, faulty files, scores, segmentations, spreadsheets."
import math
import pickle
import plistlib
import warnings
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import ndimage as ndi

from jfr2020.calcium.score import agatston
from jfr2020.datasets.cases import load_ct, load_mask
from jfr2020.datasets.coca import (MAX_POINTS, ROI_FAULTS, CocaError, CocaMask, CocaRoi, brush_outline, coca_score, draw_rois, pixels_in_polygon,
                          read_coca, read_coca_nongated, read_coca_xml, score_cases, write_coca, write_coca_xml)
from jfr2020.datasets.coca_segmentations import place_segments, read_coca_segmentations, read_segment_names, segment_class, write_segmentation
from jfr2020.ground.errors import JfrError
from jfr2020.ground.geometry import Geometry
from jfr2020.files.tables import SheetError, read_xlsx, write_xlsx
from jfr2020.synth.thorax import chest_phantom
from jfr2020.ground.volume import CTVolume, MaskVolume


def crossing(points, y, x):
    "The rule, one pixel at a time"
    inside = False
    for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, 0)):
        if (y0 <= y) != (y1 <= y) and x < x0+(y-y0)*(x1-x0)/(y1-y0): inside = not inside
    return inside


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(-3, 13), st.floats(-3, 13)), min_size=3, max_size=12))
def test_rule_against_its_definition(points):
    p = np.array(points)
    want = [[crossing(p, y, x) for x in range(10)] for y in range(9)]
    assert np.array_equal(pixels_in_polygon(p, (9, 10)), want)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.floats(.3, .8))
def test_brush_outline_selects_what_it_surrounds(seed, density):
    on = np.random.default_rng(seed).random((9, 11)) < density
    parts, n = ndi.label(on)
    for k in range(1, n+1):
        part = parts == k
        if (ndi.binary_fill_holes(part) != part).any(): continue
        p = brush_outline(part)
        assert np.array_equal(pixels_in_polygon(p, part.shape), part)
        assert np.array_equal(pixels_in_polygon(p[::-1], part.shape), part) # either way around
        assert np.array_equal(pixels_in_polygon(np.roll(p, 3, 0), part.shape), part)


def test_fixture_recipe_of_blocks():
    d = .996078
    for w, h in ((w, h) for w in range(1, 9) for h in range(1, 9)):
        x0, y0 = 3, 4
        p = ([(x0-d, y0+j) for j in range(h)] + [(x0+i, y0+h-1+d) for i in range(w)]
             + [(x0+w-1+d, y0+j) for j in range(h)[::-1]] + [(x0+i, y0-d) for i in range(w)[::-1]])
        got = pixels_in_polygon(p, (16, 16))
        assert got.sum() == w*h and got[y0:y0+h, x0:x0+w].all()


def test_outline_beyond_the_image_and_degenerate():
    assert pixels_in_polygon([(-5, -5), (-5, 50), (50, 50), (50, -5)], (6, 7)).all()
    assert not pixels_in_polygon([], (6, 7)).any() and not pixels_in_polygon([(1, 1)]*3, (6, 7)).any()
    with pytest.raises(CocaError): pixels_in_polygon(np.zeros((MAX_POINTS+1, 2)), (6, 7))


@pytest.fixture(scope='module')
def chests(): return [chest_phantom(s, agatston=a, matrix=128, decoys=None) for s, a in ((2, 500.), (5, 0.))]


@pytest.fixture(scope='module')
def made(chests, tmp_path_factory): return write_coca(tmp_path_factory.mktemp('coca'), chests, chests)


def test_round_trip(chests, made):
    gated = read_coca(made)
    assert [c.patient for c in gated] == ['0', '1'] and gated[1].score == 0 and gated.report[0].finding.code == 'NO_XML'
    mask, checks = gated[0].mask.draw()
    assert np.array_equal(mask.data, chests[0].lesions.data)
    assert all(c.used and c.expected == c.pixels and not set(c.faults) - {'DEV_NAN'} for c in checks)
    assert coca_score(gated[0]).agatston == pytest.approx(agatston(chests[0].ct, chests[0].lesions))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert np.array_equal(load_mask(pickle.loads(pickle.dumps(gated[0].mask))).data, mask.data)
    names = [p.name for p in sorted((made/'Gated_release_final/patient/0').rglob('*.dcm'))]
    assert names[0] == 'IM-0000-0001.dcm' and len(names) == chests[0].ct.shape[0]


def test_image_index_counts_from_the_lowest_slice(chests, made, tmp_path):
    rois = read_coca_xml(made/'Gated_release_final/calcium_xml/0.xml')
    ct = chests[0].ct
    mask = draw_rois(ct, [replace(r, z_mm=math.nan) for r in rois])[0]
    assert np.array_equal(mask.data, chests[0].lesions.data)
    down = ct[::-1] # the same scan stored from the top
    mask, checks = draw_rois(down, [replace(r, z_mm=math.nan) for r in rois])
    assert np.array_equal(mask.data[::-1], chests[0].lesions.data) and all('BY_INDEX' in c.faults for c in checks)
    assert not any('INDEX' in c.faults for c in draw_rois(down, rois)[1])
    assert all('INDEX' in c.faults for c in draw_rois(ct, [replace(r, index=r.index+1) for r in rois])[1])


def small(value=300):
    g = Geometry.from_spacing((4, 16, 16), (3, .5, .5))
    hu = np.full(g.shape, 40, 'i2'); hu[1:3, 4:8, 4:8] = value
    return CTVolume(hu, g)


def roi(ct, k, pixels, vessel=2, **said):
    part = np.zeros(ct.shape[1:], bool); part[pixels] = True
    hu, (_, dy, dx) = ct.data[k][part].astype(float), ct.spacing
    own = dict(area_cm2=part.sum()*dx*dy/100, mean=hu.mean(), min=hu.min(), max=hu.max(), dev=0., total=hu.sum())
    return CocaRoi(vessel, k, brush_outline(part), float(ct.geometry.to_world([[k, 0, 0]])[0, 2]), own | said)


def test_slice_within_half_an_increment():
    ct = small()
    r = roi(ct, 1, np.s_[4:6, 4:6])
    for dz, used in ((1.4, 1), (1.5, 1), (1.6, 2), (-1.6, 0)):
        assert draw_rois(ct, [replace(r, z_mm=r.z_mm+dz)])[1][0].slice in (used, 2 if dz == 1.5 else used)
    assert draw_rois(ct, [replace(r, z_mm=r.z_mm+8)])[1][0].faults[0] == 'NO_SLICE'


@pytest.mark.parametrize('fault,change', [('COUNT', dict(area_cm2=.5)), ('MIN', dict(min=12.)), ('MAX', dict(max=900.)),
                                          ('MEAN', dict(mean=310.)), ('TOTAL', dict(total=5.)), ('AREA_0', dict(area_cm2=0.)),
                                          ('DEV_NAN', dict(dev=math.nan))])
def test_each_number_of_the_file_is_compared(fault, change):
    ct = small()
    good, bad = roi(ct, 1, np.s_[4:6, 4:6]), roi(ct, 1, np.s_[4:6, 4:6], **change)
    assert draw_rois(ct, [good])[1][0].faults == ()
    mask, (check,) = draw_rois(ct, [bad])
    assert fault in check.faults and check.used and mask.data.sum() == 8
    mask, (check,) = draw_rois(ct, [bad], skip=(fault,))
    assert not check.used and not mask.data.any()


def test_overlap_keeps_the_first_vessel():
    ct = small()
    a, b, c = roi(ct, 1, np.s_[4:6, 4:6], 2), roi(ct, 1, np.s_[4:8, 4:6], 4), roi(ct, 1, np.s_[4:6, 4:7], 2)
    mask, checks = draw_rois(ct, [a, b, c])
    assert [('OVERLAP' in k.faults) for k in checks] == [False, True, False]
    assert (mask.data[1, 4:6, 4:6] == 2).all() and (mask.data[1, 6:8, 4:6] == 4).all() and (mask.data[1, 4:6, 6] == 2).all()


def test_faulty_outlines_warn_or_refuse(chests, made, tmp_path):
    doc = plistlib.loads((made/'Gated_release_final/calcium_xml/0.xml').read_bytes())
    doc['Images'][0]['ROIs'][0]['Mean'] += 20
    (tmp_path/'x.xml').write_bytes(plistlib.dumps(doc))
    m = replace(read_coca(made)[0].mask, xml=tmp_path/'x.xml')
    with pytest.warns(UserWarning, match='1 MEAN'): m()
    with pytest.raises(CocaError, match='ROI_CHECK'): replace(m, faulty='refuse')()
    assert not replace(m, faulty='refuse', skip=('MEAN', 'TOTAL'))().data.all()


odd = st.one_of(st.none(), st.booleans(), st.floats(), st.integers(-10, 10), st.text(max_size=5), st.lists(st.text(max_size=9), max_size=4),
                st.lists(st.tuples(st.floats(0, 15), st.floats(0, 15)).map(lambda p: f'({p[0]}, {p[1]})'), max_size=6))


@settings(max_examples=80, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(['Area', 'Mean', 'Min', 'Max', 'Dev', 'Total', 'Name', 'Point_px', 'Point_mm']), odd), max_size=4),
       odd)
def test_odd_files_never_crash(tmp_path_factory, rois, index):
    path = tmp_path_factory.mktemp('odd')/'x.xml'
    clean = [{k: v for k, v in r.items() if v is not None} for r in rois]
    try: path.write_bytes(plistlib.dumps(dict(Images=[dict(ROIs=clean) | ({} if index is None else dict(ImageIndex=index))])))
    except ValueError: return # control characters
    try: found = read_coca_xml(path)
    except CocaError: return
    mask, checks = draw_rois(small(), found)
    assert len(checks) == len(clean) and all(set(c.faults) <= set(ROI_FAULTS) for c in checks)


def test_plist_attacks(tmp_path):
    laugh = ''.join(f'<!ENTITY a{i} "{("&a%d;" % (i-1))*10 if i else "ha"}">' for i in range(9))
    outside = '<!ENTITY a SYSTEM "file:///etc/hostname">'
    for dtd in (laugh, outside):
        (tmp_path/'x.xml').write_text(f'<?xml version="1.0"?><!DOCTYPE p [{dtd}]><plist><dict><key>Images</key><string>&a;</string></dict></plist>')
        with pytest.raises(CocaError): read_coca_xml(tmp_path/'x.xml')
    (tmp_path/'x.xml').write_text('<plist><dict><key>Images</key>' + '<array>'*50000 + '</array>'*50000 + '</dict></plist>')
    assert read_coca_xml(tmp_path/'x.xml') == ()
    (tmp_path/'x.xml').write_text('<plist><dict><key>Images</key><integer>' + '9'*6000 + '</integer></dict></plist>')
    with pytest.raises(CocaError): read_coca_xml(tmp_path/'x.xml')
    with open(tmp_path/'x.xml', 'wb') as f: f.truncate(1 << 30)
    with pytest.raises(CocaError, match='LIMIT'): read_coca_xml(tmp_path/'x.xml')


def test_lists_what_cannot_be_used(chests, tmp_path):
    root = write_coca(tmp_path, chests)/'Gated_release_final'
    (root/'patient'/'7').mkdir()
    (root/'patient'/'8'/'a').mkdir(parents=True); (root/'patient'/'8'/'b').mkdir()
    for x in 'ab': (root/'patient'/'8'/x/'1.dcm').write_bytes(b'')
    write_coca_xml(chests[0].ct, chests[0].lesions, root/'calcium_xml'/'99.xml')
    got = read_coca(tmp_path)
    assert {(l.place, l.finding.code) for l in got.left_out} == {('7', 'NO_SERIES'), ('8', 'MANY_SERIES'), ('99', 'NO_SERIES')}
    assert '99' not in repr(got) and 'NO_SERIES' in repr(got)
    assert len(read_coca(root, missing='skip')) == 1


def test_no_folder_of_outlines_is_not_no_calcium(chests, tmp_path):
    root = write_coca(tmp_path, chests[1:])/'Gated_release_final'
    assert read_coca(tmp_path)[0].score == 0
    (root/'calcium_xml').rmdir()
    with pytest.raises(CocaError, match='NO_FOLDER'): read_coca(tmp_path)


def test_scores_of_cases_and_what_cannot_be_scored(chests, tmp_path):
    root = write_coca(tmp_path, [chests[0], chests[0], chests[1]])/'Gated_release_final'
    (root/'calcium_xml'/'1.xml').write_text('<plist>')
    seen = []
    got = score_cases(read_coca(tmp_path), progress=lambda *a: seen.append(a[:2]))
    assert [(c.patient, round(c.score, 6)) for c in got] == [('0', round(agatston(chests[0].ct, chests[0].lesions), 6)), ('2', 0)]
    assert [(l.place, l.finding.code) for l in got.left_out] == [('1', 'XML')] and seen == [(1, 3), (2, 3), (3, 3)]
    assert str(tmp_path) not in repr(got.cases) + repr(got.cases[0].mask)


def test_outlines_on_a_real_scan(shared_data, tmp_path):
    from jfr2020.dicom.series import find_series
    from jfr2020.dicom.reading import read_series
    entry = next((e for e in find_series(sorted(p for p in (shared_data/'ct').iterdir() if p.is_dir())[0]) if e.series), None)
    if entry is None: pytest.skip('no readable series there')
    ct = read_series(entry.series)
    label, rng = np.zeros(ct.shape, 'u1'), np.random.default_rng(0)
    for k in range(40):
        d, h, w = (int(rng.integers(0, n-8)) for n in ct.shape)
        label[d, h:h+1+k % 6, w:w+1+k % 5] = 1+k % 4
    mask, checks = draw_rois(ct, read_coca_xml(write_coca_xml(ct, MaskVolume(label, ct.geometry), tmp_path/'x.xml')))
    assert np.array_equal(mask.data, label) and not {f for c in checks for f in c.faults} - {'DEV_NAN'}


def test_lesion_with_a_hole(tmp_path):
    ct = small()
    label = np.zeros(ct.shape, 'u1'); label[1, 3:8, 3:8] = 3; label[1, 5, 5] = 0
    rois = read_coca_xml(write_coca_xml(ct, MaskVolume(label, ct.geometry), tmp_path/'x.xml'))
    mask, checks = draw_rois(ct, rois)
    assert np.array_equal(mask.data, label) and all(c.used and c.pixels == c.expected for c in checks)


def test_nongated_scores(chests, made):
    got = read_coca_nongated(made)
    assert got[0].score == pytest.approx(agatston(chests[0].ct, chests[0].lesions), abs=1e-3) and got[1].score == 0
    assert np.array_equal(load_ct(got[0].image).data, chests[0].ct.data)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.one_of(st.none(), st.integers(-10**6, 10**6), st.floats(-1e9, 1e9),
                                   st.text(st.characters(codec='ascii', min_codepoint=32), max_size=9)), min_size=1, max_size=40), max_size=5))
def test_spreadsheets_round_trip(tmp_path_factory, rows):
    rows = [r for r in rows if any(v is not None for v in r)]
    back = read_xlsx(write_xlsx(rows, tmp_path_factory.mktemp('x')/'t.xlsx'))
    assert len(back) == len(rows)
    for a, b in zip(back, rows):
        while b[-1] is None: b = b[:-1]
        assert list(a) == [float(v) if isinstance(v, (int, float)) else v for v in b]


def test_spreadsheet_shared_strings_and_damage(tmp_path):
    write_xlsx([('a', 1)], tmp_path/'t.xlsx')
    with zipfile.ZipFile(tmp_path/'t.xlsx') as z: parts = {n: z.read(n).decode() for n in z.namelist()}
    sheet = 'xl/worksheets/sheet1.xml'
    parts[sheet] = parts[sheet].replace('<c r="A1" t="inlineStr"><is><t>a</t></is></c>', '<c r="A1" t="s"><v>1</v></c>')
    parts['xl/sharedStrings.xml'] = '<sst xmlns="x"><si><t>no</t></si><si><r><t>y</t></r><r><t>es</t></r></si></sst>'

    def save(**change):
        with zipfile.ZipFile(tmp_path/'u.xlsx', 'w') as z:
            for n, x in (parts | change).items(): z.writestr(n, x)
        return tmp_path/'u.xlsx'
    assert read_xlsx(save()) == [('yes', 1.)]
    with pytest.raises(SheetError, match='damaged'): read_xlsx(save(**{sheet: parts[sheet].replace('<v>1</v>', '<v>9</v>', 1)}))
    with pytest.raises(SheetError, match='UNSAFE'): read_xlsx(save(**{sheet: parts[sheet].encode('utf-16')}))
    raw = (tmp_path/'t.xlsx').read_bytes()
    for cut in (10, len(raw)//2, len(raw)-30):
        (tmp_path/'v.xlsx').write_bytes(raw[:cut])
        with pytest.raises(SheetError): read_xlsx(tmp_path/'v.xlsx')


def test_spreadsheet_against_another_reader(tmp_path):
    openpyxl = pytest.importorskip('openpyxl')
    rows = [('filename', 'LCA', None, 'total'), ('1A', 0, None, 12.25)]
    assert list(openpyxl.load_workbook(write_xlsx(rows, tmp_path/'t.xlsx')).active.values) == rows


def test_segments_by_name(chests, made, tmp_path):
    chest, both = chests[0], chests[0].lesions.data.copy()
    both[both > 0] += 10 # other numbers than ours
    names = {11: 'Left Main', 12: 'LAD', 13: 'Circumflex', 14: 'Right Coronary'}
    path = write_segmentation(MaskVolume(both, chest.ct.geometry), names, tmp_path/'nrrd'/'9_0.nrrd')
    assert read_segment_names(path) == names
    (tmp_path/'train_test_split.csv').write_text('exam,split\n0,train\n1,test\n')
    got = read_coca_segmentations(tmp_path, made)
    assert np.array_equal(load_mask(got[0].mask).data, chest.lesions.data) and [l.finding.code for l in got.left_out] == ['NO_MASK']
    flipped = MaskVolume(both, chest.ct.geometry)[::-1, :, ::-1] # stored the other way round
    mask, said = place_segments(flipped, names, chest.ct.geometry)
    assert np.array_equal(mask.data, chest.lesions.data) and not said
    with pytest.raises(JfrError): read_coca_segmentations(tmp_path, made, split='val')


def test_names_that_are_none_or_two():
    for name in ('aorta', 'Thoracic_Aorta', 'THORACIC AORTA'): assert segment_class(name) == 8
    assert segment_class('Aortic valve') == 7 and segment_class('claddagh') is None and segment_class('LM and LAD') is None


def test_mask_object_is_plain():
    m = CocaMask('a', None)
    assert pickle.loads(pickle.dumps(m)) == m and hash(m) == hash(CocaMask('a', None))
