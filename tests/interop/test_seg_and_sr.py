"DICOM segmentations and structured reports: what a validator, other readers and our own reader say of them."
import json, logging, shutil, subprocess, traceback, warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

hd = pytest.importorskip('highdicom', reason='the extra dicomout is not installed')
import pydicom # noqa: E402

from jfr2020.calcium.score import AGATSTON, Calibration, calcium_score, vessel_labels # noqa: E402
from jfr2020.calcium.case import CaseResult # noqa: E402
from jfr2020.calcium.categories import cac_drs, risk_category # noqa: E402
from jfr2020.ground.errors import Finding, GeometryError, JfrError # noqa: E402
from jfr2020.ground.geometry import Geometry, lps2ras # noqa: E402
from jfr2020.ground.notice import NOTICE # noqa: E402
from jfr2020.interop.segmentation import write_seg # noqa: E402
from jfr2020.interop.sources import source_date # noqa: E402
from jfr2020.interop.structured_report import sr_text, write_sr # noqa: E402
from jfr2020.dicom.reading import read_series # noqa: E402
from jfr2020.calcium.segments import read_seg # noqa: E402
from jfr2020.dicom.series import find_series # noqa: E402
from jfr2020.dicom.writing import write_series # noqa: E402
from jfr2020.ground.volume import CTVolume, MaskVolume # noqa: E402

from tests.dicom.enhanced import write_enhanced # noqa: E402

PATIENT = dict(PatientName='Synthétique^Noémie', PatientID='SYN-7', PatientSex='F', PatientBirthDate='19600102', StudyDate='20260102',
               StudyTime='101112', SeriesDate='20260102', SeriesTime='101500', AccessionNumber='A1', ReferringPhysicianName='Nobody^')
SETTINGS = {k: getattr(AGATSTON, k) for k in ('threshold_hu', 'connectivity', 'min_area_mm2', 'slice_rule')}


def scan(shape=(24, 40, 48), spots=((5, 2), (6, 2), (9, 3), (20, 4)), oblique=False):
    "A CT and its mask: a bright square of a label in each of some slices"
    g = Geometry.from_spacing(shape, (3., .7, .8))
    if oblique:
        t = np.radians(12)
        turn = np.eye(4); turn[:3, :3] = [[np.cos(t), -np.sin(t), 0], [np.sin(t), np.cos(t), 0], [0, 0, 1]]
        g = Geometry(shape, turn @ g.affine)
    hu, labels = np.full(shape, 40, np.int16), np.zeros(shape, np.uint8)
    for k, (d, label) in enumerate(spots):
        at = d, slice(8+4*k, 12+4*k), slice(10+5*k, 14+5*k)
        hu[at], labels[at] = 250+50*k, label
    return CTVolume(hu, g), MaskVolume(labels, g)


def made(folder, ct, mask, **tags):
    "(series, CT, mask, scored case) of a scan that was written and found again"
    write_series(ct, folder, **(PATIENT | tags))
    s = find_series(folder)[0].series
    ct, mask = CTVolume(ct.data, s.geometry), MaskVolume(mask.data, s.geometry)
    return s, ct, mask, scored(s, ct, mask)


def scored(s, ct, mask, **more):
    score = calcium_score(ct, mask, calibration=Calibration(.00078, 'made up'))
    return CaseResult(s.uid, 'scan', score=score, category=risk_category(score.agatston), geometry=ct.geometry, settings=SETTINGS,
                      cac_drs=cac_drs(score.agatston, score.n_vessels), mask=mask, **more)


@pytest.fixture(scope='module')
def case(tmp_path_factory):
    home = tmp_path_factory.mktemp('case')
    s, ct, mask, result = made(home/'ct', *scan())
    result = replace(result, findings=(Finding('KVP', 'scanned at 100 kV, scored with the threshold for 120 kV'),))
    seg = write_seg(mask, s, home/'seg.dcm', result)
    return dict(home=home, series=s, ct=ct, mask=mask, result=result, seg=seg, sr=write_sr(result, s, home/'sr.dcm', seg))


def verify(path):
    "(errors, warnings) that dciodvfy has on a file, without those on codes of our private scheme"
    if not shutil.which('dciodvfy'): pytest.skip('dciodvfy (dicom3tools) is not installed')
    said = subprocess.run(['dciodvfy', '-new', str(path)], capture_output=True, text=True, timeout=60)
    lines = (said.stdout+said.stderr).splitlines()
    return [o for o in lines if o.startswith('Error')], [o for o in lines if o.startswith('Warning') and '99JFR2020' not in o]


