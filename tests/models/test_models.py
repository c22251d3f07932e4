"Losses, model files and networks: what would bore a reader of their pages."
import copy
import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from jfr2020.ground.errors import ConfigError, GeometryError, JfrError, StoreError
from jfr2020.ct.losses import CandidateLoss, LogScoreLoss, ScoreAndClassLoss, score_classes
from jfr2020.models.losses import MaskDiceLoss, MaskFocalLoss, MaskTverskyLoss, OrdinalLoss, class_chances, make_loss
from jfr2020.models.base import MODELS, MODULES, Model, create_model, load_model, read_card, register_model, register_module, save_model, wrap_module
from jfr2020.ct.preprocessing import Preprocessing
from jfr2020.models.nets import UNet3d, UNet25d, halvings, receptive_field
from jfr2020.ct.score_nets import AttentionNet, ScoreNet

MASKS = [MaskDiceLoss(), MaskDiceLoss(batch=True), MaskTverskyLoss(gamma=1.5), MaskFocalLoss(), MaskFocalLoss(0), MaskFocalLoss(1.5, [1,3,2]),
         CandidateLoss()]


def one_hot(y, k): return np.stack([y == c for c in range(k)], 1)


@pytest.mark.parametrize('loss', MASKS, ids=repr)
@pytest.mark.parametrize('k', [1, 3])
def test_mask_gradients_are_those_of_differences(loss, k):
    if k == 1 and getattr(loss, 'weight', None): loss = MaskFocalLoss(1.5, [1,3])
    torch.manual_seed(k)
    x = torch.randn(2,k,2,3,2, dtype=torch.float64, requires_grad=True)
    y = torch.randint(-1, max(k,2), (2,2,3,2))
    assert torch.autograd.gradcheck(lambda p: loss(p, y), x)


def test_score_gradients_are_those_of_differences():
    x = torch.randn(4,5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: ScoreAndClassLoss()(p, torch.tensor([0.,2.,4.,7.])), x)
    assert torch.autograd.gradcheck(lambda p: OrdinalLoss()(p, torch.tensor([0,5,2,1])), x)
    assert torch.autograd.gradcheck(lambda p: LogScoreLoss(.7)(p[:,0], torch.tensor([0.,2.,4.,7.])), x)


def test_dice_and_tversky_equal_a_plain_formula():
    rng = np.random.default_rng(0)
    z, y = rng.normal(size=(3,4,2,5,6)), rng.integers(0, 4, (3,2,5,6))
    p = np.exp(z)/np.exp(z).sum(1, keepdims=True); t = one_hot(y, 4)
    out = []
    for b in range(3):
        for c in range(1, 4):
            tp, fp, fn = (p[b,c]*t[b,c]).sum(), (p[b,c]*~t[b,c]).sum(), ((1-p[b,c])*t[b,c]).sum()
            out.append((1-(2*tp+1)/(2*tp+fp+fn+1), 1-(tp+.5)/(tp+.2*fp+.9*fn+.5)))
    dice, tversky = np.mean(out, 0)
    z, y = torch.from_numpy(z), torch.from_numpy(y)
    assert float(MaskDiceLoss()(z, y)) == pytest.approx(dice, abs=1e-12)
    assert float(MaskTverskyLoss(.2, .9, smooth=.5)(z, y)) == pytest.approx(tversky, abs=1e-12)


def test_focal_equals_a_plain_formula_and_cross_entropy():
    torch.manual_seed(0)
    z, y = torch.randn(3,4,2,5,6, dtype=torch.float64), torch.randint(0, 4, (3,2,5,6))
    p = z.softmax(1).gather(1, y[:,None])[:,0]
    assert torch.allclose(MaskFocalLoss(2)(z, y), (-(1-p)**2*p.log()).mean())
    assert torch.allclose(MaskFocalLoss(0)(z, y), F.cross_entropy(z, y))
    assert torch.allclose(MaskFocalLoss(0)(z[:,:1], y.clamp(max=1)), F.binary_cross_entropy_with_logits(z[:,0], y.clamp(max=1).double()))
    assert torch.allclose(MaskFocalLoss(0, reduction='none')(z, y), F.cross_entropy(z, y, reduction='none').flatten(1).mean(1))


