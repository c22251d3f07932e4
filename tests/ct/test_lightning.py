"Lightning: without it, beside a torchvision that is broken, and the same numbers as in the other loops."
import copy, os, pickle, random, subprocess, sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from torch import nn

from jfr2020.ct import lightning as room
from jfr2020.ct.loaders import CTDataLoaders
from jfr2020.data.transforms import RandomCrop
from jfr2020.ground.errors import ConfigError, MissingExtra, StoreError
from jfr2020.train.optimisers import fit_config, make_opt_func
from jfr2020.train.metrics import EpochMetric, MaskDice
from jfr2020.ct.preprocessing import Preprocessing
from jfr2020.models.base import create_model, load_model, save_model, wrap_module
from jfr2020.train.steps import TrainingError
from jfr2020.ct.config import CalciumConfig
from jfr2020.train.config import OptSettings, ScheduleSettings, TrainSettings

try: LIGHTNING = room.import_lightning()
except MissingExtra: LIGHTNING = None
needs = pytest.mark.skipif(LIGHTNING is None, reason="the extra 'lightning' is not installed: pip install 'jfr2020[lightning]'")
QUIET = dict(enable_progress_bar=False, enable_model_summary=False)


def config(**values): return CalciumConfig().changed(**values)


def trainer(folder=None, training=None, **more):
    return LIGHTNING.Trainer(**{**room.trainer_arguments(training or TrainSettings(gpus=0), folder), **QUIET, **more})


def python(code, **env):
    "Run `code` in a process of its own"
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120, env={**os.environ, **env})
    assert out.returncode == 0, out.stderr
    return out.stdout.strip()


class Line(nn.Module):
    "y = wx + b, from w = 1"
    def __init__(self):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))
    def forward(self, x): return x*self.w + self.b


def line(): return wrap_module(Line(), loss=lambda p,y: F.mse_loss(p, y))


def pairs(n=24):
    x = torch.randn(n, 1, generator=torch.Generator().manual_seed(1))
    return [(a, 3*a+1) for a in x]


def loaders(bs=4): return DataLoaders(DataLoader(pairs(), bs=bs), DataLoader(pairs()[:7], bs=bs))


def volumes(toys, **how):
    random.seed(0); torch.manual_seed(0)
    return CTDataLoaders.from_cases(toys, 'mask', **{**dict(item_tfms=[RandomCrop((4,16,16))], bs=2, valid=.4, device='cpu'), **how})


def unet(**how):
    torch.manual_seed(0)
    return create_model('unet3d', widths=(4,8), classes=1, **how)


@pytest.fixture(scope='module')
def toys():
    import numpy as np
    from jfr2020.datasets.cases import Case
    from jfr2020.ground.geometry import Geometry
    from jfr2020.ground.volume import CTVolume, MaskVolume
    g, out = Geometry.from_spacing((6,20,20), (3,1,1)), []
    for k in range(8):
        m = np.random.default_rng(k).random(g.shape) > .9
        out.append(Case(f'p{k}', CTVolume(np.where(m, 400, 0).astype('i2'), g), MaskVolume(m.astype('u1'), g)))
    return out


# without the package

def test_the_page_imports_without_lightning_and_says_what_is_missing():
    python('''
import sys
import jfr2020.ct.lightning
assert not {"lightning", "torchmetrics", "torchvision"} & {*sys.modules} # nothing before it is used
sys.modules['lightning'] = sys.modules['lightning_utilities'] = None # as if not installed
from jfr2020.ct.lightning import *
from jfr2020.ct import lightning as room
from jfr2020.ground.errors import MissingExtra
from jfr2020.models.base import wrap_module
from jfr2020.train.config import TrainSettings
import torch
model = wrap_module(torch.nn.Conv3d(1, 2, 1))
for f in (lambda: lightning_module(model), lambda: lightning_data(None), lambda: room.CTLightningModule, lambda: checkpoint_model('x'),
          lambda: trainer_arguments(TrainSettings(early_stop=3))):
    try: f()
    except MissingExtra as e: assert "pip install 'jfr2020[lightning]'" in str(e), e
    else: raise SystemExit('no refusal')
assert trainer_arguments(TrainSettings())['logger'] is False # says what it says without the package
assert not hasattr(room, 'NoSuchClass')
''')


