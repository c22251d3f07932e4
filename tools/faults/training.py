"""`python -m tools.faults.training [--saves 200] [--runs 20] [--poison 20]`: kill -9 while checkpoints are saved, kill -9 of trainings at random
steps, nan and infinity in batch, loss and gradient; counts what is unusable, different or not finite; exit 1 if anything is."""
import argparse, os, random, signal, sys, tempfile, time, warnings
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
warnings.filterwarnings('ignore')


def killed(work, wait=None): # fork, run `work`, kill it after `wait` seconds unless it ends itself -> was it killed
    pid = os.fork()
    if pid == 0:
        try: work()
        finally: os._exit(1)
    if wait is not None: time.sleep(wait); os.kill(pid, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def saves(n, rng):
    "Kill -9 of a process that saves without pause: last or previous is whole, and never older than what was there before"
    import torch
    from jfr2020.train.callbacks import LAST_CKPT, PREVIOUS_CKPT, newest_state, write_checkpoint
    wrong, seen, big, half = [], 0, torch.randn(200_000), 0
    with tempfile.TemporaryDirectory() as d:
        folder = Path(d)
        def work():
            for i in range(seen+1, 10**7): write_checkpoint(folder/LAST_CKPT, dict(epoch=i, step=0, w=big+i), folder/PREVIOUS_CKPT)
        for k in range(n):
            killed(work, .03+.1*rng.random())
            half += any(p.name.startswith('.part-') for p in folder.iterdir())
            for p in folder.glob('.part-*'): p.unlink()
            try: state, said = newest_state(folder)
            except Exception as e: wrong.append(f'kill {k}: {e}'); continue
            if state is None and seen == 0: continue # before the first was written
            if said or state['epoch'] < seen or not torch.equal(state['w'], big+state['epoch']): wrong.append(f'kill {k}: epoch {seen}, found {state["epoch"]}')
            seen = state['epoch']
    return ('kill -9 while saving', n, f'{seen} saves, {half} cut in the middle'), wrong


def runs(n, rng):
    "Trainings killed once to three times at random steps, resumed by the same command: equal to the one that was not, bit for bit"
    from tests.train.test_callbacks import ResumeState, RunLog, SaveState, assert_same, fit, read_log_rows, toy
    from fastai.basics import Callback
    class Kill(Callback):
        order = 95
        def __init__(self, at): super().__init__(); self.at = at
        def after_batch(self):
            if self.training and self.train_iter == self.at: os.kill(os.getpid(), signal.SIGKILL)
    def train(folder, at, every): fit(toy(), SaveState(folder, steps=every), ResumeState(folder), RunLog(folder), Kill(at))
    wrong, kills = [], 0
    with tempfile.TemporaryDirectory() as d:
        plan = [sorted(rng.sample(range(1, 24), rng.randint(1, 3))) for _ in range(n)]
        for k, steps in enumerate(plan):
            for at in steps:
                kills += 1
                if not killed(partial(train, Path(d)/f'{k}', at, rng.choice((1, 2, 5)))): wrong.append(f'run {k}: was not killed at {at}')
        never = fit(toy())
        for k, steps in enumerate(plan):
            folder = Path(d)/f'{k}'
            try: assert_same(never, fit(toy(), SaveState(folder), ResumeState(folder), RunLog(folder)))
            except AssertionError: wrong.append(f'run {k}: killed at {steps}, is another')
            if [r['epoch'] for r in read_log_rows(folder)] != [0, 1, 2, 3]: wrong.append(f'run {k}: the log has not every epoch once')
    return ('trainings killed and resumed', n, f'{kills} kills; weights, optimiser, losses, rates and logs compared'), wrong


def poison(n, rng):
    "nan and infinity at random steps"
    from tests.train.test_callbacks import Accumulate, ClipGradient, GuardFinite, JfrError, Spoil, all_finite, fit, toy
    wrong = []
    for k in range(n):
        where, value, do, at = rng.choice(('batch', 'loss', 'gradient')), rng.choice((float('nan'), float('inf'))), rng.choice(('stop', 'skip', 'back')), rng.randrange(12)
        learn, guard = toy(k), GuardFinite(do, every=rng.choice((1, 5)))
        try: fit(learn, guard, Spoil(where, at, value), Accumulate(rng.choice((1, 2, 4))), ClipGradient(), n=2)
        except JfrError: pass
        if not all_finite(learn.model.state_dict().values()) or not guard.findings: wrong.append(f'{value} in {where} at {at}, {do}')
    return ('nan or infinity in a training', n, 'batch, loss, gradient; stop, skip, back'), wrong


if __name__ == '__main__':
    p = argparse.ArgumentParser(prog='python -m tools.faults.training', description=__doc__)
    for name, many in dict(saves=200, runs=20, poison=60).items(): p.add_argument(f'--{name}', type=int, default=many, help='[%(default)s]')
    p.add_argument('--seed', type=int, default=0, help='of all random choices [0]')
    a = p.parse_args()
    import torch
    torch.set_num_threads(1)
    failed = 0
    print(f'{"fault":34}{"done":>6}{"wrong":>7}{"s":>8}  what happened')
    for part in (saves, runs, poison): # what forks comes before what derives in this process
        t = time.monotonic()
        (what, done, text), wrong = part(getattr(a, part.__name__), random.Random(a.seed))
        print(f'{what:34}{done:6}{len(wrong):7}{time.monotonic()-t:8.1f}  {text}', flush=True)
        for w in wrong[:10]: print(f'    {w}', file=sys.stderr)
        failed += len(wrong)
    print('wanted: 0 wrong in every line')
    sys.exit(failed > 0)
