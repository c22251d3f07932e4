"Samples that stay together, caches that are never stale, splits that share nobody."
import multiprocessing as mp
import os
import pickle
import random
import signal
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from operator import attrgetter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.all import DataBlock

from jfr2020.datasets.cases import Case, load_ct, load_mask
from jfr2020.ct import cache
from jfr2020.data import transforms as tf
from jfr2020.data.batch import AffineBatch, NoiseHU
from jfr2020.data.block import CaseField, VolumeDL
from jfr2020.ct.blocks import CTBlock, MaskBlock, PatientSplitter
from jfr2020.ct.cache import case_key, clean_cache, prepare_cases
from jfr2020.ct.loaders import CTDataLoaders
from jfr2020.data.transforms import CropOrPad, FlipLR, Onto, RandomCrop, RandomTurn
from jfr2020.ground.errors import ConfigError, JfrError, StoreError
from jfr2020.ground.geometry import Geometry
from jfr2020.store.check import check_store
from jfr2020.store.hdf5 import H5Store, StoreWriter
from jfr2020.files.nifti import write_nifti
from jfr2020.ground.volume import CTVolume, MaskVolume

SHAPE = (12, 24, 20)
CPU = dict(device='cpu', scale=None)


def scan_and_mask(k, shape=SHAPE):
    "A scan whose voxels above 500 HU are its mask"
    g = Geometry.from_spacing(shape, (3, 1, 1.5), (k, 2, 3))
    hu = np.random.default_rng(k).integers(-1000, 1000, shape).astype('i2')
    return CTVolume(hu, g), MaskVolume((hu > 500).astype('u1'), g)


def some_cases(n=10, per_patient=1):
    return [Case(f'p{k//per_patient}', *scan_and_mask(k), float(k % 5)*120) for k in range(n)]


def files_of(home, n=3):
    out = []
    for k in range(n):
        ct, m = scan_and_mask(k)
        write_nifti(ct, home/f'scan{k}.nii')
        write_nifti(m, home/f'mask{k}.nii')
        out.append(Case(f'p{k}', home/f'scan{k}.nii', home/f'mask{k}.nii', float(k)))
    return out


@pytest.mark.parametrize('workers', [0, 2])
def test_image_and_mask_stay_together(workers, tmp_path):
    dls = CTDataLoaders.from_cases(some_cases(), item_tfms=[Onto((3, 1, 1.5)), RandomCrop((6, 12, 30)), FlipLR()], cache=tmp_path/'c', num_workers=workers, bs=2, **CPU)
    n = 0
    for dl in dls:
        for x, y in dl:
            n += len(x)
            assert x.shape[1:] == (1, 6, 12, 30) and torch.equal((torch.Tensor(x.float())[:, 0] > 500).long(), torch.Tensor(y.float()).long())
            assert x.__dict__ == {} and y.__dict__ == {} # nothing hangs on a tensor
            assert y.any()
    assert n == 10


@pytest.mark.parametrize('workers', [0, 2])
def test_draws_differ_by_item_worker_and_epoch(workers):
    g = Geometry.from_spacing((30, 30, 30), (1, 1, 1))
    where = CTVolume(np.arange(27000, dtype='i2').reshape(g.shape), g) # a voxel says where the cube is
    cases = [Case(f'p{k}', where) for k in range(16)]
    dls = CTDataLoaders.from_cases(cases, None, item_tfms=RandomCrop((2, 2, 2)), num_workers=workers, bs=1, **CPU)
    random.seed(0); torch.manual_seed(0)
    first, second = ([int(x[0, 0, 0, 0, 0]) for x, in dls.train] for _ in range(2))
    assert len(set(first)) > 8 and first != second and not set(first) & set(second) == set(first)
    assert first[0::2] != first[1::2] # one worker, and the other


def test_loaders_and_sources_pickle(tmp_path):
    cases = prepare_cases(files_of(tmp_path), CropOrPad((8, 16, 16)), tmp_path/'cache').cases
    load_ct(cases[0].image) # open here; it must not travel
    for c in pickle.loads(pickle.dumps(cases)): assert load_ct(c.image).shape == load_mask(c.mask).shape == (8, 16, 16)
    dls = CTDataLoaders.from_cases(cases, bs=2, **CPU)
    again = pickle.loads(pickle.dumps(dls))
    assert again.valid.one_batch()[0].equal(dls.valid.one_batch()[0])


def _sum_of(cases): return [int(load_ct(c.image).data.sum()) for c in cases]


