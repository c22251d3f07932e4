"fastai's loop beside a bare loop of PyTorch, and our sliding windows beside MONAI's, with the same network: equal first, then timed."
import io, itertools, os, tempfile, time, warnings
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import numpy as np
import torch
from fastai.basics import DataLoaders, Learner, OptimWrapper

from jfr2020.train.callbacks import SaveState
from jfr2020.datasets.cases import Case
from jfr2020.ct.loaders import CTDataLoaders
from jfr2020.data.transforms import RandomCrop
from jfr2020.ground.geometry import Geometry
from jfr2020.ct.predict import predict_probability, slide
from jfr2020.ct.preprocessing import Preprocessing
from jfr2020.models.nets import UNet3d
from jfr2020.train.runlog import RunLog
from jfr2020.train.steps import GuardFinite
from jfr2020.ground.volume_view import get_window
from jfr2020.ground.volume import CTVolume, MaskVolume
from tools.bench import interleaved, table
from tools.bench.reading import memory

PATCH, BATCH, STEPS, VALID = (16,64,64), 2, 8, 1 # voxels; patches a batch; batches of training and of validation in an epoch
TINY = (4,8,8) # voxels: patches that cost next to nothing, so that what is left is the loop
WIDTHS, LR = (4,8,16), 1e-3
SCAN, WINDOW, OVERLAP, SD = (60,192,192), (32,96,96), .5, .25 # voxels; share of a window; standard deviation of its weights, share of it
GREY = get_window('calcium')


def network(classes): torch.manual_seed(0); return UNet3d(classes=classes, widths=WIDTHS)


def timed(title, methods, base, rounds, target=''):
    "A table of `interleaved`, and the least processor time of the same runs: what is left of a ratio when other work shares the machine"
    spent = {k: [] for k in methods}
    def clocked(k, f):
        t = time.process_time(); f(); spent[k].append(time.process_time()-t)
    times = interleaved({k: partial(clocked, k, f) for k,f in methods.items()}, rounds)
    table(title, times, base, target)
    print('processor ms, least: ' + ', '.join(f'{k} {min(t)*1e3:.0f} ({min(t)/min(spent[base]):.2f} x)' for k,t in spent.items()), flush=True)
    return spent


# the loop

def synthetic_case(k, shape):
    "Noise with bright boxes"
    rng = np.random.default_rng(k)
    hu, mask = rng.normal(40, 20, shape).astype('i2'), np.zeros(shape, 'u1')
    for c in rng.integers(0, np.array(shape)-4, (12,3)): mask[tuple(slice(a, a+4) for a in c)] = 1
    g = Geometry.from_spacing(shape, (3.,.7,.7))
    return Case(f'c{k}', CTVolume(np.where(mask > 0, 400, hu).astype('i2'), g), MaskVolume(mask, g))


def loaders(patch):
    "Patches of cases in memory, as a user makes them"
    cases = [synthetic_case(k, (24,96,96)) for k in range(BATCH*(STEPS+VALID))]
    return CTDataLoaders.from_cases(cases, 'mask', item_tfms=[RandomCrop(patch)], scale='calcium', bs=BATCH, valid=VALID/(STEPS+VALID), device='cpu')


class Ready:
    "Batches that were made before"
    def __init__(self, dl): self.batches = [tuple(o.as_subclass(torch.Tensor) for o in b) for b in dl]
    def __len__(self): return len(self.batches)
    def __iter__(self): return iter(self.batches)
    def one_batch(self): return self.batches[0]


def bare_epoch(model, opt, train, valid):
    "What PyTorch's tutorials do"
    model.train()
    for x,y in train:
        loss = model.compute_loss(model(x), y)
        loss.backward(); opt.step(); opt.zero_grad()
    model.eval()
    total = 0.
    with torch.no_grad():
        for x,y in valid: total += float(model.compute_loss(model(x), y))
    return total/len(valid)


def torch_adam(params, **kwargs): return torch.optim.AdamW(params, LR)


def bare(dls):
    model = network(1)
    return partial(bare_epoch, model, torch_adam(model.parameters()), dls.train, dls.valid), model


def fitted(dls, folder, own=True, kit=(), bar=False):
    "A function that fits one epoch: fastai's Adam or torch's AdamW, callbacks of `kit` in a new folder each time; and its network"
    model, epochs = network(1), itertools.count()
    opt = {} if own else dict(opt_func=partial(OptimWrapper, opt=torch_adam))
    learn = Learner(dls, model, loss_func=model.compute_loss, path=folder, **opt)
    if not bar: learn.remove_cb(learn.progress)
    def epoch():
        run = folder/f'{id(learn)}-{next(epochs)}'
        with redirect_stdout(io.StringIO()), learn.no_logging(): learn.fit(1, LR, cbs=[make(run) for make in kit])
    return epoch, model


def same_weights(dls, folder):
    "An epoch over the same batches in the same order ends at the same weights"
    (one,a), (two,b) = bare(dls), fitted(dls, folder, own=False)
    one(); two()
    far = max(float((p-q).abs().max()) for p,q in zip(a.parameters(), b.parameters()))
    if far > 1e-6: raise SystemExit(f'weights differ by {far:g} after an epoch')
    print(f'\nequal: weights after an epoch, bare loop and fit, differ at most by {far:.0e}')


BARE, KIT = 'bare loop, torch AdamW', (SaveState, RunLog, lambda run: GuardFinite())