@needs
def test_a_training_needs_no_torchvision_touches_no_network_and_writes_nothing(tmp_path):
    "fastai installs torchvision, often not of the build of torch: here is one that cannot be imported"
    broken, empty = tmp_path/'broken', tmp_path/'empty'
    for d in (broken/'torchvision', broken/'torchvision-9.0.dist-info', empty): d.mkdir(parents=True)
    (broken/'torchvision'/'__init__.py').write_text('raise RuntimeError("operator torchvision::nms does not exist")')
    (broken/'torchvision-9.0.dist-info'/'METADATA').write_text('Metadata-Version: 2.1\nName: torchvision\nVersion: 9.0\n')
    python(f'''
import os, socket, sys
def refuse(*a, **k): raise AssertionError('network')
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
os.chdir({str(empty)!r})
import torch
from jfr2020.ct.lightning import *
from jfr2020.models.base import wrap_module
from jfr2020.train.config import *
from jfr2020.ct.config import *
model = wrap_module(torch.nn.Linear(1, 1), loss=lambda p, y: ((p-y)**2).mean())
data = torch.utils.data.DataLoader([(torch.ones(1), torch.ones(1))]*8, 2)
t = import_lightning().Trainer(**trainer_arguments(TrainSettings(max_epochs=2, gpus=0)))
t.fit(lightning_module(model, CalciumConfig()), data, data)
assert 'torchvision' not in sys.modules
from lightning_utilities.core.imports import RequirementCache
assert RequirementCache('torchvision') # overlooked for that moment only
''', PYTHONPATH=str(broken))
    assert list(empty.iterdir()) == []


# the same numbers

class Rates(Callback):
    "Learning rate and momentum of each step in fastai"
    order = 90
    def before_fit(self): self.rows = []
    def before_step(self): self.rows.append((self.opt.hypers[-1]['lr'], self.opt.hypers[-1]['mom']))


FORMS = ScheduleSettings.__dataclass_fields__['schedule'].type.__args__
CASES = [('adamw', f) for f in FORMS] + [('sgd', 'one_cycle'), ('sgd', 'constant')]


@needs
@pytest.mark.parametrize('optimiser,form', CASES)
def test_steps_rates_and_weights_are_those_of_fastai(optimiser, form):
    "Every schedule, with whatever optimiser has an equal; plateau on a loss that stops falling"
    wd = 0. if optimiser == 'sgd' else .02
    cfg = config(optimiser=optimiser, schedule=form, lr=.05, weight_decay=wd, max_epochs=8, gpus=0, **{'schedule.wait': 2})
    learn = Learner(loaders(), m := line(), loss_func=m.compute_loss, opt_func=make_opt_func(cfg.opt), cbs=Rates())
    learn.remove_cb(ProgressCallback)
    with learn.no_logging(): fit_config(learn, cfg)

    class Seen(LIGHTNING.Callback):
        rows = []
        def on_before_optimizer_step(self, trainer, module, optimizer):
            g = optimizer.param_groups[-1]
            self.rows.append((g['lr'], g['betas'][0] if 'betas' in g else g['momentum']))
    t, own, dls = trainer(training=cfg.training, callbacks=Seen()), line(), loaders()
    t.fit(room.lightning_module(own, cfg), dls.train, dls.valid)
    assert len(Seen.rows) == 48
    torch.testing.assert_close(torch.tensor(Seen.rows), torch.tensor(learn.rates.rows), rtol=1e-5, atol=1e-9)
    for p,q in zip(own.parameters(), learn.model.parameters()): torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    assert float(t.callback_metrics['valid_loss']) == pytest.approx(float(learn.recorder.values[-1][1]), rel=1e-4)