@pytest.mark.parametrize('method', ['fork', 'spawn'])
def test_a_worker_opens_for_itself(tmp_path, method):
    cases = prepare_cases(files_of(tmp_path), [], tmp_path/'cache').cases
    here = _sum_of(cases) # open in this process first
    with ProcessPoolExecutor(1, mp.get_context(method)) as pool: assert pool.submit(_sum_of, cases).result(60) == here


def by_hand(**getters):
    return DataBlock(blocks=(CTBlock(None), MaskBlock), splitter=PatientSplitter(), item_tfms=[RandomCrop((6, 12, 10)), FlipLR()],
                     batch_tfms=[AffineBatch(p=0), NoiseHU(p=0)], **getters)


@pytest.fixture
def spawned():
    "Workers are started afresh, as they are wherever there is no fork"
    before = mp.get_start_method()
    mp.set_start_method('spawn', force=True)
    yield
    mp.set_start_method(before, force=True)


def test_a_block_written_by_hand_travels_to_spawned_workers(spawned):
    block = by_hand(get_x=CaseField('image'), get_y=CaseField('mask'))
    dls = block.dataloaders(some_cases(6), bs=2, num_workers=2, device='cpu')
    n = 0
    for x, y in dls.train:
        n += len(x)
        assert type(x) is tf.TensorVolume and type(y) is tf.TensorLabels and y.any()
        assert x.shape[1:] == (1, 6, 12, 10) and torch.equal((torch.Tensor(x)[:, 0] > 500.5).long(), torch.Tensor(y).long())
    assert n == 4


@pytest.mark.filterwarnings('ignore:Got pickle error')
def test_what_cannot_travel_is_refused_with_the_way_out(spawned):
    for get_x in (attrgetter('image'), lambda case: case.image):
        dls = by_hand(get_x=get_x, get_y=CaseField('mask')).dataloaders(some_cases(6), bs=2, num_workers=2, device='cpu')
        with pytest.raises(ConfigError, match='NOT_PICKLED') as e: next(iter(dls.train))
        assert "CaseField('image')" in str(e.value)


@pytest.mark.parametrize('workers', [0, 2])
def test_errors_of_a_getter_stay_what_they_are(workers):
    dls = by_hand(get_x=CaseField('image'), get_y=CaseField('mask')).dataloaders(some_cases(6), bs=2, num_workers=0, device='cpu')
    train = dls.train.new(num_workers=workers)
    train.dataset.tls[1].tfms.fs[0].field = 'labels'
    with pytest.raises(AttributeError, match='labels'): next(iter(train))


def patients_of(ds): return {c.patient for c in ds.items}


def test_no_factory_shares_a_patient(tmp_path):
    for c in files_of(tmp_path, 8):
        folder = tmp_path/'study'/f'{c.patient}'
        folder.mkdir(parents=True)
        os.rename(c.image, folder/'scan.nii'); os.rename(c.mask, folder/'mask.nii')
    with StoreWriter(tmp_path/'store') as w:
        for k in range(8): w.add(f's{k}', dict(zip(('ct', 'mask'), scan_and_mask(k))), attrs=dict(score=100.*k))
    table = pd.DataFrame(dict(patient=[f'p{k//2}' for k in range(8)], image=[scan_and_mask(k)[0] for k in range(8)], score=np.arange(8.)))
    made = [CTDataLoaders.from_cases(some_cases(12, 3), **CPU), CTDataLoaders.from_folder(tmp_path/'study', **CPU),
            CTDataLoaders.from_df(table, target='score', **CPU), CTDataLoaders.from_store(tmp_path/'store', target='class', weights='class', **CPU)]
    for dls in made:
        train, valid = patients_of(dls.train_ds), patients_of(dls.valid_ds)
        assert train and valid and not train & valid
        assert dls.one_batch()[0].shape[1:] == (1, *SHAPE)
    with StoreWriter(tmp_path/'store') as w: w.set_lists(['s1', 's2', 's3'], ['s5'], ['s7'])
    listed = CTDataLoaders.from_store(tmp_path/'store', **CPU)
    assert (patients_of(listed.train_ds), patients_of(listed.valid_ds)) == ({'s1', 's2', 's3'}, {'s5'})
    alike = CTDataLoaders.from_cases, some_cases(12, 3)
    with pytest.raises(ConfigError, match='LEAK'): alike[0](alike[1], splitter=lambda cases: ([0, 3, 6], [1, 9]), **CPU)


def test_the_same_seed_is_the_same_split():
    splits = [patients_of(CTDataLoaders.from_cases(some_cases(30), seed=s, **CPU).valid_ds) for s in (0, 0, 1, 2)]
    assert splits[0] == splits[1] and len({frozenset(s) for s in splits}) > 1


