"A program for test_devices.py: run by `launch` in two processes, and imported to do the same in one."
import json, os, random, signal, sys, time, warnings
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from fastai.basics import Callback, DataLoaders, Learner, SkipItemException, nn, rank_distrib, set_seed
from fastai.callback.all import ReduceLROnPlateau

from jfr2020.train.callbacks import ResumeState, SaveBest, SaveState, StopEarly
from jfr2020.data.block import VolumeDL
from jfr2020.train.devices import across_devices, first_before_others, which_devices
from jfr2020.ct.metrics import ScoreMedianError
from jfr2020.train.metrics import EpochMetric
from jfr2020.train.runlog import RunLog
from jfr2020.train.steps import Accumulate, AverageWeights, ClipGradient, GuardFinite, LimitBatches

warnings.filterwarnings('ignore')


class Points:
    "Points on a plane; `noise` is drawn anew for each sample, from three generators"
    def __init__(self, n, seed, noise=0., bad=None, skip=None):
        g = torch.Generator().manual_seed(seed)
        self.x, self.noise, self.bad, self.skip = torch.rand(n, 3, generator=g), noise, bad, skip
    def __len__(self): return len(self.x)
    def __getitem__(self, i):
        if i == self.skip: raise SkipItemException
        x = self.x[i].clone()
        y = (x*torch.tensor([1., -2., .5])).sum()[None].tanh()
        if i == self.bad: x[1] = np.nan
        if self.noise: x += self.noise*(torch.randn(3)+torch.tensor(np.random.rand(3), dtype=torch.float32)+random.random())
        return x, y


class Lines:
    "Lines of different lengths, to be cut in two classes"
    def __init__(self, n, seed): self.n, self.seed = n, seed
    def __len__(self): return self.n
    def __getitem__(self, i):
        x = torch.randn(1, 5+i, generator=torch.Generator().manual_seed(self.seed+i))
        return x, x[0].gt(0).float()


class Hits(EpochMetric):
    "Share of points of lines that are right"
    def counts(self, pred, y): return ((pred[:, 0] > 0) == (y > 0)).sum(), y.size
    def result(self, parts): return float(np.sum(parts, 0)[0]/np.sum(parts, 0)[1])


class Median(ScoreMedianError):
    def counts(self, pred, y): return pred.ravel(), y.ravel()


class EachLoss(Callback):
    order = 70
    def before_fit(self): self.losses = []
    def after_batch(self):
        if self.training and len(self.yb): self.losses.append(float(self.learn.loss))


def toy(bs, n=23, norm=nn.LayerNorm, drop=0., workers=0, weights=None, data=None, **kwargs):
    set_seed(4)
    train = data or Points(n, 0)
    dls = DataLoaders(VolumeDL(train, bs=bs, shuffle=True, num_workers=workers, weights=weights, drop_last=kwargs.pop('drop_last', False)),
                      VolumeDL(Points(7, 1), bs=2, num_workers=workers), device='cpu')
    model = nn.Sequential(nn.Linear(3, 16), norm(16), nn.ReLU(), nn.Dropout(drop), nn.Linear(16, 1))
    return Learner(dls, model, F.mse_loss, metrics=Median(), path=Path(kwargs.pop('path', '.')), **kwargs)


def lines(bs):
    set_seed(4)
    dls = DataLoaders(VolumeDL(Lines(11, 0), bs=1, shuffle=True, num_workers=0), VolumeDL(Lines(5, 50), bs=1, num_workers=0), device='cpu')
    model = nn.Sequential(nn.Conv1d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv1d(4, 1, 1))
    return Learner(dls, model, lambda p, y: F.binary_cross_entropy_with_logits(p[:, 0], y), metrics=Hits())


def numbers(learn, each=None):
    return dict(steps=each.losses if each else [], record=[[float(v) for v in r] for r in learn.recorder.values],
                weights=torch.cat([v.detach().double().flatten() for v in learn.model.state_dict().values()]).tolist())