@needs
def test_plateau_lowers_the_rate_after_as_many_epochs_as_it_is_told():
    cfg = config(schedule='plateau', lr=.05, max_epochs=7, gpus=0, **{'schedule.wait': 2})
    flat = wrap_module(Line(), loss=lambda p,y: p.sum()*0 + 1)
    rates = []

    class Seen(LIGHTNING.Callback):
        def on_train_epoch_start(self, trainer, module): rates.append(module.optimizers().param_groups[0]['lr'])
    dls = loaders()
    trainer(training=cfg.training, callbacks=Seen()).fit(room.lightning_module(flat, cfg), dls.train, dls.valid)
    assert rates == pytest.approx([.05]*3 + [.005]*2 + [.0005]*2)


@needs
def test_a_number_of_an_epoch_is_not_the_mean_of_its_batches():
    "7 samples in batches of 4: plain functions weigh samples, metrics of the library see all of them"
    class Median(EpochMetric):
        def result(self, parts): return float(torch.cat([torch.tensor(p-y).flatten() for p,y in parts]).median())
    def off(p, y): return (p-y).abs().mean()
    dls, model = loaders(), line()
    t = trainer()
    t.validate(room.lightning_module(model, metrics=[Median(), off]), dls.valid, verbose=False)
    err = torch.stack([a-y for a,y in pairs()[:7]]).flatten()
    assert float(t.callback_metrics['Median']) == pytest.approx(float(err.median()), rel=1e-5)
    assert float(t.callback_metrics['off']) == pytest.approx(float(err.abs().mean()), rel=1e-5)
    assert float(t.callback_metrics['valid_loss']) == pytest.approx(float((err**2).mean()), rel=1e-5)
    t.validate(room.lightning_module(model, metrics=[off]), dls.valid, verbose=False) # a second epoch starts from nothing
    assert float(t.callback_metrics['off']) == pytest.approx(float(err.abs().mean()), rel=1e-5)


# batches

@needs
@pytest.mark.parametrize('workers', [0, 2])
def test_batches_are_those_of_the_loaders(toys, workers):
    def begin():
        dls = volumes(toys, num_workers=workers)
        dls.train.rng = random.Random(5); random.seed(1); torch.manual_seed(7)
        return dls
    plain, got, module = list(begin().train), [], room.lightning_module(unet())

    class Keep(LIGHTNING.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx): got.append(batch)
    dls = begin()
    trainer(training=TrainSettings(max_epochs=1, gpus=0), callbacks=Keep()).fit(module, room.lightning_data(dls))
    assert len(got) == len(dls.train) == 2
    for b,(x,y) in zip(got, plain):
        assert (type(b[0]), type(b[1])) == (type(x), type(y))
        assert torch.equal(b[0], x) and torch.equal(b[1], y)


@needs
def test_several_inputs_reach_the_model(toys):
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.conv, self.seen = nn.Conv3d(1, 2, 1), []
        def forward(self, x, mm): self.seen.append((tuple(x.shape), mm[0].tolist())); return self.conv(x)
    net = Two()
    module = room.lightning_module(wrap_module(net), metrics=[MaskDice()])
    trainer(training=TrainSettings(fast_dev_run=True, gpus=0)).fit(module, room.lightning_data(volumes(toys, spacing=True)))
    assert net.seen == [((2,1,4,16,16), [3,1,1])]*2


@needs
def test_a_model_that_comes_in_eval_is_trained_and_validated_in_its_own_mode(toys):
    net, seen = unet(), []
    net.register_forward_pre_hook(lambda m, x: seen.append(m.training))
    trainer(training=TrainSettings(max_epochs=2, gpus=0)).fit(room.lightning_module(net.eval()), room.lightning_data(volumes(toys)))
    assert seen == [True, True, False, False]*2


@needs
def test_loaders_move_to_the_device_of_the_trainer_and_back(toys):
    dls = volumes(toys)
    data = room.lightning_data(dls)
    data.trainer = SimpleNamespace(world_size=1, strategy=SimpleNamespace(root_device=torch.device('meta')))
    data.setup('fit')
    assert {dls.train.device.type, dls.valid.device.type} == {'meta'}
    data.teardown('fit')
    assert {dls.train.device.type, dls.valid.device.type} == {'cpu'}
    data.trainer.world_size = 2
    with pytest.raises(ConfigError, match='2 devices would each be given every batch'): data.setup('fit')


