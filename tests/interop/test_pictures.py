"SEG, SR, Secondary Capture and PDF of scored series: from the command line, byte by byte, and what validators and odd sources say."
import contextlib, io, json, os, re, shutil, subprocess, sys, zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from jfr2020.calcium.score import calcium_score
from jfr2020.calcium.case import CaseResult
from jfr2020.calcium.categories import cac_drs, risk_category
from jfr2020.cli.main import run_command
from jfr2020.ground.errors import Finding, JfrError
from jfr2020.ground.geometry import Geometry
from jfr2020.dicom.reading import read_series
from jfr2020.dicom.header import read_dataset
from jfr2020.files.nifti import write_nifti
from jfr2020.dicom.series import find_series
from jfr2020.dicom.writing import Protocol, write_series
from jfr2020.report.pdf import case_pdf, case_plates
from jfr2020.interop.pictures import write_pdf_object, write_sc
from jfr2020.ground.volume import CTVolume, MaskVolume

FLAGS = '--seg', '--sr', '--sc', '--pdf'
MARKS = dict(PatientName='Zorglub^Marcelline', PatientID='PID-77ZX91', PatientBirthDate='19330214', AccessionNumber='ACC-55QW',
             ReferringPhysicianName='Docteur^Folamour')
WORDS = [w for v in MARKS.values() for w in v.split('^') if len(w) > 4]


def jfr(command, *words):
    "The command in this process, all of the volume searched: exit code, stdout, stderr"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): code = run_command([command, *map(str, words), '--region', 'all'])
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def in_a_process(*words, **env):
    return subprocess.run([sys.executable, '-m', 'jfr2020', *map(str, words), '--region', 'all'], capture_output=True, text=True, timeout=300,
                          env=os.environ | env)


def resave(folder, **tags):
    import pydicom
    for p in Path(folder).rglob('*.dcm'):
        ds = pydicom.dcmread(p)
        for k, v in tags.items(): setattr(ds, k, v)
        ds.save_as(p)
    return folder


@pytest.fixture(scope='module')
def patient(tmp_path_factory):
    pytest.importorskip('highdicom')
    home = tmp_path_factory.mktemp('patient')
    little(home, 'in', **MARKS)
    return home/'in'


@pytest.fixture(scope='module')
def written(patient, tmp_path_factory):
    out = tmp_path_factory.mktemp('written')/'out'
    return jfr('score', patient, '-o', out, *FLAGS), out


def folders(out): return sorted((out/'series').iterdir())


def objects(out): # path in its folder -> bytes, of all that holds no time
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob('*'))
            if p.suffix in ('.dcm', '.pdf', '.gz') and p.is_file()}


def test_all_four_options_write_their_files(written):
    run, out = written
    assert run.returncode == 0, run.stderr
    assert {p.name for p in folders(out)[0].iterdir()} == {'case.json', 'mask.nii.gz', 'report.html', 'picture.json', 'seg.dcm', 'sr.dcm', 'sc',
                                                           'report.pdf', 'pdf.dcm'}
    assert 'seg.dcm, sr.dcm, sc/*.dcm, report.pdf, pdf.dcm' in run.stdout
    assert json.loads((out/'scores.json').read_text())['series'][0]['warnings'] is not None
    assert not [p for p in out.rglob('.part-*')]


def test_two_runs_give_the_same_bytes_whatever_the_process(written, patient, tmp_path):
    run = in_a_process('score', patient, '-o', tmp_path/'o', *FLAGS, '--workers', 2, PYTHONHASHSEED='7', TZ='Asia/Tokyo')
    assert run.returncode == 0, run.stderr
    one, two = objects(written[1]), objects(tmp_path/'o')
    assert list(one) == list(two) and [k for k in one if one[k] != two[k]] == []


def test_only_what_is_there_is_named(written, tmp_path):
    run = jfr('score', tmp_path/'gone', '-o', tmp_path/'o', *FLAGS)
    assert run.returncode == 4 and 'seg.dcm' not in run.stdout
    out = io.StringIO()
    with contextlib.redirect_stdout(out): run_command(['series', str(written[1])])
    assert 'Modality is SEG' in out.getvalue() and '(None, None, None)' not in out.getvalue()


