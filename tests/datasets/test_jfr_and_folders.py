"Collections: the exams of the JFR 2020 challenge, and folders of patients with masks and scores."
import gzip, json, pickle
from collections import Counter
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jfr2020.calcium.score import AGATSTON, calcium_score
from jfr2020.datasets.cases import SeriesFolder, VolumeFile, file_geometry, load_ct, load_mask
from jfr2020.calcium.categories import SCHEMES, risk_category
from jfr2020.calcium.clicks import Click
from jfr2020.ground.errors import ConfigError, JfrError
from jfr2020.datasets.folders import read_folder, read_scores
from jfr2020.ground.geometry import Geometry
from jfr2020.dicom.reading import get_dicom_series
from jfr2020.calcium.intensity import padding_mask
from jfr2020.files.metaimage import write_metaimage
from jfr2020.files.nifti import VolumeFileError, as_hounsfield, write_nifti
from jfr2020.dicom.writing import write_series
from jfr2020.datasets.jfr import (AXIS_ORDERS, JFR_SLICES, axis_order, check_jfr_case, jfr_row, read_jfr, read_jfr_ct,
                         write_jfr_exam, write_jfr_results)
from jfr2020.ground.volume import OUTSIDE, CTVolume, MaskVolume, Volume

IDS = [f'{k:024x}' for k in range(0xabc000, 0xabc020)]
PADS = (-1000, -1024, -2000, -2048, -3024)


def disc(n=64):
    h,w = np.mgrid[-1:1:n*1j, -1:1:n*1j]
    return h**2+w**2 < .97


def scan(seed=0, shape=(20,64,64), mm=(3.,.8,.8), lesions=True):
    "A noisy disc of soft tissue with lungs, ribs and calcium that lies on no diagonal -> (CT, labels, clicks)"
    rng = np.random.default_rng(seed)
    hu = np.full(shape, 40.)
    hu[:,20:45,6:22] = hu[:,20:45,44:58] = -850 # lungs
    hu += rng.normal(0, 8, shape)
    owner = np.zeros(shape, int)
    places = [(5,24,30,3), (9,40,26,2), (12,20,36,4), (15,48,34,2)] if lesions else []
    for k,(d,h,w,r) in enumerate(places, 1): owner[d:d+2, h:h+r, w:w+r+1] = k
    hu[owner > 0] = 420
    clicks = [(d, h+(r-1)/2, w+r/2) for d,h,w,r in places]
    return CTVolume(hu.round().astype('i2'), Geometry.from_spacing(shape, mm)), owner, clicks


def codes(collection): return Counter(l.finding.code for l in collection.report)
def of(collection, place): return [l.finding.code for l in collection.report if l.place.startswith(place)]
def edit(path, **changes):
    "Write a JSON of an exam anew"
    doc = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k,v in doc.items() if v is not None}))


# JFR 2020: voxels

@pytest.mark.parametrize('order', AXIS_ORDERS)
@pytest.mark.parametrize('volumes', [1,2])
def test_a_scan_comes_back_voxel_by_voxel(tmp_path, order, volumes):
    ct,_,_ = scan(mm=(2.5,.75,.75))
    path = write_jfr_exam(ct, tmp_path, IDS[0], 0, order=order, volumes=volumes)
    img = nib.load(path)
    assert img.shape == (64,64,20,volumes)
    file = np.asarray(img.dataobj)[...,0]
    assert file[7,11,3] == (ct.data[3,7,11] if order == 'ij' else ct.data[3,11,7])
    back = read_jfr_ct(path, order)
    assert (back.data == ct.data).all() and np.allclose(back.spacing, (2.5,.75,.75))
    assert back.geometry.code == 'IPL' and read_jfr_ct(path, order, 'feet').geometry.code == 'SPL'


