"Runs that are killed, damaged or poisoned: nothing unusable, nothing different, nothing infinite. Tiny models, no volumes."
import os, random, signal, subprocess, sys, textwrap, time, types, warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.basics import Callback, DataLoaders, Learner, OptimWrapper, SGD, nn, partial, ranger, set_seed
from fastai.callback.all import EarlyStoppingCallback, MixedPrecision, ReduceLROnPlateau, ShowGraphCallback

from jfr2020.train.callbacks import (LAST_CKPT, PREVIOUS_CKPT, SaveBest, SaveState, ResumeState, StopEarly, newest_state, read_checkpoint,
                               write_checkpoint)
from jfr2020.data.block import VolumeDL
from jfr2020.ground.errors import JfrError, StoreError
from jfr2020.train.runlog import RunLog, read_log, read_log_rows
from jfr2020.train.steps import Accumulate, AverageWeights, ClipGradient, GuardFinite, HalfPrecision, LimitBatches, all_finite

pytestmark = [pytest.mark.filterwarnings('ignore')]

os.environ['OMP_NUM_THREADS'] = '1' # of child processes: sums of several threads have no one order
torch.set_num_threads(1)


class Noisy:
    "Samples with fresh noise of three generators"
    def __init__(self, n=24): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i):
        noise = .1*torch.randn(3) + .1*torch.tensor(np.random.rand(3), dtype=torch.float32) + .1*random.random()
        return torch.full((3,), i/self.n)+noise, torch.tensor([2*i/self.n-1])