@pytest.mark.parametrize('loss', MASKS[:5]+MASKS[6:], ids=repr)
@pytest.mark.parametrize('size', [1e2, 1e4, 1e8])
@pytest.mark.parametrize('k', [1, 3])
def test_extreme_logits_give_finite_losses_and_gradients(loss, size, k):
    torch.manual_seed(0)
    for y in (torch.zeros(2,2,3,3).long(), torch.ones(2,2,3,3).long(), torch.full((2,2,3,3), -1)):
        x = (size*torch.randn(2,k,2,3,3).sign()).requires_grad_()
        out = loss(x, y); out.backward()
        assert torch.isfinite(out) and torch.isfinite(x.grad).all()
    x = torch.full((1,k,1,2,2), 6e4, dtype=torch.float16) # half precision is computed in float32
    assert torch.isfinite(loss(x, torch.zeros(1,1,2,2).long()))


def test_empty_masks():
    y = torch.zeros(1,2,10,10).long()
    for m in (0, 1, 5, 50):
        x = torch.full((1,1,2,10,10), -1e3); x.view(-1)[:m] = 1e3
        for s in (1., 10.): assert float(MaskDiceLoss(s)(x, y)) == pytest.approx(m/(m+s), abs=1e-6)
    x = torch.randn(1,2,2,10,10, requires_grad=True)
    CandidateLoss()(x, y-1).backward()
    assert (x.grad == 0).all()


def test_labels_below_zero_have_no_influence():
    torch.manual_seed(0)
    x, y = torch.randn(1,3,2,4,4), torch.randint(0, 3, (1,2,4,4)); y[:,1] = -1
    other = x.clone(); other[:,:,1] = 77
    for loss in MASKS: assert torch.equal(loss(x, y), loss(other, y))


def test_ordinal_chances_and_classes():
    torch.manual_seed(0)
    loss = OrdinalLoss()
    above = loss.activation(torch.randn(50,4)*3)
    p = class_chances(above)
    assert torch.allclose(p.sum(1), torch.ones(50)) and (p >= 0).all()
    assert torch.equal(loss.decodes(above), (p.cumsum(1) < .5).sum(1)) # the median class
    scores = torch.tensor([0,.5,1,9.99,10,99.99,100,399.9,400,5000])
    assert score_classes(torch.log1p(scores)).tolist() == [0,1,1,1,2,2,3,3,4,4]
    with pytest.raises(ConfigError, match='did you mean'): make_loss('oridnal')


# ---- models

NETS = [('unet3d', dict(classes=3, widths=[4,8,8], act='mish', attention=True)), ('unet3d', dict(classes=1, widths=[4,8], norm='batch', spacing=[1,1,1])),
        ('unet25d', dict(classes=2, widths=[4,8], neighbours=1, norm='group')), ('scorenet', dict(widths=[4,8], head='both')),
        ('scorenet', dict(widths=[4,8], use_spacing=True, norm='instance')), ('attentionnet', dict(widths=[4,8], head='class', dropout=.2))]


def inputs(model, shape=(2,1,5,18,21)):
    x = torch.randn(shape)
    return (x, torch.rand(len(x), 3)+.5) if getattr(model, 'use_spacing', False) else (x,)


@pytest.mark.parametrize('name,args', NETS)
def test_saved_and_loaded_is_the_same(name, args, tmp_path):
    torch.manual_seed(0)
    m = create_model(name, **args)
    m.train()(*inputs(m)) # moves what batch norm counts
    m.preprocessing = Preprocessing('calcium', (3,1,1), shape=(8,32,32))
    before = torch.get_rng_state()
    back = load_model(save_model(m, tmp_path/'m', 'a test', epochs=3))
    assert torch.equal(torch.get_rng_state(), before)
    x = inputs(m)
    assert torch.equal(back(*x), m.eval()(*x)) and back.arguments == m.arguments and back.preprocessing == m.preprocessing
    assert json.loads((tmp_path/'m'/'model.json').read_text())['facts'] == {'epochs': 3}
    assert sorted(p.name for p in tmp_path.iterdir()) == ['m']


@pytest.mark.parametrize('name,args', NETS)
def test_same_seed_same_network_same_gradients(name, args):
    def once():
        torch.manual_seed(3)
        m = create_model(name, **args).eval(); x = inputs(m)
        out = m(*x); (out**2).mean().backward()
        return [out.detach(), *(p.grad for p in m.parameters())]
    a, b = once(), once()
    assert all(torch.equal(p, q) and torch.isfinite(p).all() for p,q in zip(a, b, strict=True))