def test_the_second_volume_and_the_affine_are_not_read(tmp_path):
    ct,_,_ = scan()
    path = write_jfr_exam(ct, tmp_path, IDS[0], 0, volumes=2)
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[280:328] = np.array([[9,0,0,1],[0,np.nan,0,1],[0,0,-7,1]], '<f4').tobytes() # the sform
    raw[-2*ct.data.size:] = np.full(ct.data.size, 77, '<i2').tobytes()
    path.write_bytes(gzip.compress(bytes(raw)))
    back = read_jfr_ct(path)
    assert (back.data == ct.data).all() and np.allclose(back.spacing, ct.spacing)


@pytest.mark.parametrize('slope, inter, dtype', [(1, -1024, 'u2'), (2, 0, 'i2'), (.5, -7.5, 'i2'), (1, 0, '>i2'), (1, 0, 'f4')])
def test_scaling_and_byte_order_of_the_header(tmp_path, slope, inter, dtype):
    ct,_,_ = scan()
    stored = np.round((ct.data.transpose(1,2,0)[...,None].astype(float)-inter)/slope).astype(dtype)
    img = nib.Nifti1Image(stored.astype(stored.dtype.newbyteorder('=')), np.eye(4), dtype=stored.dtype.newbyteorder('='))
    img.header['xyzt_units'] = 2; img.header.set_slope_inter(slope, inter)
    nib.save(img, tmp_path/'a.nii.gz')
    want = stored[...,0].transpose(2,0,1).astype(float)*slope+inter
    assert np.abs(read_jfr_ct(tmp_path/'a.nii.gz').data-want).max() < 1e-3


def test_three_axes_are_read_and_said(tmp_path):
    ct,_,_ = scan()
    write_jfr_exam(ct, tmp_path, IDS[0], 2)
    img = nib.Nifti1Image(ct.data.transpose(1,2,0), np.diag([.8,.8,3,1])); img.header['xyzt_units'] = 2
    nib.save(img, tmp_path/f'{IDS[0]}.nii.gz')
    got = read_jfr(tmp_path, 'ij')
    assert (got.cases[0].image().data == ct.data).all() and of(got, IDS[0]) == ['THREE_AXES']


@pytest.mark.parametrize('where', range(0, 352, 11))
def test_damaged_headers_are_refused_or_read(tmp_path, where):
    path = write_jfr_exam(scan()[0], tmp_path, IDS[0], 0)
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[where:where+2] = b'\xff\x7f'
    path.write_bytes(gzip.compress(bytes(raw)))
    try: assert isinstance(read_jfr_ct(path), CTVolume)
    except JfrError as e: assert IDS[0] not in str(e)


# defects of the original

@pytest.mark.parametrize('order', AXIS_ORDERS)
def test_D1_padding_of_any_value_is_the_same_scan_and_score(tmp_path, order):
    ct,_,clicks = scan(3)
    seen = []
    for k,p in enumerate(PADS):
        padded = ct.like(np.where(disc(), ct.data, p).astype('i2'))
        write_jfr_exam(padded, tmp_path, IDS[k], 1, clicks, order=order)
    for case in read_jfr(tmp_path).cases:
        image = case.image()
        assert (image.data[:,disc()] == ct.data[:,disc()]).all() and (image.data[:,~disc()] == OUTSIDE).all()
        seen.append((image.data.tobytes(), calcium_score(image, case.mask()).agatston))
    assert len(seen) == len(PADS) and len(set(seen)) == 1 and seen[0][1] > 0


@pytest.mark.parametrize('shift', [604, -420, 1024])
def test_D1_shifted_numbers_stay_shifted_or_are_refused(shift):
    ct,_,_ = scan()
    moved = Volume((ct.data+shift).astype('i2'), ct.geometry)
    try: assert (as_hounsfield(moved, padding_mask(moved)).data == np.maximum(moved.data, OUTSIDE)).all()
    except VolumeFileError as e: assert e.code == 'NOT_HU'
    if shift == 1024: # no air is left
        with pytest.raises(VolumeFileError): as_hounsfield(moved, padding_mask(moved))