def toy(seed=0, workers=0, loader=None, **kwargs):
    set_seed(seed)
    make = loader or (lambda bs, shuffle: VolumeDL(Noisy(), bs=bs, shuffle=shuffle, num_workers=workers, drop_last=shuffle))
    dls = DataLoaders(make(4, True), make(8, False), device='cpu')
    model = nn.Sequential(nn.Linear(3, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(.3), nn.Linear(16, 1))
    return Learner(dls, model, F.mse_loss, **kwargs)


def fit(learn, *cbs, n=4, one_cycle=True):
    with learn.no_logging(), learn.no_bar():
        (learn.fit_one_cycle(n, .02, cbs=cbs) if one_cycle else learn.fit(n, .02, cbs=cbs))
    return learn


class PowerCut(Callback):
    order = 40
    def __init__(self, at, where='after_pred'):
        super().__init__(); self.at, self.where = at, where
    def _cut(self, where):
        if where == self.where and self.train_iter == self.at: raise KeyboardInterrupt
    def after_pred(self): self._cut('after_pred' if self.training else 'valid')
    def after_step(self): self._cut('after_step')


def stopped(learn, at, *cbs, where='after_pred', **kwargs):
    with pytest.raises(KeyboardInterrupt): fit(learn, *cbs, PowerCut(at, where), **kwargs)


def numbers(o):
    if isinstance(o, torch.Tensor): yield o
    elif isinstance(o, dict): yield from (n for v in o.values() for n in numbers(v))
    elif isinstance(o, (list, tuple)) or type(o).__name__ == 'L': yield from (n for v in o for n in numbers(v))
    elif isinstance(o, (int, float)): yield torch.tensor(float(o), dtype=torch.float64)


def assert_same(a, b):
    for x, y in ((a.model.state_dict(), b.model.state_dict()), (a.opt.state_dict(), b.opt.state_dict()),
                 (a.recorder.losses, b.recorder.losses), (a.recorder.lrs, b.recorder.lrs), (a.recorder.values, b.recorder.values)):
        p, q = list(numbers(x)), list(numbers(y))
        assert len(p) == len(q) > 0
        assert all(torch.equal(i, j) for i, j in zip(p, q))


# ---- resume

PLAIN = lambda bs, shuffle: torch.utils.data.DataLoader(Noisy(), bs, shuffle=shuffle, drop_last=shuffle)
KINDS = dict(adam={}, sgd=dict(opt_func=SGD), ranger=dict(opt_func=ranger), torch=dict(opt_func=partial(OptimWrapper, opt=torch.optim.AdamW)),
             groups=dict(splitter=lambda m: [list(m[:2].parameters()), list(m[4].parameters())]), plain_loader=dict(loader=PLAIN),
             metrics=dict(metrics=lambda p, t: (p-t).abs().mean()))


@pytest.mark.parametrize('kind', KINDS)
def test_resumes_to_the_identical_run(kind, tmp_path, at=7):
    never = fit(toy(**KINDS[kind]))
    stopped(toy(**KINDS[kind]), at, SaveState(tmp_path, steps=3))
    assert_same(never, fit(toy(5, **KINDS[kind]), SaveState(tmp_path, steps=3), ResumeState(tmp_path)))


@pytest.mark.parametrize('steps', [0, 4])
def test_resumes_with_two_workers(steps, tmp_path):
    never = fit(toy(workers=2), n=3)
    stopped(toy(workers=2), 11, SaveState(tmp_path, steps=steps), n=3)
    resume = ResumeState(tmp_path)
    assert_same(never, fit(toy(5, workers=2), SaveState(tmp_path), resume, n=3))
    assert resume.place == ((1, 2) if steps else (1, 0))


def test_stopped_again_and_again(tmp_path):
    never = fit(toy())
    for at in (2, 3, 8, 9, 17, 23):
        stopped(toy(0 if at == 2 else at), at, SaveState(tmp_path, steps=1), ResumeState(tmp_path))
    assert_same(never, fit(toy(9), SaveState(tmp_path, steps=1), ResumeState(tmp_path)))


def test_stopped_in_validation_keeps_the_last_batch(tmp_path):
    never = fit(toy())
    stopped(toy(), 12, SaveState(tmp_path, steps=6), where='valid')
    resume = ResumeState(tmp_path)
    assert_same(never, fit(toy(9), SaveState(tmp_path, steps=6), resume))
    assert resume.place == (1, 6) # nothing is left of the epoch but validation


@pytest.mark.parametrize('tracker', [lambda: EarlyStoppingCallback(patience=3), lambda: ReduceLROnPlateau(patience=1, factor=2.)])
def test_callbacks_of_fastai_remember(tracker, tmp_path):
    never = fit(toy(), tracker(), n=8, one_cycle=False)
    stopped(toy(), 25, SaveState(tmp_path), tracker(), n=8, one_cycle=False)
    assert_same(never, fit(toy(5), SaveState(tmp_path), ResumeState(tmp_path), tracker(), n=8, one_cycle=False))


def test_partial_metrics_of_the_training_part(tmp_path):
    def learner(seed):
        learn = toy(seed, metrics=lambda p, t: (p-t).abs().mean())
        learn.recorder.train_metrics = True
        return learn
    never = fit(learner(0))
    stopped(learner(0), 9, SaveState(tmp_path, steps=2))
    assert_same(never, fit(learner(3), SaveState(tmp_path), ResumeState(tmp_path)))


def test_a_complete_run_is_not_done_again(tmp_path):
    done = fit(toy(), SaveState(tmp_path))
    again = fit(toy(3), SaveState(tmp_path), ResumeState(tmp_path))
    assert_same(done, again)


@pytest.mark.parametrize('done', [2, 7])
def test_a_console_bar_goes_on_with_the_epoch(done, tmp_path, capsys):
    kit = lambda: (SaveState(tmp_path), ResumeState(tmp_path))
    toy().fit(done, .02, cbs=kit())
    for todo in ([done+1, done+2], []): # the second time there is nothing left
        capsys.readouterr()
        toy(1).fit(done+2, .02, cbs=kit())
        said = capsys.readouterr().out
        assert [k for k in range(1, done+3) if f'Epoch {k}/{done+2} ' in said] == todo


@pytest.mark.parametrize('done', [2, 7])
def test_bars_and_graph_of_a_notebook_go_on_with_the_epoch(done, tmp_path, monkeypatch):
    import fastai.callback.progress as here, fastprogress.fastprogress as bars
    monkeypatch.setattr(here, 'master_bar', bars.NBMasterBar)
    monkeypatch.setattr(here, 'progress_bar', bars.NBProgressBar)
    shown = []
    def display(o, display_id=None): shown.append(o); return types.SimpleNamespace(update=shown.append)
    monkeypatch.setattr('IPython.display.display', display)
    kit = lambda: (SaveState(tmp_path), ResumeState(tmp_path), ShowGraphCallback())
    toy().fit(done, .02, cbs=kit())
    shown.clear()
    toy(1).fit(done+2, .02, cbs=kit())
    text = ' '.join(map(str, shown))
    assert [f'[{k}/{done+2} ' in text for k in range(done+2)] == [True]+[False]*(done-1)+[True, True]


def test_other_data_is_refused_inside_an_epoch(tmp_path):
    stopped(toy(), 9, SaveState(tmp_path, steps=1))
    other = toy(loader=lambda bs, shuffle: VolumeDL(Noisy(32), bs=bs, shuffle=shuffle, num_workers=0))
    with pytest.raises(JfrError, match='had 6 batches, now 8'): fit(other, ResumeState(tmp_path))
    assert 'all_batches' not in vars(other) and '_with_events' not in vars(other)


def test_validation_and_lr_find_write_nothing(tmp_path):
    learn = toy(path=tmp_path/'models')
    learn.add_cbs([SaveState(tmp_path/'run'), ResumeState(tmp_path/'run'), GuardFinite(), RunLog(tmp_path/'run')])
    with learn.no_logging(), learn.no_bar():
        learn.lr_find(num_it=12, show_plot=False)
        learn.validate(); learn.get_preds()
    assert not (tmp_path/'run').exists()
    fit(learn, n=1)
    assert (tmp_path/'run'/LAST_CKPT).exists()


# ---- kill -9

KILLED = '''
    import sys, random, warnings; sys.path.insert(0, {root!r}); warnings.filterwarnings('ignore')
    import torch; torch.set_num_threads(1)
    from tests.train.test_callbacks import *
    folder = Path({folder!r})
'''


def script(folder, body):
    head = textwrap.dedent(KILLED).format(root=str(Path(__file__).parents[2]), folder=str(folder))
    return [sys.executable, '-c', 'from pathlib import Path\n'+head+textwrap.dedent(body)]


def test_killed_while_saving_something_whole_remains(tmp_path):
    "A child writes checkpoints without pause, forked again after each kill; 20 kills, at random moments"
    rng, big, seen = random.Random(0), torch.randn(200_000), 0
    for k in range(20):
        pid = os.fork()
        if pid == 0:
            try:
                for i in range(seen+1, 10**6): write_checkpoint(tmp_path/LAST_CKPT, dict(epoch=i, step=0, w=big+i), tmp_path/PREVIOUS_CKPT)
            finally: os._exit(1)
        time.sleep(.05+.1*rng.random())
        os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
        state, said = newest_state(tmp_path)
        if state is None and not seen: continue # killed before its first save
        assert not said and state['epoch'] >= seen and torch.equal(state['w'], big+state['epoch'])
        seen = state['epoch']
    assert seen > 20


def test_stopped_between_epochs(tmp_path):
    test_resumes_to_the_identical_run('adam', tmp_path, at=12)


def test_killed_runs_end_as_the_one_that_was_not(tmp_path):
    "Three kills -9 at random steps of one run, each resumed by a new process with the same command"
    never = fit(toy(), SaveState(tmp_path/'never'), RunLog(tmp_path/'never'))
    steps = sorted(random.Random(1).sample(range(3, 23), 3))
    body = '''
        class Kill(Callback):
            order = 95
            def __init__(self, at): super().__init__(); self.at = at
            def after_batch(self):
                if self.training and self.train_iter == self.at: os.kill(os.getpid(), signal.SIGKILL)
        for k,at in enumerate({steps}): # a new process each, without the time to import
            pid = os.fork()
            if pid == 0:
                try: fit(toy(k), SaveState(folder, steps=2), ResumeState(folder), RunLog(folder), Kill(at))
                finally: os._exit(0)
            ended = os.waitpid(pid, 0)[1]
            if not os.WIFSIGNALED(ended): sys.exit(f'not killed at {{at}}')
    '''.format(steps=steps)
    p = subprocess.run(script(tmp_path/'run', body), capture_output=True, timeout=120)
    assert p.returncode == 0, p.stderr.decode()[-500:]
    assert read_checkpoint(tmp_path/'run'/LAST_CKPT)['train_iter'] == (steps[-1]-1)//2*2
    last = fit(toy(77), SaveState(tmp_path/'run', steps=2), ResumeState(tmp_path/'run'), RunLog(tmp_path/'run'))
    assert_same(never, last)
    a, b = read_log(tmp_path/'never'), read_log(tmp_path/'run')
    assert a.drop(columns='seconds').equals(b.drop(columns='seconds'))


# ---- damage

@pytest.mark.parametrize('where', [.001, .02, .3, .9])
def test_every_turned_bit_is_found(where, tmp_path):
    fit(toy(), SaveState(tmp_path), n=2)
    raw = bytearray((tmp_path/LAST_CKPT).read_bytes())
    raw[int(where*len(raw))] ^= 4
    (tmp_path/LAST_CKPT).write_bytes(raw)
    with pytest.raises(StoreError): read_checkpoint(tmp_path/LAST_CKPT)
    state, said = newest_state(tmp_path)
    assert state['epoch'] == 1 and 'going on from previous.ckpt' in said[0].text
    (tmp_path/PREVIOUS_CKPT).write_bytes(raw)
    with pytest.raises(StoreError, match='no checkpoint of this run can be read'): newest_state(tmp_path)


@pytest.mark.parametrize('size', [0, 1, 10, 60, 100, 3000])
def test_a_torn_file_is_found(size, tmp_path):
    fit(toy(), SaveState(tmp_path), n=1)
    (tmp_path/LAST_CKPT).write_bytes((tmp_path/LAST_CKPT).read_bytes()[:size])
    with pytest.raises(StoreError, match='DAMAGED'): read_checkpoint(tmp_path/LAST_CKPT)


def test_resumed_from_the_previous_ends_the_same(tmp_path):
    never = fit(toy())
    stopped(toy(), 15, SaveState(tmp_path, steps=3))
    (tmp_path/LAST_CKPT).write_bytes(b'')
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter('always')
        assert_same(never, fit(toy(4), SaveState(tmp_path), ResumeState(tmp_path)))
    assert any('going on from previous.ckpt' in str(w.message) for w in heard)


# ---- nan and infinity

class Spoil(Callback):
    order = -5
    def __init__(self, where, at, value): super().__init__(); self.where, self.at, self.value = where, at, value
    def now(self, where): return self.training and where == self.where and self.at == self.train_iter
    def before_batch(self):
        if self.now('batch'): self.learn.xb = (self.xb[0]*self.value,)
    def after_loss(self):
        if self.now('loss'): self.learn.loss_grad = self.learn.loss_grad*self.value; self.learn.loss = self.learn.loss_grad.detach()
    def after_backward(self):
        if self.now('gradient'): self.model[0].weight.grad[3, 1] = self.value


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
@pytest.mark.parametrize('where', ['batch', 'loss', 'gradient'])
@pytest.mark.parametrize('do', ['stop', 'skip', 'back'])
def test_weights_stay_finite(value, where, do, tmp_path):
    for at in (0, 5, 6, 11):
        learn, guard = toy(), GuardFinite(do)
        cbs = guard, Spoil(where, at, value), Accumulate(2), ClipGradient(), AverageWeights(.9)
        if do == 'stop':
            with pytest.raises(JfrError, match='is not finite'): fit(learn, *cbs, n=2)
        else: fit(learn, *cbs, n=2)
        assert all_finite(learn.model.state_dict().values())
        assert len(guard.findings) == 1
        assert do == 'stop' or all_finite(learn.recorder.losses)


def test_unguarded_they_do_not():
    assert not all_finite(fit(toy(), Spoil('batch', 5, float('nan')), n=1).model.state_dict().values())


@pytest.mark.parametrize('half', [MixedPrecision, HalfPrecision])
def test_half_precision_resumes_to_the_identical_run(tmp_path, half):
    kit = lambda: (half('bf16'), GuardFinite(), ClipGradient(), SaveState(tmp_path, steps=2))
    never = fit(toy(), half('bf16'), GuardFinite(), ClipGradient())
    stopped(toy(), 9, *kit())
    assert_same(never, fit(toy(4), *kit(), ResumeState(tmp_path)))


@pytest.mark.parametrize('n', [12, 13, 16, 23])
def test_accumulated_steps_equal_large_batches_at_every_length(n):
    def make(bs):
        set_seed(0)
        x = torch.linspace(0, 1, n)[:, None]
        dls = DataLoaders(*(VolumeDL([(a, 2*a) for a in x], bs=bs, num_workers=0) for _ in range(2)), device='cpu')
        return Learner(dls, nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 1)), F.mse_loss, opt_func=SGD)
    a, b = fit(make(12), n=2, one_cycle=False), fit(make(4), Accumulate(3), n=2, one_cycle=False)
    for p, q in zip(a.model.parameters(), b.model.parameters()): torch.testing.assert_close(p, q)