def test_every_transform_is_kept():
    tfms = [CropOrPad((8, 16, 16)), Onto((3, 1, 1)), RandomCrop((4, 8, 8)), FlipLR(), RandomTurn()]
    dls = CTDataLoaders.from_cases(some_cases(), item_tfms=tfms, **CPU)
    assert [type(t) for t in dls.after_item.fs if isinstance(t, tf.VolumeTransform)] == [*map(type, tfms), tf.VolumeToTensor]
    with pytest.raises(ConfigError, match='TWICE'): CTDataLoaders.from_cases(some_cases(), item_tfms=[*tfms, CropOrPad((2, 2, 2))], **CPU)


def test_refusals_count():
    cases = some_cases()
    bare = [Case(c.patient, c.image, c.mask if k % 2 else None) for k, c in enumerate(cases)]
    for kwargs, said in ((dict(target='mask'), '5 of 10 cases lack a mask'), (dict(target='score'), '10 of 10 cases lack a score'), (dict(target='x'), 'target is one of'),
                         (dict(target=None, bs=9), 'make no batch of 9'), (dict(target=None, weights='class'), 'lack a score'), (dict(target=None, batch=3), 'no setting')):
        with pytest.raises(ConfigError, match=said): CTDataLoaders.from_cases(bare, **kwargs, **CPU)
    assert len(CTDataLoaders.from_cases(bare, incomplete='skip', **CPU).report) == 5


def test_rare_classes_are_drawn_more_often():
    cases = [Case(f'p{k}', *scan_and_mask(k), 900. if k < 4 else 0.) for k in range(40)]
    dls = CTDataLoaders.from_cases(cases, 'class', weights='class', bs=4, **CPU)
    assert isinstance(dls.train, VolumeDL) and dls.valid.weights is None
    drawn = np.array([dls.train.items[i].score > 0 for _ in range(30) for i in dls.train.get_idxs()])
    assert .42 < drawn.mean() < .58


# the cache

TFMS = [CropOrPad((8, 16, 16)), Onto((2, 2, 2))]


