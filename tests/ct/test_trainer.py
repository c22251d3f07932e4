"""Training from the command line: killed, resumed, looked at, and used to score."""
import hashlib, json, os, signal, subprocess, sys, time
import pytest
from jfr2020.ct.loaders import synth_cases
from jfr2020.dicom.writing import write_series
from jfr2020.train.runs import read_log_rows
from jfr2020.synth.thorax import chest_phantom

ENV = {**os.environ, 'OMP_NUM_THREADS': '1'}
SMALL = '''--source store --cut all --spacing 3 3 3 --patch 4 24 24 --positive .9 --grey calcium --bs 1 --valid .25 --gpus 0
           --lr .05 --monitor MaskDice --checkpoint_every 1'''.split()


def jfr(*words, cwd=None):
    return subprocess.run([sys.executable, '-m', 'jfr2020', *map(str, words)], capture_output=True, text=True, env=ENV, cwd=cwd)


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp('training')
    synth_cases(5, store=home/'store', matrix=80, coverage=(-15, 15))
    (home/'small.json').write_text('{"model": {"arguments": {"widths": [4, 8]}}}')
    return home


def words(home, *more): return ['train', 'calcium', '--config', home/'small.json', '--path', home/'store', *SMALL, *more]


@pytest.fixture(scope='module')
def whole(home):
    run = jfr(*words(home, '--max_epochs', 12, '-o', home/'whole', '--json'))
    assert run.returncode == 0, run.stderr
    return home/'whole', json.loads(run.stdout)


def weights(folder): return hashlib.sha256((folder/'model'/'weights.safetensors').read_bytes()).hexdigest()
def rows(folder): return [{k: v for k, v in r.items() if k != 'seconds'} for r in read_log_rows(folder)]


def test_a_training_answers_with_one_document(whole):
    folder, said = whole
    assert said['schema'] == 'jfr2020.train/1' and said['epochs'] == 12 and set(said['last']) >= {'valid_loss', 'MaskDice'}
    assert sorted(p.name for p in folder.iterdir() if p.name[0] != '.') == \
        ['best.ckpt', 'config.json', 'last.ckpt', 'log.csv', 'log.jsonl', 'model', 'previous.ckpt']
    card = json.loads((folder/'model'/'model.json').read_text())
    assert card['facts']['data'] == 'store' and str(folder.parent) not in json.dumps(card)


