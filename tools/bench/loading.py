"Random cubes to augmented batches beside TorchIO, MONAI and a plain torch loader; resampling, grey scales: equal first, then timed."
import math, os, random, tempfile, warnings
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from fastai.data.all import DataBlock, IndexSplitter, fa_collate
from torch.utils.data import DataLoader, Dataset

from jfr2020.datasets.cases import load_ct
from jfr2020.data.batch import AffineBatch, BlurHU, GammaGrey, NoiseHU, WindowHU, plane_maps, sample_plane
from jfr2020.ct.preprocessing import HistogramGrey
from jfr2020.data.block import CaseField
from jfr2020.ct.blocks import CTBlock
from jfr2020.ct.loaders import stored_cases
from jfr2020.data.transforms import FlipLR, RandomCrop, TensorVolume, VolumeToTensor, resample
from jfr2020.calcium.histogram import count_hu, fit_histogram
from jfr2020.store.hdf5 import H5Store, StoreWriter
from jfr2020.ground.volume_view import get_window
from jfr2020.ground.volume import CTVolume
from tools.bench import interleaved, table
from tools.bench.reading import peak_mib, processor, scan

SIZE, BATCH, SUBJECTS, EACH = 96, 4, 8, 2 # voxels a side; cubes a batch; volumes; cubes of each in an epoch
DEGREES, ZOOM, NOISE, GAMMA = 10., .1, 20., .3 # the same ranges for all: in the plane, HU, logarithm of the power
WINDOW = get_window('mediastinum')
MORE = dict(gamma=dict(ours=lambda: GammaGrey(GAMMA, p=1)), noise=dict(ours=lambda: NoiseHU(NOISE, p=1))) # one of them at a time


# ours: what a user writes

def item_tfms(): return [RandomCrop((SIZE,)*3), FlipLR()]
def batch_tfms(more): return [AffineBatch(DEGREES, ZOOM, 0), MORE[more]['ours']()]


def our_loader(store, more):
    "Cases of a store through a DataBlock to a VolumeDL"
    cases = every_case(store)
    block = DataBlock(CTBlock(WINDOW), getters=[CaseField('image')], splitter=IndexSplitter([0]), item_tfms=item_tfms(), batch_tfms=batch_tfms(more))
    return block.dataloaders(cases+cases[:1], bs=BATCH, num_workers=0, device='cpu').train


def every_case(store): return [c for c in stored_cases(store) for _ in range(EACH)] # mapped once, as the plain loader's arrays are


class Samples(Dataset):
    "The samples of `our_loader`, by our transforms, for a plain torch loader"
    def __init__(self, cases): self.cases, self.tfms = cases, [*item_tfms(), VolumeToTensor()]
    def __len__(self): return len(self.cases)
    def __getitem__(self, i):
        o = (load_ct(self.cases[i].image),)
        for t in self.tfms: o = t(o, split_idx=0)
        return o


def join(tfms, samples):
    b = fa_collate(samples)
    for t in tfms: b = t(b, split_idx=0)
    return b


def torch_loader(store, more):
    "Nothing of fastai but the types of tensors"
    last = partial(join, sorted([*batch_tfms(more), WindowHU(WINDOW)], key=lambda t: t.order))
    return DataLoader(Samples(every_case(store)), BATCH, shuffle=True, drop_last=True, collate_fn=last)


def read(store, subject): return store[subject].volume('ct') # a memory map


def ours_in_memory(vols, more):
    item, batch = [FlipLR(), VolumeToTensor()], sorted([*batch_tfms(more), WindowHU(WINDOW)], key=lambda t: t.order)
    def run(o, ts):
        for t in ts: o = t(o, split_idx=0)
        return o
    return lambda: run(fa_collate([run((v,), item) for v in vols]), batch)[0]


# the plain torch loader: a dataset and a function for the batch, no type, no geometry