def test_nothing_is_stale(tmp_path, monkeypatch):
    cases = files_of(tmp_path)
    home, key = tmp_path/'cache', case_key(cases[0], TFMS)
    assert prepare_cases(cases, TFMS, home).made == 3 and prepare_cases(cases, TFMS, home).made == 0
    b, times = bytearray(cases[0].image.read_bytes()), os.stat(cases[0].image)
    b[1000] ^= 1 # one bit of one voxel; size and time of the file stay
    cases[0].image.write_bytes(b)
    os.utime(cases[0].image, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert case_key(cases[0], TFMS) != key and prepare_cases(cases, TFMS, home).made == 1
    b[1000] ^= 1
    cases[0].image.write_bytes(b)
    assert prepare_cases(cases, TFMS, home).made == 0 # what was there is there
    write_nifti(scan_and_mask(9)[1], cases[1].mask)
    assert prepare_cases(cases, TFMS, home).made == 1
    for other in (TFMS[:1], TFMS[::-1], [TFMS[0], Onto((2, 2, 2.5))], []): assert case_key(cases[0], other) != key
    monkeypatch.setattr(cache, 'code_hash', lambda module: 'other code')
    assert case_key(cases[0], TFMS) != key
    assert not check_store(home)


def test_code_is_part_of_the_name(tmp_path, monkeypatch):
    (tmp_path/'jfr2020').mkdir()
    a, b = tmp_path/'jfr2020'/'a.py', tmp_path/'jfr2020'/'b.py'
    a.write_text('from .b import *\n'); b.write_text('x = 1\n')
    monkeypatch.setattr(cache, '_ROOT', tmp_path/'jfr2020')
    read = lambda: cache.code_hash.__wrapped__('jfr2020.a')
    first = read()
    assert read() == first
    b.write_text('x = 2\n')
    assert read() != first # a module that is imported has changed


def _with_noise(path, add, scale=1): return CTVolume(load_ct(path).data*np.int16(scale)+np.int16(add), load_ct(path).geometry)


def test_functions_are_known_by_what_they_do(tmp_path):
    path = files_of(tmp_path)[0].image
    key = lambda f: case_key(Case('p', f), TFMS)
    assert key(lambda: load_ct(path)) == key(lambda: CTVolume(load_ct(path).data, load_ct(path).geometry)) # called
    assert key(partial(_with_noise, path, 1)) != key(partial(_with_noise, path, 2))
    before = key(partial(_with_noise, path, 1))
    write_nifti(scan_and_mask(5)[0], path)
    assert key(partial(_with_noise, path, 1)) != before # the bytes behind the path


def test_prepared_equals_direct(tmp_path):
    cases = files_of(tmp_path)
    for c, p in zip(cases, prepare_cases(cases, TFMS, tmp_path/'cache').cases):
        ct, m = TFMS[1](TFMS[0]((load_ct(c.image), load_mask(c.mask))))
        got, labels = load_ct(p.image), load_mask(p.mask)
        assert np.abs(got.data-ct.data).max() <= .5 and got.data.dtype == np.int16
        assert np.array_equal(labels.data, m.data) and labels.data.dtype == np.uint8
        assert got.geometry.matches(ct.geometry) and (p.patient, p.score) == (c.patient, c.score)


def test_maps_are_read_only_and_patches_read_little(tmp_path):
    g = Geometry.from_spacing((64, 512, 512), (1, 1, 1))
    big = CTVolume(np.zeros(g.shape, 'i2'), g)
    kept = prepare_cases([Case('p', big)], [], tmp_path/'cache').cases[0]
    fresh = pickle.loads(pickle.dumps(kept))
    ct = load_ct(fresh.image)
    assert not ct.data.flags.writeable and np.shares_memory(ct.data, fresh.image.subject.bytes_mapped)
    with pytest.raises(ValueError): ct.data[0, 0, 0] = 1
    if not Path('/proc/self/smaps').exists(): return
    tf.VolumeToTensor()(RandomCrop((16, 32, 32))(ct, split_idx=0))
    lines, inside, resident = Path('/proc/self/smaps').read_text().splitlines(), False, 0
    for l in lines:
        if '-' in l.split()[0] and ':' not in l.split()[0]: inside = l.endswith(fresh.image.subject.path.name)
        elif inside and l.startswith('Rss:'): resident += int(l.split()[1])*1024
    assert 0 < resident < big.data.nbytes/2


def _prepare_and_die(cases, home, after):
    def progress(n, total, text):
        if text == 'prepared' and n == after: os.kill(os.getpid(), signal.SIGKILL)
    prepare_cases(cases, TFMS, home, progress=progress)


@pytest.mark.parametrize('after', [1, 2])
def test_a_killed_preparation_goes_on(tmp_path, after):
    cases = files_of(tmp_path)
    child = mp.get_context('fork').Process(target=_prepare_and_die, args=(cases, tmp_path/'cache', after))
    child.start(); child.join()
    assert child.exitcode == -signal.SIGKILL
    done = prepare_cases(cases, TFMS, tmp_path/'cache')
    assert (done.made, len(done)) == (3-after, 3) and not check_store(tmp_path/'cache')


def _prepare_on_a_full_disk(cases, home, said):
    import resource
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
    try: prepare_cases(cases, [], home)
    except StoreError as e: said.put(e.code)


def test_a_full_disk_is_told(tmp_path):
    ctx, cases = mp.get_context('fork'), files_of(tmp_path)
    said = ctx.SimpleQueue()
    child = ctx.Process(target=_prepare_on_a_full_disk, args=(cases, tmp_path/'cache', said))
    child.start(); child.join(60)
    assert not said.empty() and said.get() == 'DISK'
    assert prepare_cases(cases, [], tmp_path/'cache').made == 3


def test_two_processes_prepare_the_same(tmp_path):
    cases = [*files_of(tmp_path), Case('gone', tmp_path/'none.nii')]
    cases.append(Case('here only', lambda: scan_and_mask(7)[0]))
    out = prepare_cases(cases, TFMS, tmp_path/'two', workers=2)
    assert (out.made, sorted(out.refused), out.refused[4].code) == (3, [3, 4], 'NOT_PICKLED')
    one = prepare_cases(cases, TFMS, tmp_path/'one')
    assert one.made == 4 and all(isinstance(e, JfrError) for e in one.refused.values())
    for a, b in zip(out.cases, one.cases): assert np.array_equal(load_ct(a.image).data, load_ct(b.image).data)


def test_cleaning_keeps_what_is_used(tmp_path):
    cases, home = files_of(tmp_path), tmp_path/'cache'
    old, new = prepare_cases(cases, TFMS, home), prepare_cases(cases, TFMS[:1], home)
    with StoreWriter(home) as w: w.add('mine', dict(ct=scan_and_mask(0)[0]))
    assert clean_cache(home, [*old.cases, *new.cases])[0] == 0
    assert clean_cache(home, new.cases)[0] == 3 and 'mine' in H5Store(home)
    assert prepare_cases(cases, TFMS[:1], home).made == 0
    assert not any('p1' in s for s in H5Store(home)) # names of patients stay out of the store