def test_D3_mask_and_image_are_on_one_scale_and_grid(tmp_path):
    ct,_,clicks = scan()
    write_jfr_exam(ct, tmp_path, IDS[0], 2, clicks)
    case = read_jfr(tmp_path).cases[0]
    image, mask = load_ct(case.image), load_mask(case.mask)
    assert mask.geometry.matches(image.geometry) and image.data[mask.data > 0].min() >= AGATSTON.threshold_hu


def test_D8_a_large_lesion_is_whole_and_its_neighbour_is_not_taken(tmp_path):
    ct,_,_ = scan(lesions=False)
    hu = ct.data.copy()
    hu[8,25:27,24:43] = 300 # 19 pixels long: a cube of 10 cuts it
    hu[11,25:27,30:33] = 300 # three slices on: a cube takes it
    write_jfr_exam(ct.like(hu), tmp_path, IDS[0], 2, [(8,25,26)])
    mask = read_jfr(tmp_path, 'ij').cases[0].mask().data
    assert (mask > 0).sum() == 38 and not mask[11].any()


@pytest.mark.parametrize('off', [(0,2),(2,0),(0,-2),(-2,0),(1.4,1.4)])
def test_D8_a_click_two_pixels_off_finds_its_lesion(tmp_path, off):
    ct,owner,clicks = scan()
    d,h,w = np.argwhere(owner == 1)[[0,-1]].T # first and last voxel
    edge = [(h[0],w[0]) if min(off) < 0 else (h[1],w[1])][0]
    write_jfr_exam(ct, tmp_path, IDS[0], 2, [(d[0], edge[0]+off[0], edge[1]+off[1]), *clicks[1:]])
    got = read_jfr(tmp_path, check=True)
    assert ((got.cases[0].mask().data > 0) == (owner > 0)).all() and 'NO_CALCIUM' not in codes(got)


def test_D9_the_class_does_not_depend_on_the_size_of_voxels(tmp_path):
    ct,_,clicks = scan()
    fine = CTVolume(ct.data.repeat(2, 1).repeat(2, 2), ct.geometry.with_spacing((3.,.4,.4)))
    write_jfr_exam(ct, tmp_path, IDS[0], 2, clicks)
    write_jfr_exam(fine, tmp_path, IDS[1], 2, [(d,2*h+.5,2*w+.5) for d,h,w in clicks])
    one, two = (jfr_row(c.patient, calcium_score(c.image(), c.mask())) for c in read_jfr(tmp_path).cases)
    assert one['score'] == two['score'] and one['volume'] == pytest.approx(two['volume'], abs=.2)