def groups(path):
    report = hd.sr.srread(path).content
    return report.get_volumetric_roi_measurement_groups(), report.get_image_measurement_groups()


def code(call, *args, **kwargs):
    with pytest.raises(JfrError) as e: call(*args, **kwargs)
    return e.value.code


# validators and other readers

def test_a_segmentation_has_no_errors(case): assert verify(case['seg']) == ([], [])


def test_a_report_has_neither_errors_nor_warnings(case): assert verify(case['sr']) == ([], [])


def test_highdicom_reads_the_same_voxels(case):
    seg = hd.seg.segread(case['seg'])
    assert seg.segmentation_type.value == 'BINARY' and seg.number_of_segments == 3
    uids = [h.get('SOPInstanceUID') for h in case['series'].headers]
    a = seg.get_pixels_by_source_instance(uids, combine_segments=True, assert_missing_frames_are_empty=True)
    assert np.array_equal(np.array([0, 2, 3, 4])[a], case['mask'].data)


def test_the_frames_do_not_span_the_scan(case):
    "The pitfall that makes position the only key: most slices are not in the file"
    assert hd.seg.segread(case['seg']).get_volume().spatial_shape[0] == 16 < case['ct'].shape[0] == 24


def test_highdicom_reads_the_same_numbers(case):
    drawn, plain = groups(case['sr'])
    score = case['result'].score
    assert len(drawn) == 3 and len(plain) == 2 # LAD, LCX, RCA with a segment; the total and LM without
    seen = {}
    for g in drawn+plain:
        name, numbers = str(g.tracking_identifier).split()[-1], {m.name.value: m.value for m in g.get_measurements()}
        seen[name] = [numbers[k] for k in ('450360000', '122660', '122661')]
        assert g.method.value == '112055'
    told = {k: [v.agatston, v.volume_mm3, v.mass_mg] for k, v in score.vessels.items() if k != 'other'}
    told['total'] = [score.agatston, score.volume_mm3, score.mass_mg]
    assert seen.keys() == told.keys()
    for k in told: assert np.allclose(seen[k], told[k], atol=1e-4), k
    segment = {str(g.tracking_identifier).split()[-1]: g.referenced_segment for g in drawn}
    assert segment['LCX'][0].ReferencedSOPSequence[0].ReferencedSegmentNumber == 2


def test_codes_and_flags_with_pydicom_alone(case):
    ds = pydicom.dcmread(case['sr'])
    assert ds.SOPClassUID == '1.2.840.10008.5.1.4.1.1.88.33'
    assert (ds.CompletionFlag, ds.VerificationFlag, ds.PreliminaryFlag) == ('COMPLETE', 'UNVERIFIED', 'PRELIMINARY')
    assert 'RESEARCH' in ds.SeriesDescription and ds.ContentTemplateSequence[0].TemplateIdentifier == '1500'
    seen = {}
    def walk(item):
        name = item.ConceptNameCodeSequence[0] if 'ConceptNameCodeSequence' in item else None
        if name: seen.setdefault((name.CodingSchemeDesignator, name.CodeValue), []).append(item)
        for o in item.get('ContentSequence', ()): walk(o)
    walk(ds)
    number = seen['SCT', '450360000'][0].MeasuredValueSequence[0]
    assert float(number.NumericValue) == pytest.approx(case['result'].score.agatston, abs=1e-4)
    assert number.MeasurementUnitsCodeSequence[0].CodeValue == '1'
    assert seen['SCT', '363698007'][0].ConceptCodeSequence[0].CodeValue == '41801008'
    c = seen['99JFR2020', 'jfr2020'][0].ConceptCodeSequence[0]
    assert (c.CodeValue, c.CodeMeaning) == (f'jfr2020-{case["result"].category.index}', case['result'].category.label)
    assert ds.CodingSchemeIdentificationSequence[0].CodingSchemeDesignator == '99JFR2020'
    texts = [o.TextValue for o in seen['DCM', '121106']]
    assert texts[:2] == [NOTICE['en'], NOTICE['fr']] and texts[2].startswith('KVP: ')
    assert 'threshold=130 HU' in sr_text(case['sr']) and 'min_area=1 mm2' in sr_text(case['sr'])