# stopped, kept, refused

@needs
def test_nan_in_the_gradient_ends_the_run_before_the_step():
    class Nan(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): return x.clone()
        @staticmethod
        def backward(ctx, g): return g*float('nan')
    bad, dls = wrap_module(Line(), loss=lambda p,y: F.mse_loss(Nan.apply(p), y)), loaders()
    with pytest.raises(TrainingError, match='gradient of epoch 0, step 0'):
        trainer().fit(room.lightning_module(bad), dls.train, dls.valid)
    assert [float(p) for p in bad.parameters()] == [1., 0.]


@needs
def test_a_run_that_goes_on_ends_like_one_that_was_not_stopped(tmp_path):
    "With nothing drawn: weights, optimiser, schedule and epoch are all there is"
    cfg, dls = config(lr=.05, max_epochs=5, gpus=0), loaders()
    keep = LIGHTNING.pytorch.callbacks.ModelCheckpoint(dirpath=tmp_path, filename='{epoch}', save_top_k=-1)
    whole, again = line(), line()
    trainer(training=cfg.training, enable_checkpointing=True, callbacks=keep).fit(room.lightning_module(whole, cfg), dls.train, dls.valid)
    module = room.lightning_module(again, cfg)
    trainer(training=cfg.training).fit(module, dls.train, dls.valid, ckpt_path=tmp_path/'epoch=1.ckpt', weights_only=True)
    assert [float(p) for p in again.parameters()] == [float(p) for p in whole.parameters()]


@pytest.fixture(scope='module')
def kept(toys, tmp_path_factory):
    "A folder with the checkpoints of a short training, and its model"
    folder, model = tmp_path_factory.mktemp('kept'), unet()
    t = trainer(folder, TrainSettings(max_epochs=2, gpus=0, monitor='MaskDice', checkpoint_every=1))
    t.fit(room.lightning_module(model, metrics=[MaskDice()]), room.lightning_data(volumes(toys, scale='calcium')))
    return folder, model


@needs
def test_a_checkpoint_gives_the_plain_model(kept, tmp_path):
    folder, model = kept
    assert sorted(p.name for p in folder.iterdir()) == ['best.ckpt', 'last.ckpt']
    plain = load_model(save_model(room.checkpoint_model(folder/'last.ckpt'), tmp_path/'model'))
    assert plain.preprocessing == model.preprocessing == Preprocessing((300,800), shape=(4,16,16))
    for a,b in zip(plain.parameters(), model.parameters(), strict=True): assert torch.equal(a, b)


@needs
def test_lightnings_own_way_to_read_a_checkpoint_works(kept):
    module = room.CTLightningModule.load_from_checkpoint(kept[0]/'best.ckpt', weights_only=True)
    assert (type(module) is room.CTLightningModule, module.opt, module.schedule) == (True, OptSettings(), ScheduleSettings())


class Trap:
    def __reduce__(self): return (os.mkdir, ('trapped',))


@needs
@pytest.mark.parametrize('harm', ['program', 'cut', 'empty', 'missing', 'foreign', 'text'])
def test_what_is_no_checkpoint_is_refused(kept, tmp_path, monkeypatch, harm):
    monkeypatch.chdir(tmp_path)
    good, bad = kept[0]/'last.ckpt', tmp_path/'bad.ckpt'
    if harm == 'program': torch.save(dict(torch.load(good, weights_only=True), trap=Trap()), bad)
    if harm == 'cut': bad.write_bytes(good.read_bytes()[:-500])
    if harm == 'empty': bad.write_bytes(b'')
    if harm == 'foreign': torch.save(dict(state_dict={}, hyper_parameters=dict(hidden=3)), bad)
    if harm == 'text': bad.write_text('weights')
    with pytest.raises(StoreError, match='bad.ckpt is no checkpoint of this module'): room.checkpoint_model(bad)
    assert not (tmp_path/'trapped').exists()