def loops(title, dls, folder, rounds, more=False):
    "An epoch by each loop"
    methods = {BARE: bare(dls)[0], "fit, fastai's Adam": fitted(dls, folder)[0], 'the same, SaveState RunLog GuardFinite': fitted(dls, folder, kit=KIT)[0]}
    if more: methods.update({'fit, torch AdamW': fitted(dls, folder, own=False)[0], "fit, fastai's Adam, GuardFinite": fitted(dls, folder, kit=KIT[2:])[0],
                             "fit, fastai's Adam, progress bar": fitted(dls, folder, bar=True)[0]})
    return timed(title, methods, BARE, rounds, '' if more else 'fit at most 1.1 x')


def loop(folder, rounds):
    "Real patches, from memory and from the loader; tiny patches"
    dls = loaders(PATCH)
    ready, tiny = (DataLoaders(Ready(d.train), Ready(d.valid), device='cpu') for d in (dls, loaders(TINY)))
    same_weights(ready, folder)
    what = f'an epoch of {STEPS} batches of {BATCH} x {" x ".join(map(str, PATCH))}, {VALID} of validation, UNet3d {WIDTHS}'
    step = min(loops(f'{what}, batches in memory', ready, folder, rounds)[BARE])/STEPS
    loops(f'{what}, batches from the loader', dls, folder, rounds)
    spent = loops(f'the same with batches of {BATCH} x {" x ".join(map(str, TINY))} in memory: what is not arithmetic', tiny, folder, 3*rounds, True)
    print(f'processor time of a step above the bare loop, and its share of a step of {step*1e3:.0f} ms:')
    for k,t in spent.items(): print(f'{k:44}{(m := (min(t)-min(spent[BARE]))/STEPS)*1e3:8.2f} ms{m/step:8.1%}')


# sliding windows

def monai_slide(fn, x, batch=2, mode='gaussian'):
    "As its pages show it, with the weights of ours"
    from monai.inferers import SlidingWindowInferer
    slider = SlidingWindowInferer(WINDOW, batch, OVERLAP, mode, SD)
    with torch.no_grad(): return slider(x[None], fn)[0]


def our_slide(fn, x): return slide(fn, x, WINDOW, OVERLAP)


def count(way, x):
    "How often a window is fed"
    fed = []
    way(lambda cubes: fed.append(len(cubes)) or cubes, x)
    return sum(fed)


def near(what, a, b, eps):
    worst = float((a-b).abs().max())
    if not worst <= eps: raise SystemExit(f'{what}: differs by {worst:g}, more than {eps:g}')
    print(f'equal: {what}, ours beside MONAI, at most {worst:.0e}')


def monai_scan(net, hu):
    "From HU to probabilities, as its pages would: grey scale of the whole, windows, softmax of the whole"
    x = torch.from_numpy(hu.astype('f4'))[None].sub_(GREY.low).div_(GREY.width).clamp_(0, 1)
    return torch.softmax(monai_slide(net, x), 0)


def sliding(rounds):
    "The same network, window, overlap and weights"
    net, cheap = network(2).eval(), torch.nn.Conv3d(1, 2, 1).eval()
    grid = torch.randn(1, 64, *SCAN[1:], generator=torch.Generator().manual_seed(0)) # here both put their windows on the same places
    print()
    near('a network on 64 slices, windows on the same places', our_slide(cheap, grid), monai_slide(cheap, grid), 1e-5)
    x = grid[:,:SCAN[0]]
    ours, theirs = count(our_slide, x), count(monai_slide, x)
    near(f'a network of one voxel on {SCAN[0]} slices', our_slide(cheap, x), monai_slide(cheap, x), 1e-5)
    size = f'{" x ".join(map(str, SCAN))}, windows {" x ".join(map(str, WINDOW))}, overlap {OVERLAP}, Gaussian, two at once; windows: {ours} ours, {theirs} MONAI'
    for name,fn,n in ((f'UNet3d {WIDTHS}', net, rounds), ('1x1x1 convolution: what is not the network', cheap, 3*rounds)):
        methods = {'ours: slide': partial(our_slide, fn, x), 'MONAI SlidingWindowInferer': partial(monai_slide, fn, x)}
        spent = timed(f'{name} on {size}', methods, 'ours: slide', n, 'MONAI >= 1')
        a, b = (min(t)/c*1e3 for t,c in zip(spent.values(), (ours, theirs)))
        print(f'processor ms a window, least: ours {a:.1f}, MONAI {b:.1f}, {b/a:.2f} x')
        memory(name, methods, x.nbytes/2**20, 'at most MONAI')
    whole(net, rounds)


def whole(net, rounds):
    "From HU to probabilities"
    ct = synthetic_case(0, SCAN).image
    net.preprocessing = Preprocessing(grey='calcium', shape=WINDOW)
    methods = {'ours: predict_probability': lambda: predict_probability(net, ct, OVERLAP), 'MONAI, grey scale and softmax of the whole': lambda: monai_scan(net, ct.data)}
    timed(f'from int16 HU to probabilities, {" x ".join(map(str, SCAN))}', methods, 'ours: predict_probability', rounds, 'MONAI >= 1')
    memory('from HU to probabilities', methods, ct.data.nbytes/2**20, 'at most MONAI')


def main(rounds=3):
    torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', os.cpu_count())))
    warnings.simplefilter('ignore')
    with tempfile.TemporaryDirectory(dir=os.environ.get('BENCH_TMP')) as d: loop(Path(d), rounds)
    sliding(rounds)


if __name__ == '__main__': main()