def test_sites_and_types_of_the_segments(case):
    ds = pydicom.dcmread(case['seg'])
    site = [(s.SegmentLabel, s.AnatomicRegionSequence[0].CodeValue) for s in ds.SegmentSequence]
    assert site == [('LAD', '59438005'), ('LCX', '57396003'), ('RCA', '13647002')]
    s = ds.SegmentSequence[0]
    assert (s.SegmentedPropertyTypeCodeSequence[0].CodeValue, s.SegmentedPropertyCategoryCodeSequence[0].CodeValue) == ('18115005', '49755003')
    assert s.SegmentAlgorithmType == 'AUTOMATIC' and 'threshold=130 HU' not in s.SegmentLabel
    refs = {o.ReferencedSOPInstanceUID for o in ds.ReferencedSeriesSequence[0].ReferencedInstanceSequence}
    assert refs == {h.get('SOPInstanceUID') for h in case['series'].headers}


def run_dcmqi(name, *args):
    if not shutil.which(name): pytest.skip(f'{name} (dcmqi) is not installed')
    done = subprocess.run([name, *map(str, args)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-500:]


def test_dcmqi_reads_the_same_numbers(case, tmp_path):
    run_dcmqi('tid1500reader', '--inputDICOM', case['sr'], '--outputMetadata', tmp_path/'sr.json')
    got = {g['TrackingIdentifier'].split()[-1]: g for g in json.loads((tmp_path/'sr.json').read_text())['Measurements']}
    score = case['result'].score
    for k, v in dict(score.vessels, total=score).items():
        if k == 'other': continue
        numbers = [float(m['value']) for m in got[k]['measurementItems']]
        assert np.allclose(numbers, [v.agatston, v.volume_mm3, v.mass_mg], atol=1e-3), k
    assert [got[k].get('ReferencedSegment') for k in ('LM', 'LAD', 'LCX', 'RCA')] == [None, 1, 2, 3]


def test_dcmqi_writes_what_we_read(case, tmp_path):
    "Its own segmentation of the same voxels, from the masks it took out of ours"
    run_dcmqi('segimage2itkimage', '--inputDICOM', case['seg'], '--outputDirectory', tmp_path, '-t', 'nifti')
    masks = ','.join(str(tmp_path/f'{k}.nii.gz') for k in (1, 2, 3))
    run_dcmqi('itkimage2segimage', '--inputImageList', masks, '--inputDICOMDirectory', case['series'].files[0].parent,
              '--outputDICOM', tmp_path/'other.dcm', '--inputMetadata', tmp_path/'meta.json')
    assert np.array_equal(read_seg(tmp_path/'other.dcm', case['ct'], case['series'].facts).data, case['mask'].data)


# pitfalls

def test_no_calcium_at_all(tmp_path):
    s, ct, mask, result = made(tmp_path/'ct', *scan(spots=()))
    seg = write_seg(mask, s, tmp_path/'seg.dcm', result)
    sr = write_sr(result, s, tmp_path/'sr.dcm', seg)
    assert verify(seg)[0] == [] and verify(sr)[0] == []
    assert not read_seg(seg, ct, s.facts).data.any()
    drawn, plain = groups(sr)
    assert not drawn and {str(g.tracking_identifier).split()[-1] for g in plain} == {'total', 'LM', 'LAD', 'LCX', 'RCA'}
    assert all(m.value == 0 for g in plain for m in g.get_measurements())
    assert 'Finding: ' not in sr_text(sr) # nothing was found


def test_a_vessel_without_calcium_has_a_zero_and_no_segment(case):
    lm = next(g for g in groups(case['sr'])[1] if str(g.tracking_identifier).endswith('LM'))
    assert [m.value for m in lm.get_measurements()] == [0, 0, 0] and lm.finding_sites[0].value.value == '3227004'


def test_unnamed_calcium_says_nothing_of_other_vessels(tmp_path):
    s, ct, mask, _ = made(tmp_path/'ct', *scan(spots=((5, 2), (9, 5))))
    result = scored(s, ct, mask)
    drawn, plain = groups(write_sr(result, s, tmp_path/'sr.dcm', write_seg(mask, s, tmp_path/'seg.dcm', result)))
    assert [str(g.tracking_identifier) for g in drawn] == ['jfr2020 LAD', 'jfr2020 other'] and len(plain) == 1


@pytest.mark.parametrize('value, qualifier', [(np.nan, '114000'), (np.inf, '114009')])
def test_what_is_no_number_has_a_qualifier(case, tmp_path, value, qualifier):
    bad = replace(case['result'], score=replace(case['result'].score, mass_mg=value))
    ds = pydicom.dcmread(write_sr(bad, case['series'], tmp_path/'sr.dcm', case['seg']))
    total = next(o for o in ds.ContentSequence if o.ConceptNameCodeSequence[0].CodeValue == '126010').ContentSequence[0]
    mass = next(o for o in total.ContentSequence if o.ConceptNameCodeSequence[0].CodeValue == '122661')
    assert len(mass.MeasuredValueSequence) == 0 and mass.NumericValueQualifierCodeSequence[0].CodeValue == qualifier
    assert verify(tmp_path/'sr.dcm') == ([], [])


def test_without_a_frame_of_reference(tmp_path):
    ct, mask = scan()
    write_series(ct, tmp_path/'ct', edit=lambda ds, k: ds.pop('FrameOfReferenceUID'))
    s = find_series(tmp_path/'ct')[0].series
    assert code(write_seg, MaskVolume(mask.data, s.geometry), s, tmp_path/'no.dcm') == 'NO_FRAME'
    assert [p.name for p in tmp_path.iterdir()] == ['ct'] # nothing is left, no temporary file either


def test_the_same_bytes_twice_and_other_identifiers_for_another_mask(case, tmp_path):
    s, mask, result = case['series'], case['mask'], case['result']
    assert write_seg(mask, s, tmp_path/'a.dcm', result).read_bytes() == case['seg'].read_bytes()
    assert write_sr(replace(result, input='elsewhere', seconds=dict(total=9.)), s, tmp_path/'b.dcm', case['seg']).read_bytes() \
        == case['sr'].read_bytes()
    less = mask.like(np.where(mask.data == 4, 0, mask.data))
    one, two = (pydicom.dcmread(p) for p in (case['seg'], write_seg(less, s, tmp_path/'c.dcm', result)))
    assert one.SOPInstanceUID != two.SOPInstanceUID and one.SeriesInstanceUID != two.SeriesInstanceUID
    strict = replace(result, settings=SETTINGS | dict(threshold_hu=150.))
    assert pydicom.dcmread(write_seg(mask, s, tmp_path/'d.dcm', strict)).SOPInstanceUID != one.SOPInstanceUID


def test_dates_are_those_of_the_series(case):
    for p in (case['seg'], case['sr']):
        ds = pydicom.dcmread(p)
        assert (ds.ContentDate, ds.ContentTime, ds.InstanceCreationDate) == ('20260102', '101500', '20260102')
        times = {str(e.value) for e in ds.iterall() if e.VR in ('DA', 'DT') and e.value}
        assert times <= {'20260102', '19600102', '20260102101500'} # nothing of the day it was written
    assert source_date(pydicom.Dataset()) == ('19000101', '000000')


def test_the_patient_is_copied_and_the_preamble_is_empty(case):
    for p in (case['seg'], case['sr']):
        ds = pydicom.dcmread(p)
        assert {k: str(ds[k].value) for k in PATIENT if k.startswith(('Patient', 'Study', 'Acc'))} == \
            {k: v for k, v in PATIENT.items() if k.startswith(('Patient', 'Study', 'Acc'))}
        assert p.read_bytes()[:132] == bytes(128)+b'DICM'


def test_characters_of_another_set(tmp_path):
    ct, mask = scan()
    s, ct, mask, result = made(tmp_path/'ct', ct, mask, SpecificCharacterSet='ISO_IR 100')
    for p in (write_seg(mask, s, tmp_path/'seg.dcm', result), write_sr(result, s, tmp_path/'sr.dcm')):
        ds = pydicom.dcmread(p)
        assert ds.SpecificCharacterSet == 'ISO_IR 192' and str(ds.PatientName) == PATIENT['PatientName']


@pytest.mark.parametrize('tags, refused', [(dict(PatientName='Zyxwvu'), False), (dict(PatientName='Zyxwvu^A^B^C^D^E^F'), False),
                                           (dict(PatientSex='ZYXWVU'), True), (dict(PatientID='Zyxwvu'*20), None)])
def test_nothing_is_said_of_the_patient(tmp_path, caplog, capfd, tags, refused):
    "Names that make a library remark on them, and attributes that cannot be written again"
    ct, mask = scan()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        write_series(ct, tmp_path/'ct', edit=lambda ds, k: [ds.add(pydicom.DataElement(t, ds[t].VR, v, validation_mode=0)) for t, v in tags.items()])
        s = find_series(tmp_path/'ct')[0].series
    caplog.clear(); capfd.readouterr()
    said, mask = [], MaskVolume(mask.data, s.geometry)
    with warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter('always')
        for write in (lambda: write_seg(mask, s, tmp_path/'seg.dcm'), lambda: write_sr(scored(s, ct, mask), s, tmp_path/'sr.dcm')):
            try: write()
            except JfrError as e: said += traceback.format_exception(e)
    if refused is not None: assert ('DICOM_OUT' in ''.join(said)) == refused
    out = capfd.readouterr()
    assert 'zyxwvu' not in ''.join([out.out, out.err, caplog.text, *map(str, remarks), *said]).lower()
    assert logging.getLogger('highdicom').level == logging.NOTSET


def test_a_header_without_the_patient(tmp_path):
    "What may be empty may be absent in the source"
    ct, mask = scan()
    def edit(ds, k):
        for t in ('PatientBirthDate', 'PatientSex', 'AccessionNumber', 'StudyID', 'StudyDate', 'StudyTime', 'ReferringPhysicianName'): ds.pop(t)
    write_series(ct, tmp_path/'ct', edit=edit)
    s = find_series(tmp_path/'ct')[0].series
    mask = MaskVolume(mask.data, s.geometry)
    seg = write_seg(mask, s, tmp_path/'seg.dcm')
    assert verify(seg)[0] == [] and np.array_equal(read_seg(seg, ct, s.facts).data, mask.data)


def test_made_by_hand(case, tmp_path):
    ds = pydicom.dcmread(write_seg(case['mask'], case['series'], tmp_path/'seg.dcm', made='MANUAL'))
    assert {s.SegmentAlgorithmType for s in ds.SegmentSequence} == {'MANUAL'}
    ds = pydicom.dcmread(write_seg(case['mask'], case['series'], tmp_path/'seg.dcm'))
    assert {s.SegmentAlgorithmType for s in ds.SegmentSequence} == {'SEMIAUTOMATIC'}


@pytest.mark.parametrize('order', [None, [3, 1, 0, 2, 5, 4]])
def test_a_multi_frame_source(tmp_path, order):
    ct, mask = scan((6, 40, 48), ((1, 2), (4, 4)))
    write_enhanced(ct, tmp_path/'ct.dcm', order=order)
    s = find_series(tmp_path/'ct.dcm')[0].series
    mask = MaskVolume(mask.data, s.geometry)
    seg = write_seg(mask, s, tmp_path/'seg.dcm')
    assert np.array_equal(read_seg(seg, s.geometry, s.facts).data, mask.data)
    refs = pydicom.dcmread(seg).ReferencedSeriesSequence[0].ReferencedInstanceSequence
    assert len(refs) == 1
    write_sr(scored(s, CTVolume(ct.data, s.geometry), mask), s, tmp_path/'sr.dcm', seg)
    assert verify(tmp_path/'sr.dcm')[0] == []


def test_two_multi_frame_files(tmp_path):
    ct, mask = scan((6, 40, 48), ())
    write_enhanced(ct, tmp_path/'ct.dcm')
    s = find_series(tmp_path/'ct.dcm')[0].series
    assert code(write_seg, MaskVolume(mask.data, s.geometry), replace(s, files=s.files*2), tmp_path/'no.dcm') == 'MULTIFRAME'


def test_one_frame_a_file_is_no_multi_frame(tmp_path):
    s, ct, mask, result = made(tmp_path/'ct', *scan(), NumberOfFrames=1)
    seg = write_seg(mask, s, tmp_path/'seg.dcm', result)
    assert np.array_equal(read_seg(seg, ct, s.facts).data, mask.data) and verify(seg)[0] == []


# reading

def test_an_oblique_scan(tmp_path):
    s, ct, mask, _ = made(tmp_path/'ct', *scan(oblique=True))
    assert np.array_equal(read_seg(write_seg(mask, s, tmp_path/'seg.dcm'), ct, s.facts).data, mask.data)


@pytest.mark.parametrize('seed', range(6))
def test_any_labels_on_any_grid(tmp_path, seed):
    "Frames whose bits end inside of a byte, all vessels, labels beyond them, slices without any"
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.integers((3, 5, 5), (9, 23, 23)))
    labels = rng.choice(np.array([0, 0, 0, 0, 1, 2, 3, 4, 5, 9], np.uint8), shape)*(rng.random((shape[0], 1, 1)) < .7)
    s, ct, mask, _ = made(tmp_path/'ct', CTVolume(np.full(shape, 300, np.int16), Geometry.from_spacing(shape, rng.uniform((1, .4, .4), (3, 1, 1)))),
                          MaskVolume(labels.astype(np.uint8), Geometry.from_spacing(shape, (1, 1, 1))))
    seg = write_seg(mask, s, tmp_path/'seg.dcm')
    assert np.array_equal(read_seg(seg, ct, s.facts).data, vessel_labels(mask.data))
    assert verify(seg)[0] == []