class Cubes(Dataset):
    "Random cubes of memory maps, half of them mirrored"
    def __init__(self, arrays): self.arrays = arrays
    def __len__(self): return len(self.arrays)*EACH
    def __getitem__(self, i):
        a = self.arrays[i//EACH]
        d,h,w = (random.randint(0, n-SIZE) for n in a.shape)
        cube = a[d:d+SIZE,h:h+SIZE,w:w+SIZE]
        return torch.from_numpy(np.array(cube[...,::-1] if random.random() < .5 else cube))[None]


def plain_batch(more, cubes):
    "The arithmetic of our batch transforms, on plain tensors"
    x, u = torch.stack(cubes), lambda a: torch.empty(len(cubes)).uniform_(-a, a)
    maps = plane_maps(u(math.radians(DEGREES)), u(math.log1p(ZOOM)).exp(), torch.zeros(len(x), 2), x.shape[3:])
    x = sample_plane(x[:,0], maps)[:,None]
    column = lambda a: a.view(-1,1,1,1,1)
    if more == 'noise': x = torch.randn(x.shape).mul_(column(u(NOISE).abs())).add_(x)
    x = x.sub(WINDOW.low).div_(WINDOW.width).clamp_(0, 1)
    return x.clamp(0, 1).pow_(column(u(GAMMA).exp())) if more == 'gamma' else x


def plain_loader(arrays, more): return DataLoader(Cubes(arrays), BATCH, shuffle=True, drop_last=True, collate_fn=partial(plain_batch, more))


# TorchIO

def torchio_tfms(more):
    import torchio as tio
    affine = tio.RandomAffine(scales=(1,1,1-ZOOM,1+ZOOM,1-ZOOM,1+ZOOM),
                              degrees=(-DEGREES,DEGREES,0,0,0,0), default_pad_value=-1024.)
    grey = [tio.Clamp(WINDOW.low, WINDOW.high), tio.Lambda(lambda x: (x-WINDOW.low)/WINDOW.width)]
    last = dict(gamma=[*grey, tio.RandomGamma((-GAMMA, GAMMA))], noise=[tio.RandomNoise(std=(0, NOISE)), *grey])[more]
    return tio.Compose([tio.RandomFlip(2, .5), affine, *last])


class AfterQueue(Dataset):
    "Transforms of cubes that a Queue has cut"
    def __init__(self, queue, tfms): self.queue, self.tfms = queue, tfms
    def __len__(self): return len(self.queue)
    def __getitem__(self, i): return self.tfms(self.queue[i]).ct.data


def torchio_loader(arrays, more, whole=False):
    "A Queue of cubes; transforms of cubes, or of whole volumes before they are cut, as its pages show"
    import torchio as tio
    tfms = torchio_tfms(more)
    subjects = [tio.Subject(ct=tio.ScalarImage(tensor=torch.from_numpy(a)[None])) for a in arrays] # mapped, not copied
    queue = tio.Queue(tio.SubjectsDataset(subjects, transform=tfms if whole else None), max_length=SUBJECTS*EACH, samples_per_volume=EACH,
                      sampler=tio.UniformSampler(SIZE), num_workers=0)
    if whole: return DataLoader(queue, BATCH, collate_fn=lambda b: torch.stack([s.ct.data for s in b]))
    return DataLoader(AfterQueue(queue, tfms), BATCH)


# MONAI

def monai_tfms(more):
    import monai.transforms as mt
    affine = mt.RandAffine(prob=1, rotate_range=(math.radians(DEGREES),0,0), scale_range=(0,ZOOM,ZOOM), spatial_size=(SIZE,)*3,
                           padding_mode='border', cache_grid=True)
    grey = mt.ScaleIntensityRange(WINDOW.low, WINDOW.high, 0, 1, clip=True)
    last = dict(gamma=[grey, mt.RandAdjustContrast(prob=1, gamma=(math.exp(-GAMMA), math.exp(GAMMA)))],
                noise=[mt.RandGaussianNoise(prob=1, std=NOISE), grey])[more]
    return [mt.RandFlip(.5, 2), affine, *last]


def monai_loader(arrays, more):
    import monai.data, monai.transforms as mt
    monai.data.set_track_meta(False) # plain tensors: what is fastest
    tfms = mt.Compose([mt.RandSpatialCrop((SIZE,)*3, random_size=False), mt.EnsureType(dtype=torch.float32), *monai_tfms(more)])
    items = [torch.from_numpy(a)[None] for a in arrays for _ in range(EACH)]
    return DataLoader(monai.data.Dataset(items, tfms), BATCH, shuffle=True)


def epoch_batch(b):
    "The tensor of a batch, if it is what was asked for"
    x = b[0] if isinstance(b, (tuple, list)) else b
    if x.shape != (BATCH, 1, SIZE, SIZE, SIZE) or x.dtype != torch.float32: raise SystemExit(f'batch {tuple(x.shape)} {x.dtype}')
    return x.as_subclass(torch.Tensor)


def epoch(loader):
    "All batches of a loader"
    n = sum(len(epoch_batch(b)) for b in loader)
    if n != SUBJECTS*EACH: raise SystemExit(f'{n} cubes in an epoch')


# equality

def near(name, a, b, eps):
    worst = float(abs(np.asarray(a, 'f8')-np.asarray(b, 'f8')).max())
    if not worst <= eps: raise SystemExit(f'{name}: differs by {worst:g}, more than {eps:g}')
    return worst


def same_affine(cube):
    "The same turn and zoom by all three, where the source is inside: HU"
    import monai.transforms as mt, torchio as tio
    x, turn, zoom = torch.from_numpy(cube).float()[None], .15, 1.07
    ours = sample_plane(x, plane_maps(torch.tensor([turn]), torch.tensor([zoom]), torch.zeros(1, 2), x.shape[2:]))
    theirs = {'MONAI Affine': mt.Affine(rotate_params=(-turn,0,0), scale_params=(1,1/zoom,1/zoom), padding_mode='border', image_only=True)(x),
              'TorchIO Affine': tio.Affine((1,zoom,zoom), (math.degrees(turn),0,0), (0,0,0), default_pad_value=-1024.)(x)}
    inside = (slice(None), slice(None), slice(16,-16), slice(16,-16))
    for n,o in theirs.items(): print(f'equal: turn and zoom, {n} beside ours, at most {near(n, o[inside], ours[inside], .1):.3f} HU')


def same_batches(loaders):
    "Means and spreads of what the pipelines feed a network: chance differs, distributions must not"
    found = {}
    for n,l in loaders.items():
        cubes = torch.cat([epoch_batch(b) for _ in range(2) for b in l])
        found[n] = [float(o((1,2,3,4)).mean()) for o in (cubes.mean, cubes.std)]
    for n,m in found.items(): near(n, m, next(iter(found.values())), .06)
    print('\nfed to a network, mean and spread of a cube: ' + ', '.join(f'{n} {m[0]:.2f} {m[1]:.2f}' for n,m in found.items()))


# tables

def volumes(title, methods, n, rounds, target):
    times = interleaved(methods, rounds)
    base = next(iter(methods))
    table(title, times, base, target)
    print('volumes/s: ' + ', '.join(f'{name} {n/median(t):.0f}' for name,t in times.items()))


def pipelines(store, arrays, more, rounds):
    "From the file to float32 batches, and the peak memory of an epoch"
    loaders = {'ours: VolumeDL': our_loader(store, more), 'torch DataLoader, our transforms': torch_loader(store, more),
               'torch DataLoader, our arithmetic': plain_loader(arrays, more),
               'MONAI Dataset, array transforms': monai_loader(arrays, more), 'TorchIO Queue, transforms of cubes': torchio_loader(arrays, more)}
    if more == 'gamma': loaders['TorchIO Queue, transforms of volumes'] = torchio_loader(arrays, more, whole=True)
    same_batches(loaders)
    size, n = ' x '.join(map(str, arrays[0].shape)), SUBJECTS*EACH
    methods = {k: partial(epoch, l) for k,l in loaders.items()}
    title = f'{n} random {SIZE}^3 cubes of {SUBJECTS} mapped {size} int16: flip, turn and zoom, {more}, window; batches of {BATCH}, no workers'
    volumes(title, methods, n, rounds, 'MONAI and TorchIO >= 3, torch DataLoader >= 0.9')
    processor(title, {k: f for k,f in methods.items() if 'of volumes' not in k}, 'ours: VolumeDL', rounds)
    mib = BATCH*SIZE**3*4/2**20
    print(f'\npeak memory of an epoch, the mapped volumes ({sum(a.nbytes for a in arrays)/2**20:.0f} MiB) not counted; a float32 batch is {mib:.0f} MiB')
    for k,f in methods.items():
        for a in arrays: a.max() # every page is there before
        print(f'{k:44}{(m := peak_mib(f)[0]):11.1f} MiB{m/mib:10.2f} x batch')


def in_memory(cubes, geometry, more, rounds):
    "The same without cutting"
    import monai.data, monai.transforms as mt
    monai.data.set_track_meta(False)
    tensors = [torch.from_numpy(c)[None] for c in cubes]
    m, t = mt.Compose([mt.EnsureType(dtype=torch.float32), *monai_tfms(more)]), torchio_tfms(more)
    methods = {'ours': ours_in_memory([CTVolume(c, geometry) for c in cubes], more), 'MONAI, sample by sample': lambda: torch.stack([m(x) for x in tensors]),
               'TorchIO, sample by sample': lambda: torch.stack([t(x) for x in tensors])}
    volumes(f'{BATCH} x {SIZE}^3 int16 in memory: flip, turn and zoom, {more}, window', methods, BATCH, rounds, 'MONAI and TorchIO >= 3')


def in_space(x, maps): # the same turn on a 3-D grid
    A = torch.eye(3, 4).repeat(len(x), 1, 1)
    A[:,:2,:2], A[:,:2,3] = maps[:,:,:2], maps[:,:,2]
    return F.grid_sample(x[:,None].float(), F.affine_grid(A, (len(x), 1, *x.shape[1:]), align_corners=False), padding_mode='border', align_corners=False)[:,0]


def parts(cubes, scale, rounds):
    "Our transforms one by one, beside what they were made from"
    x = torch.from_numpy(np.stack(cubes))
    b, maps = TensorVolume(x[:,None].float()), plane_maps(torch.tensor([.1,-.15,.05,.12]), torch.tensor([1.05,.95,1.1,1.]), torch.zeros(4, 2), x.shape[2:])
    near('plane and space', sample_plane(x, maps), in_space(x, maps), .1)
    grid = F.affine_grid(maps, (len(x), 1, *x.shape[2:]), align_corners=False)
    at_once = lambda: F.grid_sample(x.float(), grid, padding_mode='border', align_corners=False)
    near('slices at once', sample_plane(x, maps), at_once(), 0)
    methods = {'copy of the float batch': lambda: b.clone(), 'ours: sample_plane, int16 in': lambda: sample_plane(x, maps), 'all slices in one grid_sample': at_once,
               '3-D affine_grid and grid_sample': lambda: in_space(x, maps)}
    for t in (NoiseHU(p=1), BlurHU(p=1), WindowHU(), HistogramGrey(scale), GammaGrey(p=1)): methods[f'ours: {type(t).__name__}'] = lambda t=t: t((b,), split_idx=0)
    table(f'One step of augmentation, {BATCH} x {SIZE}^3', interleaved(methods, rounds), 'ours: sample_plane, int16 in')


def to_one_mm(ct, rounds):
    "A scan onto 1 mm"
    import SimpleITK as sitk
    new, image = ct.geometry.with_spacing((1,1,1)), sitk.GetImageFromArray(ct.data)
    image.SetSpacing(ct.spacing[::-1])
    f = sitk.ResampleImageFilter()
    f.SetOutputSpacing((1,1,1)); f.SetSize(new.shape[::-1]); f.SetInterpolator(sitk.sitkLinear); f.SetOutputPixelType(sitk.sitkFloat32)
    f.SetOutputOrigin([(1-s)/2 for s in ct.spacing[::-1]]) # outer faces stay
    methods = {'ours: resample': lambda: resample(ct, (1,1,1)).data, 'SimpleITK, array copied': lambda: sitk.GetArrayFromImage(f.Execute(image)),
               'SimpleITK, array not copied': lambda: f.Execute(image)}
    inside = (slice(2,-2),)*3
    a, b = methods['ours: resample'](), methods['SimpleITK, array copied']()
    title = f'{" x ".join(map(str, ct.shape))} int16 at {ct.spacing} mm onto 1 mm, {" x ".join(map(str, new.shape))} float32'
    print(f'\nequal: resampling, at most {near("resample", a[inside], b[inside], 1e-3):.1e} HU inside')
    table(title, interleaved(methods, rounds), 'ours: resample', 'SimpleITK >= 2')
    processor(title, methods, 'ours: resample')


def greys(hu, scale, rounds):
    "A fitted scale on int16"
    out = np.empty(hu.shape, 'f4')
    methods = {'limit: astype into an array': lambda: np.copyto(out, hu), 'ours: HistogramScale': lambda: scale(hu),
               'np.interp, slice by slice': lambda: np.stack([np.interp(s, scale.hu, scale.grey).astype('f4') for s in hu])}
    near('grey', scale(hu), methods['np.interp, slice by slice'](), 0)
    table(f'{len(scale.hu)} knots on {" x ".join(map(str, hu.shape))} int16, equal', interleaved(methods, rounds), 'ours: HistogramScale', 'np.interp >= 12')
    print("fastai's hist_scaled: not measured, its module imports torchvision and kornia")


def cubes_of(store, folder, ct, rounds, n=16):
    "Random cubes as tensors: the map of a store, npy, h5py"
    rng, (s,*_) = np.random.default_rng(2), store.subjects
    np.save(folder/'one.npy', ct.data)
    boxes = [tuple(slice(o, o+SIZE) for o in rng.integers(0, np.array(ct.shape)-SIZE+1)) for _ in range(n)]
    sliced, flat, v = store[s].h5['volumes/ct'], np.load(folder/'one.npy', mmap_mode='r'), store[s].volume('ct')
    take = lambda a: lambda: [torch.from_numpy(np.array(a[b])) for b in boxes]
    crop, end = RandomCrop((SIZE,)*3), VolumeToTensor()
    methods = {'store, mapped': take(v.data), 'npy, mapped': take(flat), 'h5py slices': take(sliced),
               'ours: RandomCrop, VolumeToTensor': lambda: [end(crop((v,), split_idx=0)) for _ in boxes]}
    for name in ('npy, mapped', 'h5py slices'):
        for a,b in zip(methods[name](), methods['store, mapped']()): near(name, a, b, 0)
    volumes(f'{n} random {SIZE}^3 cubes of {" x ".join(map(str, ct.shape))} int16, as tensors', methods, n, rounds, 'npy >= 0.9')


def prepare():
    "Peers and threads: as many for all"
    import SimpleITK as sitk
    n = int(os.environ.get('OMP_NUM_THREADS', os.cpu_count()))
    torch.set_num_threads(n); sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(n)
    warnings.simplefilter('ignore') # theirs, of read-only maps
    random.seed(0); np.random.seed(0); torch.manual_seed(0)


def main(rounds=5):
    prepare()
    ct = scan(60)
    scale = fit_histogram(count_hu(ct))
    with tempfile.TemporaryDirectory(dir=os.environ.get('BENCH_TMP')) as d:
        folder, big = Path(d), scan(128, 256)
        with StoreWriter(folder/'store') as w:
            for k in range(SUBJECTS): w.add(f's{k}', dict(ct=CTVolume(np.roll(big.data, 9*k, 0), big.geometry)))
        store = H5Store(folder/'store')
        arrays = [read(store, s).data for s in store.subjects]
        cubes = [np.ascontiguousarray(a[16:16+SIZE, 40:40+SIZE, 100:100+SIZE]) for a in arrays[:BATCH]]
        same_affine(cubes[0])
        for more in MORE: pipelines(store, arrays, more, rounds)
        for more in MORE: in_memory(cubes, big[:SIZE,:SIZE,:SIZE].geometry, more, rounds)
        parts(cubes, scale, rounds)
        cubes_of(store, folder, big, rounds)
    to_one_mm(ct, rounds)
    greys(ct.data, scale, rounds)


if __name__ == '__main__': main()