def test_a_segmentation_says_who_drew_it(written, patient, tmp_path):
    how = lambda out: {str(s.SegmentAlgorithmType) for p in out.rglob('seg.dcm') for s in read_dataset(p).SegmentSequence}
    mask = next(written[1].rglob('mask.nii.gz'))
    assert jfr('score', patient, '-o', tmp_path/'m', '--mask', mask, '--seg').returncode == 0
    assert (how(written[1]), how(tmp_path/'m')) == ({'AUTOMATIC'}, {'SEMIAUTOMATIC'})


@pytest.mark.skipif(not shutil.which('dciodvfy'), reason='dciodvfy (dicom3tools) is not installed')
def test_dciodvfy_finds_no_error_in_any_object(written):
    files, errors = sorted(written[1].rglob('*.dcm')), []
    for p in files:
        run = subprocess.run(['dciodvfy', '-new', str(p)], capture_output=True, text=True)
        errors += [(p.name, l) for l in (run.stdout+run.stderr).splitlines() if l.startswith('Error')]
    assert errors == [] and len(files) == 3+4 # the overview and three slices


def test_the_objects_belong_to_the_study_and_the_names_say_nobody(written, patient):
    run, out = written
    source = read_dataset(next(patient.rglob('*.dcm')))
    for p in out.rglob('*.dcm'):
        ds = read_dataset(p)
        assert (ds.PatientName, ds.PatientID, ds.StudyInstanceUID) == (source.PatientName, source.PatientID, source.StudyInstanceUID), p
        assert ds.SeriesInstanceUID != source.SeriesInstanceUID and 'research' in ds.SeriesDescription.lower()
        assert not p.read_bytes()[:128].strip(b'\0')
    said = [run.stdout, run.stderr, *(str(p.relative_to(out)) for p in out.rglob('*'))]
    said += [p.read_bytes().decode('latin-1') for p in out.rglob('*') if p.is_file() and p.suffix != '.dcm']
    assert [(w, s[:80]) for w in WORDS for s in said if w in s] == []


def text_of(pdf): # every stream that unpacks
    out = b''
    for m in re.finditer(rb'stream\r?\n(.*?)endstream', pdf, re.S):
        try: out += zlib.decompress(m[1])
        except zlib.error: pass
    return out


def test_the_pdf_is_whole_and_the_object_holds_it(written):
    folder = folders(written[1])[0]
    pdf, ds = (folder/'report.pdf').read_bytes(), read_dataset(folder/'pdf.dcm')
    assert pdf.startswith(b'%PDF-1.') and pdf.rstrip().endswith(b'%%EOF') and b'CreationDate' not in pdf
    assert pdf.count(b'/Type /Page ') == int(re.search(rb'/Count (\d+)', pdf)[1]) >= 2
    assert ds.EncapsulatedDocument[:ds.EncapsulatedDocumentLength] == pdf and ds.BurnedInAnnotation == 'NO'
    assert b'BT' in text_of(pdf) and not any(w.encode() in pdf+text_of(pdf) for w in WORDS)


@pytest.mark.skipif(not shutil.which('pdftotext'), reason='pdftotext is not installed')
def test_french_letters_come_out_of_the_pdf(tmp_path):
    (tmp_path/'r.pdf').write_bytes(case_pdf(little(tmp_path)[0], 'fr'))
    text = subprocess.run(['pdftotext', str(tmp_path/'r.pdf'), '-'], capture_output=True, text=True).stdout
    assert 'Score d’Agatston' in text and 'Artère' in text and 'dispositif médical : ni diagnostic' in text and 'Lésions' in text


def test_other_outputs_asked_later_are_written_and_those_not_asked_are_gone(patient, tmp_path):
    first = jfr('score', patient, '-o', tmp_path/'o', '--json')
    assert not list((tmp_path/'o').rglob('*.pdf'))
    second = jfr('score', patient, '-o', tmp_path/'o', '--json', '--sc', '--pdf')
    folder = folders(tmp_path/'o')[0]
    assert (folder/'sc'/'0001.dcm').exists() and (folder/'report.pdf').exists()
    strip = lambda run: [{k: v for k, v in s.items() if k != 'seconds'} for s in json.loads(run.stdout)['series']]
    assert strip(first) == strip(second)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob('*')}
    assert '(done before)' in jfr('score', patient, '-o', tmp_path/'o', '--sc', '--pdf').stderr
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob('*')}
    (folder/'pdf.dcm').unlink()
    jfr('score', patient, '-o', tmp_path/'o', '--sc', '--pdf')
    assert (folder/'pdf.dcm').exists()
    jfr('score', patient, '-o', tmp_path/'o')
    assert {p.name for p in folder.iterdir()} == {'case.json', 'mask.nii.gz', 'report.html', 'picture.json'}