@pytest.mark.parametrize('flips', [(1, 1, -1), (1, -1, 1), (-1, 1, 1), (-1, -1, -1)])
def test_a_grid_that_runs_the_other_way(case, flips):
    turn = tuple(slice(None, None, f) for f in flips)
    assert np.array_equal(read_seg(case['seg'], case['ct'][turn]).data, case['mask'].data[turn])


def test_a_grid_whose_axes_are_exchanged(case):
    g = case['ct'].geometry
    other = Geometry(tuple(g.shape[i] for i in (2, 0, 1)), g.affine[:, [2, 0, 1, 3]])
    assert np.array_equal(read_seg(case['seg'], other).data, case['mask'].data.transpose(2, 0, 1))


def changed(path, out, edit):
    ds = pydicom.dcmread(path)
    edit(ds)
    ds.save_as(out, enforce_file_format=True)
    return out


def shifted(mm):
    def edit(ds):
        for f in ds.PerFrameFunctionalGroupsSequence:
            p = f.PlanePositionSequence[0]
            p.ImagePositionPatient = [float(x)+mm for x in p.ImagePositionPatient]
    return edit


def test_a_shifted_segmentation(case, tmp_path):
    assert code(read_seg, changed(case['seg'], tmp_path/'s.dcm', shifted(.3)), case['ct']) == 'MASK_GRID'
    near = changed(case['seg'], tmp_path/'n.dcm', shifted(.04)) # rounding of another tool
    assert np.array_equal(read_seg(near, case['ct']).data, case['mask'].data)