def test_D12_no_exam_and_no_dicom_patient_on_both_sides(tmp_path):
    from jfr2020.ct.blocks import PatientSplitter
    ct,_,_ = scan()
    for k in range(8): write_series(ct, tmp_path/f'p{k}', seed=k//2)
    cases = read_folder(tmp_path).cases
    train, valid = PatientSplitter(.25)(cases)
    assert len({c.patient for c in cases}) == 4
    assert not {cases[i].patient for i in train} & {cases[i].patient for i in valid}


@pytest.mark.parametrize('agatston, index', [(0,0), (.5,1), (9.5,1), (10,2), (99.5,2), (100,3), (399.9,3), (400,4), (1e6,4)])
def test_D13_every_score_has_its_class(agatston, index):
    assert jfr_row(IDS[0], SimpleNamespace(agatston=agatston, volume_mm3=1.26)) == dict(examen_id=IDS[0], volume=1.3, score=index)


# JFR 2020: the axis order

def test_auto_tells_a_transposed_pair(tmp_path):
    ct,owner,clicks = scan()
    write_jfr_exam(ct, tmp_path, IDS[0], 2, clicks, order='ij'); write_jfr_exam(ct, tmp_path, IDS[1], 2, clicks, order='xy')
    got = read_jfr(tmp_path)
    assert [c.image.order for c in got.cases] == ['ij','xy']
    for c in got.cases: assert (c.image().data == ct.data).all() and ((c.mask().data > 0) == (owner > 0)).all()
    texts = [l.finding.text for l in got.report if l.finding.code == 'AXIS_ORDER']
    assert len(texts) == 2 and "100% read as 'ij'" in texts[0] and "100% read as 'xy'" in texts[1]


def test_symmetric_calcium_tells_nothing_and_the_others_decide(tmp_path):
    ct,_,clicks = scan()
    hu = scan(lesions=False)[0].data.copy(); hu[5,30:33,30:33] = 400
    even = ct.like(hu)
    write_jfr_exam(even, tmp_path, IDS[0], 2, [(5,31,31)], order='xy')
    alone = read_jfr(tmp_path)
    assert not alone.cases and codes(alone)['ORDER_UNKNOWN'] == 1 and 'no exam' in str(alone.left_out)
    write_jfr_exam(ct, tmp_path, IDS[1], 2, clicks, order='xy'); write_jfr_exam(ct, tmp_path, IDS[2], 2)
    got = read_jfr(tmp_path)
    assert [c.image.order for c in got.cases] == ['xy']*3 and codes(got)['ORDER_OF_OTHERS'] == 2
    write_jfr_exam(ct, tmp_path, IDS[3], 2, clicks, order='ij')
    assert [c.patient for c in read_jfr(tmp_path).cases] == [IDS[1], IDS[3]]
    assert len(read_jfr(tmp_path, 'xy').cases) == 4


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0,19), st.floats(0,63), st.floats(0,63)), max_size=8))
def test_turning_the_clicks_turns_the_answer(at):
    ct,_,_ = scan()
    best, share = axis_order(ct, [Click(p, 'index') for p in at])
    other, turned = axis_order(ct, [Click((d,w,h), 'index') for d,h,w in at])
    assert (share['ij'], share['xy']) == (turned['xy'], turned['ij'])
    assert other == {'ij': 'xy', 'xy': 'ij', None: None}[best]


# JFR 2020: the folder

def test_the_deepest_series_below_500_slices(tmp_path):
    ct,_,clicks = scan()
    deep = CTVolume(np.zeros((JFR_SLICES,8,8), 'i2'), Geometry.from_spacing((JFR_SLICES,8,8), (1,1,1)))
    for v,series in ((ct[:10], '_1'), (deep, '_2'), (ct, '_3')): write_jfr_exam(v, tmp_path, IDS[0], 2, clicks, series=series)
    got = read_jfr(tmp_path)
    assert got.cases[0].image().shape == ct.shape
    assert [l.finding.text for l in got.report if l.finding.code == 'SERIES'] == ['series of 10, 500, 20 slices, the one of 20 is taken']
    write_jfr_exam(ct, tmp_path, IDS[0], 2, clicks, series='_4')
    assert of(read_jfr(tmp_path), IDS[0]) == ['SERIES_TIE']
    write_jfr_exam(deep, tmp_path, IDS[1], 2)
    assert of(read_jfr(tmp_path), IDS[1]) == ['NO_SERIES']


def test_one_damaged_series_of_two_does_not_lose_the_exam(tmp_path):
    ct,_,clicks = scan()
    write_jfr_exam(ct, tmp_path, IDS[0], 2, clicks, series='_1')
    (tmp_path/f'{IDS[0]}_0.nii.gz').write_bytes(b'no gzip')
    got = read_jfr(tmp_path)
    assert len(got) == 1 and 'NOT_NIFTI' in codes(got)