def test_a_series_refused_later_keeps_nothing_of_its_old_score(patient, tmp_path):
    shutil.copytree(patient, tmp_path/'in')
    jfr('score', tmp_path/'in', '-o', tmp_path/'o', '--sc', '--pdf')
    files = find_series(tmp_path/'in')[0].series.files
    files[len(files)//2].unlink()
    run = jfr('score', tmp_path/'in', '-o', tmp_path/'o', '--sc', '--pdf')
    assert run.returncode == 4 and {p.name for p in folders(tmp_path/'o')[0].iterdir()} == {'case.json', 'report.html'}


def test_a_run_that_is_stopped_between_two_files_is_done_again_to_the_same_bytes(written, patient, tmp_path, monkeypatch):
    import jfr2020.cli.score
    real = jfr2020.cli.score.write_sc
    def stop(*a, **k): raise KeyboardInterrupt
    monkeypatch.setattr(jfr2020.cli.score, 'write_sc', stop)
    assert jfr('score', patient, '-o', tmp_path/'o', *FLAGS).returncode == 130
    assert {p.name for p in folders(tmp_path/'o')[0].iterdir()} == {'seg.dcm', 'sr.dcm'} # no case.json: nothing counts
    monkeypatch.setattr(jfr2020.cli.score, 'write_sc', real)
    assert jfr('score', patient, '-o', tmp_path/'o', *FLAGS).returncode == 0
    assert objects(tmp_path/'o') == objects(written[1])


def test_an_archive_gives_the_objects_of_its_folder(written, patient, tmp_path):
    archive = shutil.make_archive(str(tmp_path/'scan'), 'zip', patient)
    assert jfr('score', archive, '-o', tmp_path/'o', *FLAGS, '--workers', 2).returncode == 0
    plain = lambda out: {k.split('/', 2)[2]: v for k, v in objects(out).items()} # the folder is named after the input
    assert plain(tmp_path/'o') == plain(written[1])


def test_results_inside_of_the_input_do_not_change_it(patient, tmp_path):
    shutil.copytree(patient, tmp_path/'in')
    runs = [jfr('score', tmp_path/'in', '-o', tmp_path/'in'/'out', '--json', *FLAGS, *more) for more in ((), ('--no-resume',))]
    assert [r.returncode for r in runs] == [0, 0], runs[1].stderr
    one, two = ([(s['series_uid'], s['agatston']) for s in json.loads(r.stdout)['series']] for r in runs)
    assert one == two and len(one) == 1


def test_a_missing_package_is_code_5_before_anything_is_scored(patient, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'highdicom', None)
    for flag in ('--seg', '--sr'):
        run = jfr('score', patient, '-o', tmp_path/'o', flag)
        assert run.returncode == 5 and 'jfr2020[dicomout]' in run.stderr and 'Traceback' not in run.stderr
    assert not (tmp_path/'o').exists()
    assert jfr('score', patient, '-o', tmp_path/'o', '--sc', '--pdf').returncode == 0


def test_volume_files_have_no_study(patient, tmp_path):
    entry = find_series(patient)[0]
    write_nifti(read_series(entry.series), tmp_path/'ct.nii.gz')
    run = jfr('score', tmp_path/'ct.nii.gz', '-o', tmp_path/'o', '--sc')
    assert run.returncode == 2 and 'belong to no DICOM study' in run.stderr and not (tmp_path/'o').exists()
    run = jfr('score', tmp_path/'ct.nii.gz', '-o', tmp_path/'o', '--pdf')
    assert run.returncode == 0 and {p.suffix for p in folders(tmp_path/'o')[0].iterdir()} == {'.json', '.gz', '.html', '.pdf'}
    run = jfr('score', tmp_path/'ct.nii.gz', patient, '-o', tmp_path/'mixed', '--sc', '--json')
    nifti, dicom = json.loads(run.stdout)['series']
    assert run.returncode == 0 and 'NOT_WRITTEN: 1 of 2' in run.stderr
    assert [w['text'][:18] for w in nifti['warnings'] if w['code'] == 'NOT_WRITTEN'] == ['SC is not written:']
    assert not [w for w in dicom['warnings'] if w['code'] == 'NOT_WRITTEN']
    again = jfr('score', tmp_path/'ct.nii.gz', patient, '-o', tmp_path/'mixed', '--sc')
    assert again.stderr.count('(done before)') == 2


def test_a_phantom_of_unknown_voltage_is_said_to_be(tmp_path):
    write_nifti(little(tmp_path)[0].ct, tmp_path/'ct.nii.gz')
    doc = json.loads(jfr('score', tmp_path/'ct.nii.gz', '-o', tmp_path/'o', '--json').stdout)
    assert [w['code'] for w in doc['series'][0]['warnings']] == ['KVP_UNKNOWN']


def test_two_series_whose_uids_are_none_have_a_folder_each(tmp_path):
    for n in 'ab':
        case, series = little(tmp_path, name=n)
        resave(tmp_path/n, SeriesInstanceUID=f'../{n}')
    (tmp_path/'in').mkdir()
    for n in 'ab': (tmp_path/n).rename(tmp_path/'in'/n)
    seen = []
    for _ in range(2):
        run = jfr('score', tmp_path/'in', '-o', tmp_path/'o', '--json')
        assert [s['refusal']['code'] for s in json.loads(run.stdout)['series']] == ['BAD_UID']*2
        seen.append([p.name for p in folders(tmp_path/'o')])
    assert len(seen[0]) == 2 and seen[0] == seen[1]


# ------------------------------------------------------------------ odd sources

def little(home, name='ct', protocol=Protocol(), **tags):
    "A small synthetic heart with two lesions, as a series that was read back: (case, series)"
    g = Geometry.from_spacing((12, 80, 80), (3, 1.5, 1.5), centre=(0, 0, 0))
    d, h, w = np.indices(g.shape)
    r = np.hypot(h-40, w-44)
    hu = np.where(r < 26, 40, np.where(r < 34, -80, -900))+np.random.default_rng(0).normal(0, 12, g.shape)
    hu[4:6, 28:32, 50:56], hu[8, 50:54, 24:27] = 420, 300
    mask = np.where(hu >= 250, np.where(w > 40, 2, 4), 0).astype('u1')
    write_series(CTVolume(hu.astype('i2'), g), home/name, protocol, **tags)
    series = find_series(home/name)[0].series
    return case_of(read_series(series), mask, series), series


def case_of(ct, mask, series):
    m = MaskVolume(mask, ct.geometry)
    s = calcium_score(ct, m)
    return CaseResult(series.uid, 'scan', score=s, category=risk_category(s.agatston), geometry=ct.geometry, ct=ct, mask=m, facts=series.facts,
                      cac_drs=cac_drs(s.agatston, s.n_vessels))


@pytest.mark.parametrize('syntax', ['implicit', 'big', 'deflated', 'rle'])
def test_any_coding_of_the_source_gives_the_same_pictures(tmp_path, syntax):
    case, series = little(tmp_path, protocol=Protocol(syntax=syntax), StudyDescription='Étude', SpecificCharacterSet='ISO_IR 192')
    plain = little(tmp_path, 'plain', StudyDescription='Étude', SpecificCharacterSet='ISO_IR 192')
    got, want = ([read_dataset(p, pixels=True) for p in write_sc(c, s, tmp_path/n)] for c, s, n in ((case, series, 'a'), (*plain, 'b')))
    assert [o.PixelData for o in got] == [o.PixelData for o in want] and got[0].StudyDescription == 'Étude'
    assert got[1].SourceImageSequence[0].ReferencedSOPInstanceUID == series.headers[4].get('SOPInstanceUID')


def test_names_in_other_characters_arrive_unchanged(tmp_path):
    for k, (name, charset) in enumerate([('Lefèvre^Zoé', 'ISO_IR 100'), ('Иванов^Пётр', 'ISO_IR 144'), ('Yamada^Tarou=山田^太郎', ['', 'ISO 2022 IR 87'])]):
        case, series = little(tmp_path, f's{k}', PatientName=name, SpecificCharacterSet=charset)
        ds = read_dataset(write_sc(case, series, tmp_path/f'o{k}')[0])
        assert str(ds.PatientName) == name
        assert str(read_dataset(write_pdf_object(case, series, tmp_path/f'{k}.dcm', pdf=b'%PDF-')).PatientName) == name


@pytest.mark.filterwarnings('error')
def test_damaged_values_of_the_source_neither_stop_nor_leak(tmp_path, capfd):
    def edit(ds, k): ds.PatientBirthDate, ds.StudyTime, ds.PatientAge = 'Zorglub', 'noon', 'as old as Zorglub, or older'
    with pytest.warns(UserWarning): # of the test's own writing
        little_edit(tmp_path, edit)
    series = find_series(tmp_path/'ct')[0].series
    case = case_of(read_series(series), mask_of(series), series)
    ds = read_dataset(write_sc(case, series, tmp_path/'sc')[0])
    assert ds.PatientID == 'SYN000000'
    assert 'Zorglub' not in ''.join(capfd.readouterr())


def mask_of(series):
    m = np.zeros(series.geometry.shape, 'u1'); m[4:6, 28:32, 50:56] = 2
    return m


def little_edit(home, edit):
    g = Geometry.from_spacing((12, 80, 80), (3, 1.5, 1.5), centre=(0, 0, 0))
    hu = np.full(g.shape, 40, 'i2'); hu[4:6, 28:32, 50:56] = 420
    return write_series(CTVolume(hu, g), home/'ct', edit=edit)


def test_words_and_losses_in_the_source_stay_said(tmp_path):
    case, series = little(tmp_path, BurnedInAnnotation='YES', LossyImageCompression='01', LossyImageCompressionRatio='12.5')
    ds = read_dataset(write_sc(case, series, tmp_path/'sc')[1])
    assert (ds.BurnedInAnnotation, ds.LossyImageCompression, ds.LossyImageCompressionRatio) == ('YES', '01', 12.5)


def test_without_a_study_nothing_is_written(tmp_path):
    case, series = little(tmp_path, StudyInstanceUID='')
    for write, name in ((write_sc, 'sc'), (write_pdf_object, 'pdf.dcm')):
        with pytest.raises(JfrError, match='NO_STUDY'): write(case, series, tmp_path/name)
        assert not (tmp_path/name).exists()


def test_an_unnamed_series_is_not_referred_to(tmp_path):
    case, series = little(tmp_path, SeriesInstanceUID='')
    assert [f.code for f in series.findings][0] == 'NO_SERIES_UID'
    ds = read_dataset(write_sc(case, series, tmp_path/'sc')[0])
    assert 'ReferencedSeriesSequence' not in ds and len(ds.SourceImageSequence) == 12


def test_frames_of_a_multi_frame_file_are_named_by_number(tmp_path):
    from tests.dicom.enhanced import write_enhanced
    g = Geometry.from_spacing((12, 80, 80), (3, 1.5, 1.5), centre=(0, 0, 0))
    hu = np.full(g.shape, 40, 'i2'); hu[4:6, 28:32, 50:56] = 420
    order = [*range(6, 12), *range(6)]
    series = find_series(write_enhanced(CTVolume(hu, g), tmp_path/'e.dcm', order=order))[0].series
    case = case_of(read_series(series), mask_of(series), series)
    first, lowest = [read_dataset(p) for p in write_sc(case, series, tmp_path/'sc')][:2]
    assert [o.ReferencedFrameNumber for o in lowest.SourceImageSequence] == [order.index(4)+1]
    refs = first.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    assert len(refs) == 1 and 'ReferencedFrameNumber' not in refs[0] and first.PatientID == ''


def test_pixels_of_a_plate_hold_the_scan_and_measure_in_mm(tmp_path):
    case, series = little(tmp_path)
    plate = case_plates(case)[1]
    ds = read_dataset(write_sc(case, series, tmp_path/'sc')[1], pixels=True)
    assert np.array_equal(ds.pixel_array, plate.rgb) and float(ds.PixelSpacing[0]) == pytest.approx(plate.mm, rel=1e-5)
    grey = (np.ptp(plate.rgb.astype(int), axis=2) == 0) & (plate.rgb[..., 0] > 10) & (plate.rgb[..., 0] < 250)
    assert grey.mean() > .3
    red = np.argwhere((plate.rgb[..., 0] > 200) & (plate.rgb[..., 1] < 120) & (plate.rgb[..., 2] < 120)) # outline and number of lesion 1
    assert len(red) > 20
    wide = np.ptp(red[:, 1][red[:, 1] < np.median(red[:, 1])+1])*plate.mm
    assert 0 < wide < 30


def test_hostile_words_are_only_words(tmp_path):
    case, _ = little(tmp_path)
    odd = replace(case, findings=(Finding('X', r'$\frac{1}$ \input{x} <script>' + 'x'*500),), facts=replace(case.facts, description='$x_$ 山田\n\0'))
    assert case_pdf(odd).startswith(b'%PDF-')
    assert len(case_plates(replace(case, cac_drs='$')))