def test_slices_of_another_distance(case):
    g = case['ct'].geometry
    with pytest.raises(GeometryError, match='3 mm apart, those of the scan 1 mm'): read_seg(case['seg'], g.sliced((0, 0, 0), (1/3, 1, 1), (72, 40, 48)))


def test_voxels_outside_the_scan(case):
    "Empty parts may lie outside, calcium may not"
    ct, mask = case['ct'], case['mask']
    assert np.array_equal(read_seg(case['seg'], ct[5:21, 8:24, 10:29]).data, mask.data[5:21, 8:24, 10:29])
    for part in (ct[6:], ct[:20], ct[:, 9:], ct[:, :, :27]):
        with pytest.raises(GeometryError, match='lie outside the scan'): read_seg(case['seg'], part)


def test_the_series_it_was_drawn_on(case):
    facts = case['series'].facts
    for other in (replace(facts, uid='1.2'), replace(facts, study_uid='1.2')):
        assert code(read_seg, case['seg'], case['ct'], other) == 'MASK_SERIES'


def test_frames_in_another_order(case, tmp_path):
    def edit(ds):
        n, size = int(ds.NumberOfFrames), ds.Rows*ds.Columns
        bits = np.unpackbits(np.frombuffer(ds.PixelData, 'u1'), bitorder='little')[:n*size].reshape(n, size)[::-1]
        ds.PixelData = np.packbits(bits, bitorder='little').tobytes()
        ds.PerFrameFunctionalGroupsSequence = ds.PerFrameFunctionalGroupsSequence[::-1]
    assert np.array_equal(read_seg(changed(case['seg'], tmp_path/'r.dcm', edit), case['ct']).data, case['mask'].data)