@pytest.mark.parametrize('code, harm', [
    ('CONFIG', lambda f: f['json'].write_text('{')),
    ('CONFIG', lambda f: edit(f['json'], **{'777': []})),
    ('CONFIG', lambda f: edit(f['json'], **{'123456': None, 'more': 1})),
    ('CONFIG', lambda f: edit(f['json'], **{'123456': [{'instance': 2.5, 'labels': [{'x': 1, 'y': 1}]}]})),
    ('CONFIG', lambda f: edit(f['json'], **{'123456': [{'instance': 3}]})),
    ('NO_JSON', lambda f: f['json'].unlink()),
    ('NO_VOLUME', lambda f: f['nii'].unlink()),
    ('NOT_NIFTI', lambda f: f['nii'].write_bytes(b'')),
    ('TRUNCATED', lambda f: f['nii'].write_bytes(f['nii'].read_bytes()[:-5000])),
])
def test_what_cannot_be_used_is_said_and_the_others_stay(tmp_path, code, harm):
    ct,_,clicks = scan()
    for k in (0,1): path = write_jfr_exam(ct, tmp_path, IDS[k], 2, clicks)
    harm({'json': tmp_path/f'{IDS[1]}.json', 'nii': path})
    got = read_jfr(tmp_path)
    assert [c.patient for c in got.cases] == IDS[:1]
    assert [(l.place, l.finding.code) for l in got.left_out] == [(IDS[1], code)]


def test_a_damaged_exam_without_clicks_is_found_by_the_check(tmp_path):
    ct,_,clicks = scan()
    write_jfr_exam(ct, tmp_path, IDS[0], 2, clicks)
    path = write_jfr_exam(ct, tmp_path, IDS[1], 2)
    path.write_bytes(path.read_bytes()[:-5000])
    assert len(read_jfr(tmp_path)) == 2
    got = read_jfr(tmp_path, check=True)
    assert len(got) == 1 and [l.place for l in got.left_out] == [IDS[1]]


def test_every_exam_is_a_case_or_a_line(tmp_path):
    ct,_,clicks = scan()
    for k in range(6): write_jfr_exam(ct, tmp_path, IDS[k], k % 5, clicks if k % 2 else None, volumes=1+k % 2)
    (tmp_path/f'{IDS[0]}.json').unlink(); (tmp_path/f'{IDS[1]}.nii.gz').unlink()
    got = read_jfr(tmp_path)
    assert {c.patient for c in got.cases} | {l.place for l in got.left_out} == set(IDS[:6])
    assert not {c.patient for c in got.cases} & {l.place for l in got.left_out}


def test_names_of_people_are_never_repeated(tmp_path):
    ct,_,clicks = scan()
    write_jfr_exam(ct, tmp_path, IDS[0], 2, clicks, series='_DUPONT')
    (tmp_path/'DUPONT_Jean.nii.gz').write_bytes(b''); (tmp_path/'DUPONT_Jean.json').write_text('{}')
    got = read_jfr(tmp_path, check=True)
    assert codes(got)['OTHER_FILES'] == 1 and 'kind: 2' in str(got.report[0])+str(got.report[1])
    assert 'DUPONT' not in repr(got)+''.join(map(str, got.report))+repr(got.cases)+repr(got.cases[0].image)+repr(got.cases[0].mask)


def test_clicks_that_bring_nothing_and_other_classes_are_said(tmp_path):
    ct,owner,clicks = scan()
    write_jfr_exam(ct, tmp_path, IDS[0], 0, [*clicks, (5,32.,12.), clicks[0]])
    got = read_jfr(tmp_path, check=True)
    assert of(got, IDS[0]) == ['AXIS_ORDER', 'NO_CALCIUM', 'SAME_LESION', 'OTHER_CLASS']
    assert ((got.cases[0].mask().data > 0) == (owner > 0)).all()
    right = risk_category(calcium_score(ct, MaskVolume((owner > 0).astype('u1'), ct.geometry)).agatston).index
    edit(tmp_path/f'{IDS[0]}.json', classe=SCHEMES['jfr2020'].labels[right])
    assert 'OTHER_CLASS' not in codes(read_jfr(tmp_path, check=True))
    assert check_jfr_case(read_jfr(tmp_path).cases[0])[0].code == 'NO_CALCIUM'