@pytest.mark.parametrize('after', [2, 5])
def test_killed_anywhere_and_resumed_it_is_the_same_run(home, whole, after):
    folder = home/f'killed after {after}'
    run = subprocess.Popen([sys.executable, '-m', 'jfr2020', *map(str, words(home, '--max_epochs', 12, '-o', folder))],
                           env=ENV, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    end = time.monotonic()+120
    while len(read_log_rows(folder)) < after and run.poll() is None and time.monotonic() < end: time.sleep(.01)
    run.send_signal(signal.SIGKILL); run.wait()
    assert not (folder/'model').exists()
    again = jfr('resume', folder)
    assert again.returncode == 0 and 'Traceback' not in again.stderr
    assert weights(folder) == weights(whole[0]) and rows(folder) == rows(whole[0])


def test_killed_before_the_first_step_it_starts_again(home, whole):
    folder = home/'nothing done yet'; folder.mkdir()
    (folder/'config.json').write_bytes((whole[0]/'config.json').read_bytes())
    assert jfr('resume', folder).returncode == 0
    assert weights(folder) == weights(whole[0])


def test_a_run_is_not_trained_over(home, whole):
    before = {p: p.read_bytes() for p in whole[0].iterdir() if p.is_file()}
    run = jfr(*words(home, '--max_epochs', 1, '-o', whole[0]))
    assert run.returncode == 2 and run.stderr.count('\n') == 1 and 'RUN_EXISTS' in run.stderr
    assert {p: p.read_bytes() for p in whole[0].iterdir() if p.is_file()} == before


def test_what_is_no_setting_comes_back_with_the_nearest(home):
    run = jfr(*words(home, '--max_epoch', 3))
    assert run.returncode == 2 and 'max_epochs' in run.stderr and 'Traceback' not in run.stderr
    run = jfr(*words(home, '--lr', 'fast'))
    assert run.returncode == 2 and '--opt.lr' in run.stderr
    assert jfr('logs', home, '--colums', 'a').returncode == 2


def test_a_changed_configuration_is_not_resumed(home, whole):
    folder = home/'changed'; folder.mkdir()
    (folder/'config.json').write_text((whole[0]/'config.json').read_text().replace('0.05', '0.06'))
    run = jfr('resume', folder)
    assert run.returncode != 0 and 'CHANGED' in run.stderr and run.stderr.count('\n') == 1
    run = jfr('resume', home/'nothing', '--json')
    assert run.returncode == 2 and json.loads(run.stdout)['refusal']['code'] == 'NO_RUN'


def test_a_quick_look_writes_nothing(home, tmp_path):
    run = jfr(*words(home, '--fast_dev_run', '--lr', 'find'), cwd=tmp_path)
    assert run.returncode == 0 and 'nothing was written' in run.stdout
    assert not list(tmp_path.iterdir())


def test_runs_without_a_name_are_numbered(home, tmp_path):
    for k in (1, 2): assert jfr(*words(home, '--max_epochs', 1, '--limit_train_batches', 1), cwd=tmp_path).returncode == 0
    assert sorted(p.name for p in (tmp_path/'runs').iterdir()) == ['calcium-001', 'calcium-002']


def test_logs_are_shown_and_drawn(home, whole):
    run = jfr('logs', whole[0], home/'store', '--plot', '--json')
    said = json.loads(run.stdout)
    assert run.returncode == 3 and [len(r) for r in said['runs'].values()] == [12] and len(said['refused']) == 1
    assert (whole[0]/'log.png').read_bytes()[:4] == b'\x89PNG'


def test_the_trained_model_scores(whole, tmp_path):
    case = chest_phantom(3, matrix=128, agatston=500)
    write_series(case.ct, tmp_path/'scan')
    run = jfr('score', tmp_path/'scan', '-o', tmp_path/'out', '--model', whole[0]/'model', '--json')
    said = json.loads(run.stdout)['series'][0]
    assert said['status'] == 'scored', said['refusal']
    assert said['model']['sha256'] == json.loads((whole[0]/'model'/'model.json').read_text())['weights']['sha256']


def test_two_processes_train_as_one(home):
    pytest.importorskip('torch.distributed')
    both = words(home, '--max_epochs', 3, '--bs', 2)
    one = jfr(*both, '--bs', 4, '-o', home/'alone')
    two = jfr(*both, '-o', home/'together', '--distributed_backend', 'ddp', '--processes', 2, '--json')
    assert (one.returncode, two.returncode) == (0, 0), two.stderr
    said = json.loads(two.stdout)
    assert said['epochs'] == 3 and said['run'] == str(home/'together')
    assert rows(home/'together')[-1]['step'] == rows(home/'alone')[-1]['step'] # each has its share of four
    quick = jfr(*both, '--fast_dev_run', '--distributed_backend', 'ddp', '--processes', 2)
    assert quick.returncode == 0 and quick.stdout.count('nothing was written') == 1
    refused = jfr(*both, '--processes', 2)
    assert refused.returncode == 2 and 'add --distributed_backend ddp' in refused.stderr


def test_gpus_that_are_not_there_are_refused(home, tmp_path):
    run = jfr(*words(home, '--gpus', 900, '--distributed_backend', 'ddp', '-o', tmp_path/'r'))
    assert run.returncode == 2 and 'NO_GPU' in run.stderr and run.stderr.count('\n') == 1 and not (tmp_path/'r').exists()


def test_progress_is_a_line_an_epoch_and_nothing_else(home, tmp_path):
    run = jfr(*words(home, '--max_epochs', 2, '-o', tmp_path/'run'))
    assert [l.split(' ')[0] for l in run.stderr.splitlines()] == ['[1/2]', '[2/2]'] and len(run.stdout.splitlines()) == 2


@pytest.mark.parametrize('more, unknown', [(['--target', 'score', '--patch', 'none', '--shape', 4, 24, 24], 'ScoreICC'),
                                           (['--target', 'class', '--patch', 'none', '--shape', 4, 24, 24], None),
                                           (['--labels', 'vessels'], None)])
def test_every_target_finds_its_network_and_one_patient_has_no_agreement(home, tmp_path, more, unknown):
    (tmp_path/'widths.json').write_text('{"model": {"arguments": {"widths": [4, 8]}}}')
    kept = [w for w in SMALL if w not in ('--monitor', 'MaskDice')]
    run = jfr('train', 'calcium', '--config', tmp_path/'widths.json', '--path', home/'store', *kept, *more, '--max_epochs', 1,
              '-o', tmp_path/'run', '--json')
    assert run.returncode == 0, run.stderr
    last = json.loads(run.stdout, parse_constant=lambda w: pytest.fail(f'{w} is no JSON'))['last']
    assert unknown is None or last[unknown] is None
    assert (tmp_path/'run'/'model'/'weights.safetensors').exists()


def test_a_network_of_one_label_names_no_vessel():
    import torch
    from jfr2020.data.transforms import Onto  # noqa: F401 torch comes with it
    from jfr2020.ct.predict import ModelSegmenter
    from jfr2020.ct.preprocessing import Preprocessing
    from jfr2020.models.base import wrap_module
    case = chest_phantom(3, matrix=128, agatston=500)
    net = wrap_module(torch.nn.Conv3d(1, 1, 1))
    with torch.no_grad(): net.module.weight.fill_(100.); net.module.bias.fill_(-45.)
    net.preprocessing = Preprocessing((130, 400), spacing=None, cut='all', shape=None)
    found = ModelSegmenter(net)(case.ct).data
    assert set(found[found > 0].tolist()) == {5}