def of_highdicom(case, planes, kind, numbers=(1, 2), labels=('LAD', 'RCA')):
    "A segmentation another program might have made"
    src = [pydicom.dcmread(p) for p in case['series'].files]
    c = pydicom.sr.coding.Code
    how = hd.AlgorithmIdentificationSequence('other', c('123110', 'DCM', 'Artificial Intelligence'), '1')
    said = [hd.seg.SegmentDescription(n, label, c('49755003', 'SCT', 'Morphologically Abnormal Structure'), c('85756007', 'SCT', 'Tissue'),
                                      'AUTOMATIC', how) for n, label in zip(numbers, labels)]
    more = dict(palette_color_lut_transformation=None) if kind == 'LABELMAP' else {}
    ds = hd.seg.Segmentation(src, planes, kind, said, '1.2.3', 1, '1.2.3.4', 1, 'other', 'other', '1', '1', **more)
    path = case['home']/f'{kind}.dcm'
    ds.save_as(path)
    return path


def test_a_label_map(case):
    planes = np.array([0, 0, 1, 0, 2])[case['mask'].data].astype(np.uint8)
    got = read_seg(of_highdicom(case, planes, 'LABELMAP'), case['ct'], case['series'].facts)
    assert np.array_equal(got.data, np.array([0, 2, 4])[planes])