def test_an_exam_of_class_0_without_clicks_has_an_empty_mask(tmp_path):
    ct,_,clicks = scan()
    for k,c in enumerate((0,2)): write_jfr_exam(ct, tmp_path, IDS[k], c, [])
    got = read_jfr(tmp_path, 'ij', check=True)
    assert not got.cases[0].mask().data.any() and got.cases[1].mask is None and of(got, IDS[1]) == ['NO_CLICKS']


@pytest.mark.parametrize('at, fits', [((19,0,0),True), ((20,0,0),False), ((0,63.5,-.5),True), ((0,63.6,0),False), ((0,0,-.6),False)])
def test_clicks_outside_of_the_series_are_not_used(tmp_path, at, fits):
    write_jfr_exam(scan()[0], tmp_path, IDS[0], 2, [at])
    got = read_jfr(tmp_path, 'ij', check=True)
    assert len(got) == 1 and (got.cases[0].mask is not None) == fits and ('CLICK_OUTSIDE' in codes(got)) != fits


def test_two_workers_load_what_one_process_loads(tmp_path):
    from operator import attrgetter
    from fastai.data.all import DataBlock
    from jfr2020.ct.blocks import CTBlock, MaskBlock, PatientSplitter
    ct,_,clicks = scan()
    for k in range(4): write_jfr_exam(ct.like(ct.data+np.int16(k)), tmp_path, IDS[k], 2, clicks)
    block = DataBlock(blocks=(CTBlock, MaskBlock), get_x=attrgetter('image'), get_y=attrgetter('mask'), splitter=PatientSplitter(.5))
    sets = [block.dataloaders(read_jfr(tmp_path).cases, bs=2, num_workers=n, device='cpu').valid.one_batch() for n in (0,2)]
    assert all(bool((a == b).all()) for a,b in zip(*sets)) and sets[0][1].sum() > 0


def test_cases_travel_to_workers_and_give_the_same(tmp_path):
    ct,_,clicks = scan()
    write_jfr_exam(ct, tmp_path, IDS[0], 2, clicks)
    case = read_jfr(tmp_path).cases[0]
    again = pickle.loads(pickle.dumps(case))
    assert again == case and (again.image().data == case.image().data).all() and (again.mask().data == case.mask().data).all()


def test_results_have_the_columns_of_the_challenge(tmp_path):
    rows = [jfr_row(i, SimpleNamespace(agatston=s, volume_mm3=s)) for i,s in zip(IDS, (0,5.,50.,200.,900.))]
    lines = write_jfr_results(rows, tmp_path/'o'/'r.csv').read_text().splitlines()
    assert lines[0] == 'examen_id,volume,score' and [l.split(',')[2] for l in lines[1:]] == list('01234')
    assert all(l.split(',')[0] == i for l,i in zip(lines[1:], IDS))


def test_a_real_scan_in_the_format_of_the_challenge(shared_data, tmp_path):
    ct = get_dicom_series(shared_data/'ct'/'lungdx_A0002_B40f')[0]
    path = write_jfr_exam(ct, tmp_path, IDS[0], 0, order='xy', volumes=2)
    back = read_jfr_ct(path, 'xy', 'feet')
    assert (back.data == ct.data).all() and np.allclose(back.spacing, ct.spacing, rtol=1e-6) and back.geometry.code == 'SPL'


# folders of patients

def patient(folder, seed=0, **tags):
    "A synthetic DICOM series -> its CT"
    ct = scan(seed)[0]
    write_series(ct, folder, seed=seed, **tags)
    return ct