@pytest.mark.parametrize('name,args', NETS)
@pytest.mark.parametrize('shape', [(1,1,1,1,1), (1,1,3,2,7), (2,1,9,33,17)])
def test_any_size(name, args, shape):
    torch.manual_seed(0)
    m = create_model(name, **args).train()
    out = m(*inputs(m, shape))
    assert torch.isfinite(out).all() and (out.shape[2:] == shape[2:] if out.ndim == 5 else len(out) == shape[0])


def test_network_gradients_are_those_of_differences():
    torch.manual_seed(0)
    for m in (UNet3d(widths=(2,3), act='swish'), UNet25d(widths=(2,3), act='mish', neighbours=1), ScoreNet(widths=(2,3), act='swish'),
              AttentionNet(widths=(2,3), act='swish')):
        x = torch.randn(1,1,3,4,4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(m.double().eval(), x, atol=1e-4)


def test_receptive_field_by_arithmetic():
    # two levels, 3x3: at the top 1+2+2 below the cut, 2 coarse convolutions of stride 2, 2 fine ones after: 4 + (2+4) + 4 + 1, and half a coarse voxel
    assert receptive_field(UNet25d(widths=(4,4), neighbours=2), (7,40,40))[0] == 5
    d, h, w = receptive_field(UNet3d(widths=(4,4), spacing=(3,1,1)), (20,40,40))
    assert d == 13 and h == w and 14 <= h <= 17 # six convolutions in D, none strided
    assert halvings((5,.5,.5), 5) == ((1,2,2),)*3 + ((2,2,2),)*2 # 0.5, 1, 2 mm, and 4 is near 5


def test_wrong_hyperparameters_are_named():
    for bad in (dict(widths=[8,'x']), dict(widths=[]), dict(widths=[8]*9), dict(classes=0), dict(classes=2.5), dict(norm='layer'), dict(act='tanh'),
                dict(dropout=1.), dict(spacing=[1,2]), dict(clases=2), dict(widths=5), dict(loss='dic'), dict(loss=dict(name='dice', x=1))):
        with pytest.raises(ConfigError): create_model('unet3d', **bad)
    with pytest.raises(GeometryError): create_model('unet3d')(torch.zeros(1,8,8,8))


def test_copies_and_pickles_keep_arguments():
    m = create_model('unet25d', widths=(4,8)); m.preprocessing = Preprocessing()
    for twin in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert twin.arguments == m.arguments and twin.preprocessing == m.preprocessing and twin.compute_loss.model is twin
    assert m.arguments['widths'] == [4,8]


def test_overwrite_replaces_and_a_failure_leaves_the_old(tmp_path, monkeypatch):
    m = create_model('unet25d', widths=(4,8)); m.preprocessing = Preprocessing()
    folder = save_model(m, tmp_path/'m', n=1)
    with pytest.raises(StoreError, match='EXISTS'): save_model(m, folder)
    save_model(m, folder, overwrite=True, n=2)
    assert read_card(folder)['facts'] == {'n': 2}
    import jfr2020.models.base as base
    real = base.write_atomic
    def full(path, mode='w'):
        if Path(path).name == 'model.json': raise OSError(28, 'No space left on device')
        return real(path, mode)
    monkeypatch.setattr(base, 'write_atomic', full)
    with pytest.raises(StoreError, match='DISK'): save_model(m, folder, overwrite=True, n=3)
    assert read_card(folder)['facts'] == {'n': 2} and [p.name for p in tmp_path.iterdir()] == ['m']
    load_model(folder)


def test_every_damaged_byte_is_found(tmp_path):
    m = create_model('unet25d', widths=(2,2), neighbours=0); m.preprocessing = Preprocessing()
    folder = save_model(m, tmp_path/'m')
    w = folder/'weights.safetensors'; raw = w.read_bytes()
    for at in [*range(0, 300, 7), *range(300, len(raw), 97), len(raw)-1]:
        w.write_bytes(raw[:at] + bytes([raw[at] ^ 4]) + raw[at+1:])
        with pytest.raises(JfrError): load_model(folder)
    for n in (0, 1, 7, 8, 9, 100, len(raw)-1):
        w.write_bytes(raw[:n])
        with pytest.raises(JfrError): load_model(folder)
    w.write_bytes(raw); load_model(folder)


def test_mangled_cards_are_refused_in_our_words(tmp_path):
    m = create_model('unet25d', widths=(2,2), neighbours=0); m.preprocessing = Preprocessing()
    folder = save_model(m, tmp_path/'m'); card = folder/'model.json'; good = json.loads(card.read_text())
    junk = [None, True, -1, 1e308, 'x'*1000, [], {}, [[]], {'a': 1}, '../..', '\0', [1]*1000]
    kept = 0
    for key in good:
        for value in junk:
            card.write_text(json.dumps({**good, key: value}))
            try: load_model(folder)
            except JfrError as e: assert len(str(e)) < 600 and '\n' not in str(e)
            else: kept += 1; assert key in ('library', 'facts', 'intended_use', 'preprocessing') # what says nothing about the network
    assert kept
    for key in good['arguments']:
        for value in junk:
            card.write_text(json.dumps({**good, 'arguments': {**good['arguments'], key: value}}))
            try: load_model(folder)
            except JfrError as e: assert '\n' not in str(e)
            else: assert key in ('attention', 'loss', 'act', 'dropout', 'norm')


def test_sparse_file_of_many_gigabytes_makes_no_room(tmp_path):
    m = create_model('unet25d', widths=(2,2), neighbours=0); m.preprocessing = Preprocessing()
    folder = save_model(m, tmp_path/'m'); card = folder/'model.json'; good = json.loads(card.read_text())
    with open(folder/'weights.safetensors', 'r+b') as f: f.truncate(1<<40)
    good['weights']['bytes'] = 1<<40; card.write_text(json.dumps(good))
    with pytest.raises(StoreError, match='LIMIT'): load_model(folder)


def test_module_of_another_library(tmp_path):
    monai = pytest.importorskip('monai.networks.nets', reason='needs monai')
    def monai_unet(**k): return monai.UNet(spatial_dims=3, in_channels=1, out_channels=2, channels=(4,8), strides=(2,), **k)
    register_module('monai_unet')(monai_unet)
    try:
        m = wrap_module('monai_unet', loss='focal', num_res_units=1); m.preprocessing = Preprocessing()
        x = torch.randn(1,1,8,8,8)
        assert torch.equal(load_model(save_model(m, tmp_path/'m'))(x), m.eval()(x))
        weights = (tmp_path/'m'/'weights.safetensors').read_bytes()
        assert read_card(tmp_path/'m')['weights']['sha256'] == hashlib.sha256(weights).hexdigest()
    finally: MODULES.pop('monai_unet')
    with pytest.raises(ConfigError, match='no module is called'): load_model(tmp_path/'m') # not known here: refused


def test_trained_in_fastai_with_a_spacing_input(tmp_path):
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from fastai.learner import Learner
    from fastai.callback.progress import ProgressCallback
    torch.manual_seed(0)
    data = [(torch.randn(1,4,8,8), torch.tensor([3.,1,1]), torch.tensor(float(k))) for k in range(8)]
    dls = DataLoaders(*(DataLoader(data, bs=4, num_workers=0, n_inp=2) for _ in range(2)), path=tmp_path)
    dls.n_inp = 2
    m = create_model('scorenet', widths=(4,8), use_spacing=True)
    learn = Learner(dls, m, loss_func=m.compute_loss)
    learn.remove_cb(ProgressCallback)
    with learn.no_logging(): learn.fit(2, lr=1e-2)
    preds, _, decoded = learn.get_preds(with_decoded=True)
    assert preds.shape == (8,1) and decoded.shape == (8,) and np.isfinite(learn.recorder.values).all()
    with learn.loss_not_reduced(): assert learn.loss_func(preds, torch.arange(8.)).shape == (8,)
    assert m.loss.reduction == 'mean'


def test_names_cannot_be_taken():
    with pytest.raises(ConfigError, match='already'):
        @register_model('unet3d')
        class Other(Model): pass
    with pytest.raises(ConfigError, match='subclass of Model'): register_model('linear')(nn.Linear)
    assert MODELS['unet3d'] is UNet3d
