"The store from the command line: exit codes, one JSON document, refusals that say what to type, damage that stops nobody else."
import contextlib, io, json, os, shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from jfr2020.cli.main import run_command
from jfr2020.datasets.synthetic_dwi import write_dwi_cohort
from jfr2020.store.hdf5 import H5Store


def jfr(*words):
    "The command in this process: exit code, stdout, stderr"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try: code = run_command([*map(str, words)])
        except SystemExit as e: code = e.code
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def asked(*words): # with --json: exit code and the one document
    run = jfr(*words, '--json')
    return run.code, json.loads(run.out)


@pytest.fixture(scope='module')
def study(tmp_path_factory):
    home = tmp_path_factory.mktemp('étude à moi')
    write_dwi_cohort(home, n=3, seed=0, shape=(10,12,11), n_lines=20, order=2)
    return home


@pytest.fixture(scope='module')
def made(study, tmp_path_factory):
    out = tmp_path_factory.mktemp('out')/'un store'
    lists = [f'--{k}={study/k}.txt' for k in ('training','validation','testing')]
    assert jfr('store', 'create', study, '-o', out, '--config', study/'config.json', *lists).code == 0
    return out


@pytest.fixture
def copied(made, tmp_path): return Path(shutil.copytree(made, tmp_path/'s'))


def shard(store, subject): return Path(store)/'subjects'/H5Store(store).entry(subject)['file']


@pytest.mark.parametrize('words,said', [(('--step-mm', '0'), 'step_mm'), (('--step-mm=-1',), 'step_mm'), (('--step-mm', 'nan'), 'step_mm'),
    (('--nb-points', '1'), 'nb_points'), (('--compress-mm', '0'), 'compress_mm'), (('--step-mm', '1', '--nb-points', '9'), 'one way'),
    (('--training', 'gone.txt'), 'training')])
def test_wrong_usage_is_said_before_anything_is_made(study, tmp_path, words, said):
    run = jfr('store', 'create', study, '-o', tmp_path/'s', '--config', study/'config.json', *words)
    assert run.code == 2 and said in run.err and not (tmp_path/'s').exists()


def test_lines_are_resampled_only_where_there_are_lines(study, tmp_path):
    groups = json.loads((study/'config.json').read_text())
    (tmp_path/'c.json').write_text(json.dumps({k: v for k,v in groups.items() if v['type'] == 'volume'}))
    run = jfr('store', 'create', study, '-o', tmp_path/'s', '--config', tmp_path/'c.json', '--step-mm', '1')
    assert run.code == 2 and 'no streamlines' in run.err


@pytest.mark.parametrize('seed', ['-1', '1.5', 'x', '1'*30])
@pytest.mark.parametrize('kind', ['ct', 'qrm', 'dwi'])
def test_seeds_that_are_none(tmp_path, kind, seed):
    run = jfr('synth', kind, '-o', tmp_path/'o', f'--seed={seed}')
    assert run.code == 2 and 'whole number' in run.err and not (tmp_path/'o').exists()


def test_what_to_type_is_said(study, made, tmp_path):
    run = jfr('store', 'create', study, '-o', made, '--config', study/'config.json', '--nb-points', '5')
    assert run.code == 4 and '--overwrite' in run.out
    (tmp_path/'l.txt').write_text('sub-01 sub-77')
    run = jfr('store', 'create', study, '-o', tmp_path/'s', '--config', study/'config.json', '--training', tmp_path/'l.txt')
    assert run.code == 4 and '--skip-incomplete' in run.err
    code, said = asked('store', 'create', study, '-o', tmp_path/'s', '--config', study/'config.json', '--training', tmp_path/'l.txt', '--skip-incomplete')
    assert code == 3 and said['written'] == ['sub-01'] and list(said['refused']) == ['sub-77']


def test_a_rebuilt_index_is_no_failure(copied):
    for lost in (['index.json'], ['index.json', 'lists.json']):
        for name in lost: (copied/name).unlink()
        assert jfr('store', 'check', copied).code == 4
        code, said = asked('store', 'check', copied, '--reindex')
        assert (code, said['whole']) == (0, True) and said['faults'][0]['code'] == 'NO_INDEX'
        assert jfr('store', 'check', copied).code == 0


def test_a_subject_that_is_left_out_of_the_index_is_refused(copied):
    os.truncate(shard(copied, 'sub-02'), 5000)
    code, said = asked('store', 'check', copied, '--reindex')
    assert (code, said['whole'], len(said['faults'])) == (3, False, 1)
    shutil.rmtree(copied/'subjects'); (copied/'subjects').mkdir()
    assert asked('store', 'check', copied, '--reindex')[0] == 4


def test_one_damaged_subject_hides_no_other(copied):
    os.truncate(shard(copied, 'sub-02'), 5000)
    code, said = asked('store', 'list', copied)
    assert code == 3 and list(said['subjects']) == ['sub-01', 'sub-03'] and said['refused']['sub-02']['code'] == 'CHANGED'
    run = jfr('store', 'list', copied)
    assert 'sub-03 (testing)' in run.out and 'not a whole HDF5 file' in run.out
    assert jfr('store', 'list', copied, 'sub-02').code == 4 and jfr('store', 'list', copied, 'nobody').code == 4


@pytest.mark.parametrize('words', [('list', 'gone'), ('check', 'gone'), ('extract', 'gone', 's', 'g', '-o', 'x.nii'), ('pack', 'gone', '-o', 'x.h5'),
    ('import', 'gone.h5', '-o', 'x'), ('create', 'gone', '-o', 'x', '--config', 'gone.json')])
def test_what_is_missing_is_one_document_and_one_line(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    run = jfr('store', *words, '--json')
    assert run.code in (2, 4) and set(json.loads(run.out)['refusal']) == {'code', 'cause', 'fix'}
    assert len(run.err.splitlines()) == 1 and 'INTERNAL' not in run.err and not list(tmp_path.iterdir())