@needs
def test_a_network_without_a_name_comes_back_when_it_is_given(tmp_path, toys):
    make = lambda: wrap_module(nn.Conv3d(1, 2, 1))
    torch.manual_seed(0); model = make()
    trainer(tmp_path, TrainSettings(max_epochs=1, gpus=0)).fit(room.lightning_module(model), room.lightning_data(volumes(toys)))
    with pytest.raises(ConfigError, match='cannot say how to make its network'): room.checkpoint_model(tmp_path/'last.ckpt')
    again = room.checkpoint_model(tmp_path/'last.ckpt', make())
    assert again.preprocessing == model.preprocessing and again.preprocessing is not None
    assert torch.equal(again.module.weight, model.module.weight)


@needs
def test_another_preprocessing_does_not_go_on(kept, toys):
    other = unet()
    other.preprocessing = Preprocessing('mediastinum', shape=(4,16,16))
    with pytest.raises(ConfigError, match='made with preprocessing'):
        trainer().fit(room.lightning_module(other), room.lightning_data(volumes(toys)), ckpt_path=kept[0]/'last.ckpt', weights_only=True)


@needs
def test_modules_travel_between_processes():
    module = room.lightning_module(unet(), config(lr=.3), metrics=[MaskDice()])
    for twin in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert type(twin) is room.CTLightningModule and twin.opt.lr == .3
        for a,b in zip(twin.parameters(), module.parameters(), strict=True): assert torch.equal(a, b)


@needs
@pytest.mark.parametrize('t', [TrainSettings(gpus=0), TrainSettings(gpus=0, fast_dev_run=True), TrainSettings(gpus=0, precision='bf16', deterministic=True),
                               TrainSettings(gpus=0, limit_train_batches=2, limit_val_batches=.5, early_stop=2, monitor='MaskDice')],
                         ids=['plain', 'fast_dev_run', 'bf16', 'limits'])
def test_a_trainer_takes_the_arguments(t, toys, tmp_path):
    made = trainer(None, t, max_epochs=1)
    module = room.lightning_module(unet(), metrics=[MaskDice()])
    was = torch.are_deterministic_algorithms_enabled()
    made.fit(module, room.lightning_data(volumes(toys)))
    torch.use_deterministic_algorithms(was)
    assert made.global_step == (1 if t.fast_dev_run else 2)


@needs
def test_accumulation_by_the_trainer_shortens_the_schedule():
    cfg, dls = config(lr=.05, max_epochs=2, gpus=0), loaders()
    t = trainer(training=cfg.training, accumulate_grad_batches=2)
    t.fit(room.lightning_module(line(), cfg), dls.train, dls.valid)
    moves = t.lr_scheduler_configs[0].scheduler
    assert (moves.steps, moves.last_epoch) == (6, 6)


@needs
def test_early_stop_comes_after_as_many_epochs_as_with_fastai():
    from jfr2020.train.callbacks import StopEarly
    ran = []
    for epochs in (2, 9):
        flat, dls = wrap_module(Line(), loss=lambda p,y: p.sum()*0 + 1), loaders()
        learn = Learner(dls, flat, loss_func=flat.compute_loss, cbs=StopEarly(patience=3))
        learn.remove_cb(ProgressCallback)
        with learn.no_logging(): learn.fit(epochs)
        t = trainer(training=TrainSettings(max_epochs=epochs, gpus=0, early_stop=3))
        t.fit(room.lightning_module(flat), dls.train, dls.valid)
        ran.append((len(learn.recorder.values), t.current_epoch))
    assert ran == [(2, 2), (4, 4)]


@needs
def test_best_follows_the_monitored_number(tmp_path):
    best, last = room.trainer_arguments(TrainSettings(monitor='LesionF1'), tmp_path)['callbacks']
    assert (best.mode, best.monitor, last.monitor) == ('max', 'LesionF1', None)
    assert room.trainer_arguments(TrainSettings(), tmp_path)['callbacks'][0].mode == 'min'