def test_fractions_are_refused(case):
    planes = np.where(case['mask'].data[..., None] == [2, 4], .6, 0.)
    path = of_highdicom(case, planes, 'FRACTIONAL')
    with pytest.raises(JfrError, match='found a fractional one'): read_seg(path, case['ct'])


def test_two_vessels_on_one_voxel(case):
    planes = np.repeat((case['mask'].data == 2)[..., None], 2, -1).astype(np.uint8)
    path = of_highdicom(case, planes, 'BINARY')
    with pytest.raises(JfrError, match='two labels claim the same 16 voxels'): read_seg(path, case['ct'])


def test_a_segment_that_is_no_calcium(case):
    planes = (case['mask'].data == 2).astype(np.uint8)
    path = of_highdicom(case, planes, 'BINARY', (1,), ('Liver',))
    with pytest.raises(JfrError, match='segment 1 of 1 names neither'): read_seg(path, case['ct'])


@pytest.mark.parametrize('edit', [
    lambda ds: ds.pop('SegmentSequence'), lambda ds: ds.pop('PerFrameFunctionalGroupsSequence'),
    lambda ds: ds.SharedFunctionalGroupsSequence[0].pop('PixelMeasuresSequence'), lambda ds: ds.pop('PixelData'),
    lambda ds: ds.PerFrameFunctionalGroupsSequence[0].pop('PlanePositionSequence'), lambda ds: ds.pop('SegmentationType'),
    lambda ds: ds.PerFrameFunctionalGroupsSequence.pop(0), lambda ds: setattr(ds, 'PixelData', ds.PixelData[:100]),
    lambda ds: setattr(ds.SegmentSequence[1], 'SegmentNumber', 9), lambda ds: ds.pop('Rows')])
def test_a_damaged_segmentation(case, tmp_path, edit):
    assert code(read_seg, changed(case['seg'], tmp_path/'bad.dcm', edit), case['ct']) == 'DICOM_SEG'