def test_one_dicom_patient_in_two_folders_is_one_patient(tmp_path):
    for k,seed in enumerate((1,2,1)): patient(tmp_path/f'f{k}', seed)
    got = read_folder(tmp_path)
    assert [c.patient for c in got.cases] == ['f0','f1','f0'] and of(got, 'folder 3') == ['SAME_PATIENT']
    assert [c.patient for c in read_folder(tmp_path, join=False).cases] == ['f0','f1','f2']


def test_nobody_is_never_joined(tmp_path):
    for k in range(3): patient(tmp_path/f'f{k}', k, PatientName='', PatientID='')
    got = read_folder(tmp_path)
    assert [c.patient for c in got.cases] == ['f0','f1','f2'] and 'SAME_PATIENT' not in codes(got)


def test_scores_follow_their_folder_and_not_the_patient(tmp_path):
    for k,seed in enumerate((1,2,1)): patient(tmp_path/f'f{k}', seed)
    got = read_folder(tmp_path, scores={'f0': 1., 'f2': 3., 'gone': 4.})
    assert [c.score for c in got.cases] == [1.,None,3.]
    assert codes(got) == dict(SAME_PATIENT=1, NO_SCORE=1, NO_FOLDER=1) and of(got, 'folder 2') == ['NO_SCORE']
    assert 'gone' not in ''.join(map(str, got.report)) and 'number 3 of the table' in str(got.report[-1])


def test_refused_series_are_listed_and_the_good_one_taken(tmp_path):
    ct = patient(tmp_path/'f0'/'good', 1)
    patient(tmp_path/'f0'/'gap', 2, StudyInstanceUID='1.2.3')
    sorted((tmp_path/'f0'/'gap').iterdir())[7].unlink()
    write_nifti(MaskVolume(np.ones(ct.shape, 'u1'), ct.geometry), tmp_path/'f0'/'my_MASK_2.nii.gz')
    write_nifti(ct, tmp_path/'f0'/'same.nii.gz')
    got = read_folder(tmp_path)
    assert [l.finding.code for l in got.report] == ['MISSING_SLICE', 'SERIES', 'EXTRA_FILES']
    case, = got.cases
    assert isinstance(case.image, SeriesFolder) and (case.image().data == ct.data).all() and case.mask().data.all()


def test_series_of_one_folder_that_cannot_be_told_apart_are_refused(tmp_path):
    patient(tmp_path/'f0'/'a', 1); patient(tmp_path/'f0'/'b', 2)
    patient(tmp_path/'f1', 3)
    got = read_folder(tmp_path)
    assert [c.patient for c in got.cases] == ['f1'] and of(got, 'folder 1') == ['AMBIGUOUS']


def test_two_scans_or_none_are_refused_unless_named(tmp_path):
    ct = scan()[0]
    write_nifti(ct, tmp_path/'a'/'ct.nii.gz'); write_nifti(ct, tmp_path/'a'/'other.nii.gz'); (tmp_path/'b').mkdir()
    got = read_folder(tmp_path)
    assert not got.cases and [l.finding.code for l in got.left_out] == ['AMBIGUOUS_SCAN', 'NO_SCAN']
    assert '2 volume files' in str(got.left_out[0])
    assert [c.image for c in read_folder(tmp_path, scans='CT*').cases] == [VolumeFile(tmp_path/'a'/'ct.nii.gz')]