def fit(learn, *cbs, n=3, lr=.02):
    each = EachLoss()
    with across_devices(learn), learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(n, lr, cbs=[each, *cbs])
    return numbers(learn, each)


def plateau(learn): # follows the validation loss, and prints nothing
    each = EachLoss()
    with across_devices(learn), learn.no_bar(), learn.no_logging(), redirect_stdout(None):
        learn.fit(6, .02, cbs=[each, ReduceLROnPlateau(patience=1, factor=3., min_delta=.05, monitor='valid_loss'), StopEarly(patience=3, min_delta=.05)])
    return numbers(learn, each)


WEIGHTS = [1, 5, 2]*7 + [9, 1]
CURVES = dict( # name -> (batch size of all) -> numbers: one process with 4 and two with 2 give the same
    uneven=lambda b: fit(toy(b)),
    dropping=lambda b: fit(toy(b, drop_last=True)),
    half_empty=lambda b: fit(toy(b, n=18)), # the last batch is the first process's alone
    weighted=lambda b: fit(toy(b, weights=WEIGHTS)),
    workers=lambda b: fit(toy(b, workers=1), n=1),
    accumulated=lambda b: fit(toy(b), Accumulate(4), ClipGradient(.1), AverageWeights(.5)),
    limited=lambda b: fit(toy(b), LimitBatches(3, .5)),
    guarded=lambda b: fit(toy(b, data=Points(23, 0, bad=11)), GuardFinite('skip')),
    plateau=lambda b: plateau(toy(b)))


def lr_find(learn):
    with across_devices(learn), learn.no_bar(), learn.no_logging():
        lr = learn.lr_find(num_it=40, show_plot=False).valley
        learn.fit(2, lr)
    return dict(numbers(learn), lr=lr)


def noisy(folder, *cbs): # all that draws and all that remembers
    learn = toy(2, n=24, norm=nn.BatchNorm1d, drop=.3, data=Points(24, 0, noise=.05), drop_last=True)
    kit = [SaveState(folder, steps=2), ResumeState(folder), SaveBest(folder), RunLog(folder), GuardFinite('skip'), Accumulate(2), AverageWeights(.9)]
    with across_devices(learn), learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(4, .02, cbs=[*kit, *cbs])
    return learn


class Accident(Callback):
    "Kills a process in a step, once each"
    order = 40
    def __init__(self, folder, at): super().__init__(); self.folder, self.at = folder, at
    def after_pred(self):
        rank = rank_distrib()
        mark = self.folder.parent/f'killed-{rank}'
        if not self.training or self.train_iter != self.at[rank] or mark.exists(): return
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def everything(folder):
    rank = rank_distrib()
    with first_before_others(which_devices(0, 'ddp')):
        if not rank: time.sleep(.3); (folder/'cache').touch()
        else: assert (folder/'cache').exists()
    out = {k: run(2) for k, run in CURVES.items()}
    out['lines'] = fit(lines(1), n=1)
    out['lr_find'] = lr_find(toy(2, drop=.2, path=folder/f'rank-{rank}'))
    out['batchnorm'] = numbers(noisy(folder/'never', Accident(folder/'never', (99, 99))))
    out['drawn'] = [random.random(), float(np.random.rand()), float(torch.rand(1))]
    alone = toy(2)
    if not rank:
        with alone.no_bar(): out['alone'] = [float(v) for v in alone.validate()] # the other process has nothing to do with it
    (folder/f'rank-{rank}.json').write_text(json.dumps(out))


if __name__ == '__main__':
    what, folder = sys.argv[1], Path(sys.argv[2])
    if what == 'everything': everything(folder)
    if what == 'accidents': # each process is killed once; when all is done, a data set lacks a sample
        noisy(folder/'killed', Accident(folder/'killed', (17, 8)))
        fit(toy(2, data=Points(23, 0, skip=5)))