def test_a_segmentation_cut_short(case, tmp_path):
    whole = case['seg'].read_bytes()
    for n in range(200, len(whole), len(whole)//40):
        (tmp_path/'cut.dcm').write_bytes(whole[:n])
        with pytest.raises(JfrError): read_seg(tmp_path/'cut.dcm', case['ct'])


def test_what_does_not_belong_together(case, tmp_path):
    s, no = case['series'], tmp_path/'no.dcm'
    assert code(write_sr, replace(case['result'], series_uid='1.2'), s, no) == 'OTHER_SERIES'
    other = made(tmp_path/'ct', *scan(spots=((3, 1),)))
    assert code(write_sr, other[3], other[0], no, case['seg']) == 'OTHER_SERIES'
    assert code(read_seg, case['seg'], case['ct'], other[0].facts) == 'MASK_SERIES'
    seg = write_seg(other[2], s, tmp_path/'lm.dcm')
    assert code(write_sr, case['result'], s, no, seg) == 'OTHER_SEG'
    with pytest.raises(GeometryError): write_seg(case['mask'][1:], s, no)
    assert not no.exists()


def test_unwritable(case):
    with pytest.raises(JfrError) as e: write_seg(case['mask'], case['series'], Path('/proc/none/seg.dcm'))
    assert e.value.code == 'DISK'


# scoring

def test_a_segmentation_is_scored_as_the_mask_it_is(tmp_path):
    from jfr2020.cli.main import run_command
    from jfr2020.files.nifti import write_nifti
    s, ct, mask, result = made(tmp_path/'ct', *scan())
    write_seg(mask, s, tmp_path/'seg.dcm')
    write_nifti(mask, tmp_path/'mask.nii.gz')
    entries = []
    for k, m in enumerate(('seg.dcm', 'mask.nii.gz')):
        assert run_command(['score', str(tmp_path/'ct'), '-o', str(tmp_path/f'out{k}'), '--mask', str(tmp_path/m)]) == 0
        entries.append(json.loads((tmp_path/f'out{k}'/'scores.json').read_text())['series'][0])
    for k in ('agatston', 'volume_mm3', 'vessels', 'lesions'): assert entries[0][k] == entries[1][k]
    assert entries[0]['agatston'] == pytest.approx(result.score.agatston, abs=1e-3)
    assert run_command(['score', str(tmp_path/'ct'), '-o', str(tmp_path/'out9'), '--mask', str(s.files[0])]) == 4
    e = json.loads((tmp_path/'out9'/'scores.json').read_text())['series'][0]
    assert e['refusal']['code'] == 'DICOM_SEG'


# real scans

def test_real_series(shared_data, tmp_path):
    said = []
    for n, entry in enumerate(e for f in sorted((shared_data/'ct').iterdir()) if f.is_dir() for e in find_series(f) if e.series):
        s, hot = entry.series, np.zeros(entry.series.geometry.shape, np.uint8)
        ct = read_series(s)
        for k in range(1, len(hot), len(hot)//12+1): # vessels that are none: bright voxels of some slices
            at = np.argwhere(ct.data[k] > 200)[::5]
            hot[k][tuple(at[:40].T)], hot[k][tuple(at[40:60].T)] = 2, 5
        mask = MaskVolume(hot, s.geometry)
        result = CaseResult(s.uid, 'scan', score=calcium_score(ct, mask), settings=SETTINGS, geometry=s.geometry, mask=mask)
        if any(f.code == 'NO_SERIES_UID' for f in s.findings):
            assert code(write_seg, mask, s, tmp_path/'no.dcm', result) == code(write_sr, result, s, tmp_path/'no.dcm') == 'NO_UID'
            said.append('NO_UID')
            continue
        seg = write_seg(mask, s, tmp_path/f'{n}.seg.dcm', result)
        sr = write_sr(result, s, tmp_path/f'{n}.sr.dcm', seg)
        assert np.array_equal(read_seg(seg, ct, s.facts).data, mask.data)
        assert verify(seg)[0] == [] and verify(sr)[0] == []
        drawn, _ = groups(sr)
        assert drawn[0].get_measurements()[0].value == pytest.approx(result.score.vessels['LAD'].agatston, abs=1e-3)
        said.append('written')
    assert said.count('written') >= 3 and said.count('NO_UID') == 1


def test_a_real_segmentation_of_another_program(shared_data, tmp_path):
    "Three frames of a segment without an artery's name: refused as it is, in place once it is named"
    path = shared_data/'dicom_edge'/'highdicom'/'seg_image_ct_binary.dcm'
    ds = pydicom.dcmread(path)
    at = [f.PlanePositionSequence[0].ImagePositionPatient for f in ds.PerFrameFunctionalGroupsSequence]
    h, w = (float(x) for x in ds.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing)
    A = np.array([[0, 0, w, at[0][0]], [0, h, 0, at[0][1]], [1.25, 0, 0, at[0][2]-2.5], [0, 0, 0, 1]], float)
    grid = Geometry((8, ds.Rows, ds.Columns), lps2ras(A)) # begins two slices below
    with pytest.raises(JfrError, match='segment 1 of 1 names neither'): read_seg(path, grid)
    got = read_seg(changed(path, tmp_path/'named.dcm', lambda ds: setattr(ds.SegmentSequence[0], 'SegmentLabel', 'calcium')), grid)
    assert np.array_equal(got.data[2:5], 5*pydicom.dcmread(path).pixel_array) and got.data.any() and not got.data[[0, 1, 5, 6, 7]].any()