def test_best_and_early_survive_any_stop(tmp_path):
    def kit(folder): return SaveState(folder, steps=2), ResumeState(folder), SaveBest(folder), StopEarly(patience=2), LimitBatches(5), RunLog(folder)
    never = fit(toy(), *kit(tmp_path/'never'), n=12)
    for at in range(3, len(never.recorder.losses), 7):
        folder = tmp_path/f'{at}'
        stopped(toy(), at, *kit(folder), n=12)
        again = fit(toy(1), *kit(folder), n=12)
        assert_same(never, again)
        assert [r['epoch'] for r in read_log_rows(folder)] == list(range(len(never.recorder.values)))


# ---- Comet, for real, offline

def test_comet_offline_sends_numbers_only(tmp_path):
    pytest.importorskip('comet_ml', reason='comet_ml is not installed (extra: comet)')
    import zipfile
    out = tmp_path/'out'
    body = '''
        import socket
        def refuse(*a, **k): open({mark!r}, 'a').write(repr(a)+chr(10)); raise OSError('no network in this test')
        socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
        from jfr2020.train.runlog import CometTracker
        run = folder/'run'
        kit = lambda: (SaveState(run), ResumeState(run), RunLog(run, trackers=[CometTracker(folder={out!r})], config=dict(lr=.02, data='/secret/place')))
        stopped(toy(), 15, *kit(), n=3)
        fit(toy(1), *kit(), n=3)
    '''.format(out=str(out), mark=str(tmp_path/'called'))
    words = script(tmp_path, body)+['--secret-argument=1']
    p = subprocess.run(words, capture_output=True, timeout=90, cwd=tmp_path, env={**os.environ, 'HOME': str(tmp_path)})
    assert p.returncode == 0, p.stderr.decode()[-800:]
    assert not (tmp_path/'called').exists(), (tmp_path/'called').read_text()
    text = ''
    for path in out.glob('*.zip'):
        with zipfile.ZipFile(path) as z: text += ''.join(z.read(n).decode() for n in z.namelist())
    assert text.count('"metricName":"valid_loss"') == 3 and '"paramName":"lr"' in text
    import getpass
    private = ('secret', os.uname().nodename if len(os.uname().nodename) > 3 else 'nodename', str(tmp_path), os.getcwd(), 'git_', 'class Noisy', getpass.getuser()+'@')
    assert [w for w in private if w in text] == []
