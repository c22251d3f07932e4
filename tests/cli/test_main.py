"The command line as other programs meet it: exit codes, clean stdout, resuming after a kill, the same bytes for any number of workers."
import json, os, signal, subprocess, sys, time, zipfile
from pathlib import Path

import pytest

from jfr2020.ground.notice import NOTICE
from jfr2020.datasets.synthetic_ct import write_cohort
from jfr2020.dicom.series import find_series

MARKS = dict(PatientName='Zorglub^Marcelline', PatientID='PID-77ZX91', PatientBirthDate='19330214', AccessionNumber='ACC-55QW',
             ReferringPhysicianName='Docteur^Folamour', PatientAddress='12 rue des Secrets', OtherPatientIDs='OTHER-31415', InstitutionName='Hopital Cache')


def jfr(*words, timeout=300, **kwargs):
    return subprocess.run([sys.executable, '-m', 'jfr2020', *map(str, words)], capture_output=True, text=True, timeout=timeout, **kwargs)


@pytest.fixture(scope='module')
def cohort(tmp_path_factory):
    "Two patients that can be scored, and one with a missing slice; identifiers planted in all"
    import pydicom
    home = tmp_path_factory.mktemp('cohort')/'in'
    write_cohort(home, plan=[dict(seed=4, agatston=300.), dict(seed=5, agatston=0.), dict(seed=4, agatston=50.)], matrix=128)
    for p in home.rglob('*.dcm'):
        ds = pydicom.dcmread(p)
        for k, v in MARKS.items(): setattr(ds, k, v)
        ds.save_as(p)
    broken = find_series(home/'patient-0003')[0].series.files
    broken[len(broken)//2].unlink()
    return home


@pytest.fixture(scope='module')
def scored(cohort, tmp_path_factory):
    out = tmp_path_factory.mktemp('scored')/'out'
    return jfr('score', cohort, '-o', out, '--json'), out


def test_stdout_is_one_json_document_and_the_code_says_that_some_were_refused(scored):
    run, out = scored
    doc = json.loads(run.stdout)
    assert run.returncode == 3, run.stderr
    assert doc == json.loads((out/'scores.json').read_text())
    assert doc['schema'] == 'jfr2020.score/1' and [s['status'] for s in doc['series']] == ['scored', 'scored', 'refused']
    assert doc['series'][2]['refusal']['code'] == 'MISSING_SLICE' and doc['series'][2]['refusal']['fix']


def test_the_json_has_every_field_of_the_contract(scored):
    s = json.loads(scored[0].stdout)['series'][0]
    assert {'series_uid', 'input', 'status', 'refusal', 'agatston', 'volume_mm3', 'mass_mg', 'category', 'cac_drs', 'vessels', 'lesions', 'heart_box',
            'geometry', 'settings', 'warnings', 'model', 'seconds'} == set(s)
    assert set(s['vessels']) == {'LM', 'LAD', 'LCX', 'RCA', 'other'} and set(s['vessels']['LM']) == {'agatston', 'volume_mm3', 'lesions'}
    assert all(set(l) == {'id', 'vessel', 'agatston', 'volume_mm3', 'mass_mg', 'peak_hu', 'centre_mm', 'slices', 'probability'} for l in s['lesions'])
    assert set(s['heart_box']) == {'start', 'stop', 'corners_mm', 'confidence', 'reason'} and set(s['category']) == {'scheme', 'index', 'label'}
    assert set(s['geometry']) == {'shape', 'spacing_mm', 'kvp', 'kernel'} and set(s['seconds']) == {'read', 'heart', 'network', 'score', 'total'}
    assert set(s['settings']) == {'threshold_hu', 'connectivity', 'min_area_mm2', 'slice_rule'}
    assert abs(sum(l['agatston'] for l in s['lesions']) - s['agatston']) < .01
    assert abs(sum(v['agatston'] for v in s['vessels'].values()) - s['agatston']) < .01


def test_the_table_has_one_row_a_series(scored):
    rows = (scored[1]/'scores.csv').read_text().splitlines()
    assert rows[0] == 'series_uid,input,status,agatston,volume_mm3,mass_mg,category,cac_drs,refusal' and len(rows) == 4


def test_masks_lie_on_the_grid_of_the_scan(scored, cohort):
    from jfr2020.files.nifti import read_mask
    masks = sorted(scored[1].rglob('mask.nii.gz'))
    assert len(masks) == 2
    grids = [e.series.geometry for e in find_series(cohort) if e.series]
    assert all(any(read_mask(m).geometry.matches(g) for g in grids) for m in masks)


def test_no_identifier_of_a_patient_gets_out(scored):
    "Planted in every header; looked for in every byte and every name that was written"
    run, out = scored
    words = [w for v in MARKS.values() for w in v.replace('^', ' ').split() if len(w) > 4]
    said = [run.stdout, run.stderr, *(p.name for p in out.rglob('*')), *(p.read_bytes().decode('latin-1') for p in out.rglob('*') if p.is_file())]
    assert [(w, s[:80]) for w in words for s in said if w in s] == []


def test_every_page_carries_the_notice_and_asks_for_nothing(scored):
    pages = [scored[1]/'index.html', *scored[1].rglob('report.html')]
    assert len(pages) == 4
    for p in pages:
        text = p.read_text()
        assert NOTICE['en'] in text and '<script' not in text and len(text) < 1.5e6
        assert not any(f'{a}="http' in text for a in ('src', 'href'))


def test_run_again_does_nothing_and_says_the_same(scored, cohort):
    run, out = scored
    before = {p: p.stat().st_mtime_ns for p in out.glob('series/*/case.json')}
    again = jfr('score', cohort, '-o', out, '--json')
    assert again.stdout == run.stdout
    changed = [p for p, t in before.items() if p.stat().st_mtime_ns != t]
    assert len(changed) == 1 # the refused one is looked at again


def results(out): # all that a user keeps, without times
    docs = [json.loads(p.read_text()) for p in sorted(out.glob('series/*/case.json'))]
    for d in docs: d.pop('seconds')
    return docs, [p.read_bytes() for p in sorted(out.rglob('mask.nii.gz'))]


def test_two_workers_give_the_same_results(scored, cohort, tmp_path):
    assert jfr('score', cohort, '-o', tmp_path/'two', '--workers', 2).returncode == 3
    assert results(tmp_path/'two') == results(scored[1])


def test_killed_and_run_again_gives_the_same_results(scored, cohort, tmp_path):
    "kill -9 at different moments; no half file is left, the next run completes"
    for wait in (1.5, 3., 4.5):
        p = subprocess.Popen([sys.executable, '-m', 'jfr2020', 'score', str(cohort), '-o', str(tmp_path/'k')], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(wait)
        p.send_signal(signal.SIGKILL); p.wait()
        for f in tmp_path.rglob('*.json'): json.loads(f.read_text()) # whole or absent
    assert jfr('score', cohort, '-o', tmp_path/'k').returncode == 3
    assert results(tmp_path/'k') == results(scored[1])
    assert not [p for p in tmp_path.rglob('.part-*')]


def test_an_archive_scores_like_its_folder(scored, cohort, tmp_path):
    with zipfile.ZipFile(tmp_path/'one.zip', 'w') as z:
        for p in (cohort/'patient-0001').iterdir(): z.write(p, f'x/{p.name}')
    run = jfr('score', tmp_path/'one.zip', '-o', tmp_path/'out', '--json')
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)['series'][0]['agatston'] == json.loads(scored[0].stdout)['series'][0]['agatston']


def test_every_input_refused_is_code_4_and_one_line(tmp_path):
    (tmp_path/'in').mkdir(); (tmp_path/'in'/'a.txt').write_text('no scan')
    run = jfr('score', tmp_path/'in', '-o', tmp_path/'out')
    assert run.returncode == 4 and 'NO_DICOM' in run.stdout and 'Traceback' not in run.stderr
    assert jfr('score', tmp_path/'absent', '-o', tmp_path/'out2').returncode == 4


@pytest.mark.parametrize('words', [['score'], ['score', 'x'], ['no-such-command'], ['score', 'x', '-o', 'out', '--scheme', 'mine'], ['score', 'x', '-o', 'out', '--model', 'm'],
                                   ['score', 'x', '-o', 'out', '--mask', 'a.nii', '--clicks', 'b.json'], ['score', 'x', '-o', 'out', '--region', 'lung']])
def test_wrong_usage_is_code_2(words, tmp_path):
    run = jfr(*words, cwd=tmp_path)
    assert run.returncode == 2 and 'Traceback' not in run.stderr, run.stderr


@pytest.mark.skipif(os.geteuid() == 0 and not Path('/dev/full').exists(), reason='needs a place that cannot be written')
def test_a_place_that_cannot_be_written_is_code_5(cohort, tmp_path):
    (tmp_path/'file').write_text('not a folder')
    run = jfr('score', cohort/'patient-0002', '-o', tmp_path/'file'/'out')
    assert run.returncode == 5 and 'Traceback' not in run.stderr and run.stderr.strip().splitlines()[-1].startswith('jfr2020: DISK')


def test_clicks_and_masks_score_what_they_mark(cohort, scored, tmp_path):
    s = json.loads(scored[0].stdout)['series'][0]
    lesion = s['lesions'][0]
    (tmp_path/'c.json').write_text(json.dumps(dict(points=[dict(xyz_mm=lesion['centre_mm'], vessel='LAD')])))
    run = jfr('score', cohort/'patient-0001', '-o', tmp_path/'c', '--clicks', tmp_path/'c.json', '--json')
    got = json.loads(run.stdout)['series'][0]
    assert run.returncode == 0 and got['vessels']['LAD']['agatston'] > 0 and got['vessels']['other']['lesions'] == 0
    mask = next(p for p in scored[1].rglob('mask.nii.gz') if json.loads((p.parent/'case.json').read_text())['agatston'] == s['agatston'])
    same = json.loads(jfr('score', cohort/'patient-0001', '-o', tmp_path/'m', '--mask', mask, '--json').stdout)['series'][0]
    assert same['agatston'] == s['agatston']
    wrong = jfr('score', cohort/'patient-0002', '-o', tmp_path/'w', '--mask', mask)
    assert wrong.returncode == 4 and 'MASK_GRID' in wrong.stdout


def test_series_lists_what_would_happen(cohort):
    doc = json.loads(jfr('series', cohort, '--json').stdout)
    assert [s['status'] for s in doc['series']] == ['ready', 'ready', 'refused']
    text = jfr('series', cohort).stdout
    assert 'MISSING_SLICE' in text and 'nan' not in text


@pytest.mark.parametrize('words', [[], ['score'], ['series'], ['demo'], ['synth'], ['info'], ['train', 'calcium'],
                                   ['resume'], ['logs']])
def test_help_answers_without_the_heavy_libraries(words):
    code = f"import sys; sys.argv = ['jfr2020', *{words!r}, '--help']\nfrom jfr2020.cli.main import main\ntry: main()\nexcept SystemExit: pass\n" \
           "print([m for m in ('torch', 'scipy', 'pandas', 'matplotlib', 'pydicom', 'jinja2') if m in sys.modules])"
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert run.stdout.splitlines()[-1] == '[]' and 'not a medical device' in run.stdout


def test_info_is_json(): assert json.loads(jfr('info', '--json').stdout)['libraries']['pydicom']


def zipped(folder, to):
    with zipfile.ZipFile(to, 'w') as z:
        for p in sorted(folder.iterdir()): z.write(p, f'x/{p.name}')
    return to


def test_two_archives_keep_their_own_pixels_and_leave_nothing_behind(scored, cohort, tmp_path):
    zips = [zipped(cohort/f'patient-000{k}', tmp_path/f'{k}.zip') for k in (1, 2)]
    run = jfr('score', *zips, '-o', tmp_path/'out', '--json')
    want = [s['agatston'] for s in json.loads(scored[0].stdout)['series'][:2]]
    assert [s['agatston'] for s in json.loads(run.stdout)['series']] == want and want[0] != want[1]
    assert not list((tmp_path/'out').rglob('*.dcm')) and not (tmp_path/'out'/'unpacked').exists()


def test_other_settings_are_scored_anew_and_the_first_again(cohort, tmp_path):
    score = lambda *more: json.loads(jfr('score', cohort/'patient-0001', '-o', tmp_path/'o', '--json', *more).stdout)['series'][0]
    first, other, again = score(), score('--min-area-mm2', 40), score()
    assert again['agatston'] == first['agatston'] != other['agatston'] and again['settings'] == first['settings']


def test_one_series_in_two_inputs_has_two_results(cohort, tmp_path):
    import shutil
    shutil.copytree(cohort/'patient-0001', tmp_path/'copy')
    for _ in range(2):
        doc = json.loads(jfr('score', cohort/'patient-0001', tmp_path/'copy', '-o', tmp_path/'o', '--json').stdout)
        assert [Path(s['input']).name for s in doc['series']] == ['patient-0001', 'copy']
    assert len(list((tmp_path/'o').glob('series/*'))) == 2


def test_a_damaged_scan_beside_a_ready_one_is_refused_aloud(cohort, tmp_path):
    "The calcium series lost a slice, the lung kernel of the same study is whole: both are said"
    import pydicom
    for name, uid in (('a', '2.25.111'), ('b', '2.25.222')):
        (tmp_path/'in'/name).mkdir(parents=True)
        for k, p in enumerate(sorted((cohort/'patient-0001').iterdir())):
            ds = pydicom.dcmread(p)
            ds.SeriesInstanceUID, ds.ConvolutionKernel = uid, 'B35f' if name == 'a' else 'B70f'
            ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f'{uid}.{k}'
            ds.save_as(tmp_path/'in'/name/p.name)
    find_series(tmp_path/'in'/'a')[0].series.files[20].unlink()
    run = jfr('score', tmp_path/'in', '-o', tmp_path/'o', '--json')
    by = {s['series_uid']: s for s in json.loads(run.stdout)['series']}
    assert run.returncode == 3 and by['2.25.222']['status'] == 'scored' and by['2.25.111']['refusal']['code'] == 'MISSING_SLICE'


def test_what_others_have_in_the_folder_stays(cohort, tmp_path):
    keep = [tmp_path/'o'/'.part-notes.txt', tmp_path/'o'/'mine'/'.part-12345678-x', tmp_path/'o'/'dicom'/'scan.dcm']
    for p in keep: p.parent.mkdir(parents=True, exist_ok=True); p.write_text('mine')
    jfr('score', cohort/'patient-0002', '-o', tmp_path/'o')
    assert jfr('demo', '-o', tmp_path/'o').returncode == 2 # dicom/ is there and is not the demo's
    assert all(p.read_text() == 'mine' for p in keep)


def test_a_second_run_into_the_same_folder_is_told_to_wait(cohort, tmp_path):
    from jfr2020.ground.disk import lock_folder
    with lock_folder(tmp_path/'o'): run = jfr('score', cohort/'patient-0002', '-o', tmp_path/'o')
    assert run.returncode == 5 and 'BUSY' in run.stderr


def test_one_bad_input_does_not_stop_the_others(cohort, tmp_path):
    (tmp_path/'x.nii').mkdir(); (tmp_path/'bad.zip').write_bytes(b'PK'); (tmp_path/'t.nii.gz').write_bytes(b'nothing')
    run = jfr('score', tmp_path/'absent.nii.gz', tmp_path/'x.nii', tmp_path/'bad.zip', tmp_path/'t.nii.gz', cohort/'patient-0002', '-o', tmp_path/'o', '--json')
    doc = json.loads(run.stdout)
    assert run.returncode == 3 and 'Traceback' not in run.stderr
    assert [s['status'] for s in doc['series']].count('scored') == 1 and len(doc['series']) == 5
    assert not [s for s in doc['series'] if s['refusal'] and s['refusal']['code'] == 'INTERNAL']


def test_a_folder_name_of_odd_bytes_is_scored(cohort, tmp_path):
    import shutil
    odd = os.fsencode(tmp_path) + b'/d\xff'
    shutil.copytree(os.fsencode(cohort/'patient-0002'), odd)
    run = subprocess.run([sys.executable.encode(), b'-m', b'jfr2020', b'score', odd, b'-o', os.fsencode(tmp_path/'o'), b'--json'], capture_output=True)
    assert run.returncode == 0 and json.loads(run.stdout)['series'][0]['status'] == 'scored', run.stderr


def test_a_damaged_result_is_made_again(cohort, tmp_path):
    jfr('score', cohort/'patient-0002', '-o', tmp_path/'o')
    case = next((tmp_path/'o').glob('series/*/case.json'))
    for name, text in (('case.json', '{half'), ('report.html', None), ('mask.nii.gz', None)):
        case.with_name(name).write_text(text) if text else case.with_name(name).unlink()
        assert jfr('score', cohort/'patient-0002', '-o', tmp_path/'o').returncode == 0
        assert case.with_name(name).exists() and json.loads(case.read_text())['status'] == 'scored'


def test_json_is_written_for_whole_refusals_too(cohort, tmp_path):
    run = jfr('score', cohort, '-o', tmp_path/'o', '--series', '1.2.3', '--json')
    assert run.returncode == 4 and json.loads(run.stdout)['series'][0]['refusal']['code'] == 'NO_SERIES'


def test_phantom_mode_and_refusals_carry_all_seconds_and_settings(scored, tmp_path):
    jfr('synth', 'qrm', '-o', tmp_path/'q', '-n', 1)
    doc = json.loads(jfr('score', tmp_path/'q', '-o', tmp_path/'o', '--region', 'all', '--json').stdout)
    for s in [*doc['series'], *json.loads(scored[0].stdout)['series']]:
        assert set(s['seconds']) == {'read', 'heart', 'network', 'score', 'total'} and len(s['settings']) == 4
    assert 450 < doc['series'][0]['agatston'] < 800


def test_workers_end_with_a_killed_parent(cohort, tmp_path):
    p = subprocess.Popen([sys.executable, '-m', 'jfr2020', 'score', str(cohort), '-o', str(tmp_path/'k'), '--workers', '2'], stdout=subprocess.DEVNULL,
                         stderr=subprocess.DEVNULL, start_new_session=True)
    time.sleep(4)
    p.kill(); p.wait()
    group = lambda: [d for d in os.listdir('/proc') if d.isdigit() and _group(d) == p.pid]
    end = time.time() + 20
    while group() and time.time() < end: time.sleep(.5)
    assert group() == []


def _group(pid):
    try: return os.getpgid(int(pid))
    except (ProcessLookupError, PermissionError): return None


@pytest.mark.parametrize('words', [['series', 'absent'], ['series', '.']])
def test_series_of_nothing_is_all_refused(words, tmp_path): assert jfr(*words, cwd=tmp_path).returncode == 4


@pytest.mark.parametrize('words', [['synth', 'ct', '-o', 'x', '-n', '0'], ['synth', 'ct', '-o', 'x', '-n', '-1'], ['score', 'x', '-o', 'o', '--workers', '0'],
                                   ['score', 'x', '-o', 'o', '--threshold-hu', '-5000'], ['score', 'x', '-o', 'o', '--mask', 'absent.nii']])
def test_numbers_and_options_out_of_range_are_wrong_usage(words, tmp_path):
    run = jfr(*words, cwd=tmp_path)
    assert run.returncode == 2 and 'Traceback' not in run.stderr and 'INTERNAL' not in run.stderr, run.stderr