def test_masks_that_do_not_fit_are_said(tmp_path):
    ct = scan()[0]
    full = MaskVolume(np.ones(ct.shape, 'u1'), ct.geometry)
    far = ct.geometry.affine.copy(); far[2,3] += 500
    masks = dict(a=full, b=full[2:8,::2,::2], c=MaskVolume(full.data, Geometry(ct.shape, far)), d=full, e=None)
    for name,m in masks.items():
        write_nifti(ct, tmp_path/name/'ct.nii')
        if m: write_metaimage(m, tmp_path/name/'mask.mha')
    (tmp_path/'d'/'mask.mha').write_bytes(b'NDims = 3\n')
    got = read_folder(tmp_path)
    assert [c.mask is not None for c in got.cases] == [True, True, False, False, False]
    assert [l.finding.code for l in got.report] == ['OTHER_GRID', 'MASK_ELSEWHERE', 'NOT_METAIMAGE', 'NO_MASK']
    assert [l.used for l in got.report] == [True, False, False, True]
    assert got.cases[1].mask().shape == full[2:8,::2,::2].shape
    assert 'NO_MASK' not in codes(read_folder(tmp_path, masks='seg*', scans='ct*')) # nobody has one: none is missed


def test_names_of_folders_are_never_repeated(tmp_path):
    patient(tmp_path/'DUPONT', 1); (tmp_path/'DURAND').mkdir(); (tmp_path/'list of DUPONT.txt').write_text('')
    write_nifti(scan()[0], tmp_path/'DUPOND'/'DUPOND.nii'); (tmp_path/'DUPOND'/'mask DUPOND.nii').write_bytes(b'x')
    got = read_folder(tmp_path, scores={'DUBOIS': 1.})
    assert len(got.report) == 7 and 'DU' not in repr(got)+''.join(map(str, got.report))+repr(got.cases)+repr([c.image for c in got.cases])


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text('abcäß _-0,;"\t', min_size=1).map(str.strip).filter(bool), st.floats(0, 1e5), max_size=6),
       st.sampled_from(',;\t'), st.booleans())
def test_any_table_comes_back(tmp_path_factory, scores, comma, swap):
    import csv
    path = tmp_path_factory.mktemp('csv')/'s.csv'
    with open(path, 'w', newline='', encoding='utf-8') as f:
        w = csv.writer(f, delimiter=comma)
        for row in [('patient', 'score'), *scores.items()]: w.writerow(row[::-1] if swap else row)
    assert read_scores(path) == scores


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_scores_or_a_config_error(tmp_path_factory, raw):
    path = tmp_path_factory.mktemp('csv')/'s.csv'
    path.write_bytes(b'patient,score\n'+raw)
    try: assert all(v >= 0 for v in read_scores(path).values())
    except ConfigError: return


def test_the_real_series_as_a_collection(shared_data, tmp_path):
    for name in ('ibsi1_pat1_contrast_crop', 'lungdx_A0002_B40f', 'ricord1a_001012', 'totalseg_example_ct_dicom_noheart'):
        (tmp_path/name).symlink_to(shared_data/'ct'/name) # these four, whatever else lies there
    (tmp_path/'LICENSE.txt').write_text('no scan')
    got = read_folder(tmp_path, masks='*seg*')
    assert len(got) == 4 and len({c.patient for c in got.cases}) == 4
    assert codes(got) == dict(NOT_CT=1, SERIES=1, OTHER_GRID=1, NO_MASK=3, OTHER_FILES=1)
    case = next(c for c in got.cases if c.mask)
    image, mask = load_ct(case.image), load_mask(case.mask)
    assert image.shape == (20,512,512) and (mask.data == 5).sum() > 100_000 # the liver of an upper abdomen
    low = image.data[..., ::-1, :] if mask.geometry.code == 'SAL' else image.data
    assert 20 < np.median(low[mask.data == 5]) < 200


def test_a_real_heart_mask_on_another_grid(shared_data):
    got = read_folder(shared_data/'ct_nifti', masks='heart*', scans='ct*')
    assert len(got) == 1 and codes(got) == dict(OTHER_GRID=1)
    assert file_geometry(shared_data/'ct_nifti'/'totalseg_pulmonary_cta'/'heart.nii.gz').matches(got.cases[0].mask().geometry)
    assert [l.finding.code for l in read_folder(shared_data/'ct_nifti', masks='heart*').left_out] == ['AMBIGUOUS_SCAN']
