"The store beside npy, h5py as it is usually used, and compressed chunks: equal first, then timed; one thread."
import os, resource, shutil, subprocess, sys, tempfile, time
from pathlib import Path
from statistics import median

import h5py
import numpy as np

from jfr2020.synth.dwi import dwi_phantom
from jfr2020.datasets.synthetic_dwi import LARGE_HEAD, write_dwi_cohort
from jfr2020.store.hdf5 import H5Store, StoreWriter
from tools.bench import interleaved, table
from tools.bench.reading import memory, scan

PATCH, DWI_ML_CREATE, DWI_ML_LINES = 96, 10.2, 20. # voxels a side; CPU-s and ms that dwi_ml took on such a machine


def same(name, a, b): # equality comes before speed
    if not np.array_equal(a, b): raise SystemExit(f'{name} differs')


def touched(a): # every number of an array, read
    return int(a.reshape(-1).view(np.uint64).sum())


def by_h5py(path, at): # whole data set
    with h5py.File(path, locking=False) as f: return f[at][:]


def whole(npy, store, name, a, rounds):
    "A whole volume, opened anew each time unless said"
    np.save(npy, a)
    kept = H5Store(store)
    ram = {'np.load': lambda: np.load(npy), 'store opened anew, into RAM': lambda: H5Store(store)['large'].volume(name, mmap=False).data,
           'store kept open, into RAM': lambda: kept['large'].volume(name, mmap=False).data,
           'h5py': lambda: by_h5py(kept['large'].path, f'volumes/{name}')}
    maps = {'np.load, mapped, summed': lambda: touched(np.load(npy, mmap_mode='r')),
            'store opened anew, mapped, summed': lambda: touched(H5Store(store)['large'].volume(name).data),
            'store kept open, mapped, summed': lambda: touched(kept['large'].volume(name).data)}
    for n,f in ram.items(): same(n, f(), a)
    for n,f in maps.items(): same(n, f(), touched(a))
    same('mapped', kept['large'].volume(name).data, a)
    size = f'{name} {" x ".join(map(str, a.shape))} {a.dtype}, {a.nbytes/1e6:.0f} MB'
    table(f'Whole volume into RAM, {size}', interleaved(ram, rounds), 'np.load', 'store at most 1.2 x np.load')
    table(f'Whole volume mapped and summed, {size}', interleaved(maps, rounds), 'np.load, mapped, summed', 'store at most 1.2 x np.load')


def as_dwi_ml(h5, ids): # a loop of three reads for each line
    with h5py.File(h5, locking=False) as f:
        g = f['streamlines/lines']
        out = []
        for i in ids:
            a, b = g['offsets'][i], g['offsets'][i+1]
            out.append(g['points'][a:b])
        return np.concatenate(out)


def lines(store, case, rounds):
    "100 random lines of a tractogram"
    rng, s = np.random.default_rng(1), case.streamlines
    kept = H5Store(store)['large'].streamlines('lines')
    path, sets = H5Store(store)['large'].path, [rng.choice(len(s), 100, replace=False) for _ in range(8)]
    every = lambda f: lambda: [f(ids) for ids in sets]
    methods = {'store kept open, [ids]': every(lambda ids: kept[ids].points),
               'store opened anew, [ids]': every(lambda ids: H5Store(store)['large'].streamlines('lines')[ids].points),
               'h5py, three reads a line': every(lambda ids: as_dwi_ml(path, ids)),
               'in memory, [ids]': every(lambda ids: s[ids].points)}
    for n,f in methods.items():
        for got,ids in zip(f(), sets): same(n, got, s[ids].points)
    times = {n: [t/len(sets) for t in ts] for n,ts in interleaved(methods, rounds).items()}
    table(f'100 random lines of {len(s)} ({len(s.points)} points), a batch', times, 'store kept open, [ids]',
          f'at most 2 ms; dwi_ml, measured on such a machine, {DWI_ML_LINES:.0f} ms')
    mine = median(times['store kept open, [ids]'])*1e3
    print(f'100 lines: {mine:.2f} ms, {DWI_ML_LINES/mine:.0f} x faster than the 20 ms of dwi_ml')


def patches(folder, ct, rounds, n=20):
    "Random cubes of a CT that are copied out, from files that stay open"
    rng = np.random.default_rng(2)
    at = [tuple(slice(o, o+PATCH) for o in rng.integers(0, np.array(ct.shape)-PATCH+1)) for _ in range(n)]
    store = folder/'patches'
    with StoreWriter(store) as w:
        for s in ('contiguous', 'gzip', 'bitshuffle-zstd'): w.add(s, dict(ct=(ct, dict(storage=s))))
    st, npy = H5Store(store), folder/'patch.npy'
    np.save(npy, ct.data)
    mapped, flat = st['contiguous'].volume('ct').data, np.load(npy, mmap_mode='r')
    sets = {s: st[s].h5['volumes/ct'] for s in ('contiguous', 'gzip', 'bitshuffle-zstd')}
    take = lambda a: lambda: [np.ascontiguousarray(a[i]) for i in at]
    methods = {'store, mapped': take(mapped), 'npy, mapped': take(flat), 'h5py slices, contiguous': take(sets['contiguous']),
               'h5py slices, bitshuffle-zstd': take(sets['bitshuffle-zstd']), 'h5py slices, gzip': take(sets['gzip'])}
    for name,f in methods.items():
        for got,i in zip(f(), at): same(name, got, ct.data[i])
    times = interleaved(methods, rounds)
    table(f'{n} random {PATCH}^3 patches of {" x ".join(map(str, ct.shape))} int16', times, 'store, mapped', 'npy >= 0.9, h5py slices >= 2, gzip >= 60')
    print('patches/s: ' + ', '.join(f'{name} {n/median(t):.0f}' for name,t in times.items()))
    return store


def storage(folder, ct, case, rounds=3):
    "What each way of storing costs and saves"
    print(f'\nstorage, median of {rounds}: written with hashes, flushed to the disk and renamed; read whole, page cache warm')
    print(f'{"volume":10}{"storage":20}{"ratio":>8}{"write MB/s":>12}{"read MB/s":>12}')
    for name,v in (('ct', ct), ('sh', case.sh)):
        times = {}
        for r in range(rounds):
            for s in ('contiguous', 'gzip', 'bitshuffle-zstd'):
                t = time.perf_counter()
                with StoreWriter(folder/f'way-{name}') as w: w.add(s, dict(v=(v, dict(storage=s))), overwrite=True)
                wrote = time.perf_counter()-t
                t = time.perf_counter()
                got = H5Store(folder/f'way-{name}')[s].volume('v', mmap=False).data
                times.setdefault(s, []).append((wrote, time.perf_counter()-t))
                if not r: same(s, got, v.data)
                del got
        for s,ts in times.items():
            size = H5Store(folder/f'way-{name}')[s].path.stat().st_size
            wrote, read = (median(c)/v.data.nbytes*1e6 for c in zip(*ts))
            print(f'{name:10}{s:20}{v.data.nbytes/size:8.2f}{1/wrote:12.0f}{1/read:12.0f}')


CREATE = '''import resource, sys
from pathlib import Path
from jfr2020.store.create import create_store
from jfr2020.store.config import load_store_config
home = Path(sys.argv[1])
lists = {k: home/f'{k}.txt' for k in ('training', 'validation', 'testing')}
made = create_store(load_store_config(home/'config.json'), home, Path(sys.argv[2]), lists, workers=int(sys.argv[3]))
own = [int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM')]
print(max(*own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(len(made.done) != 3)
'''


USUAL = """import sys
from pathlib import Path
import h5py, nibabel as nib, numpy as np
home, out = Path(sys.argv[1]), sys.argv[2]
with h5py.File(out, 'w') as f:
    for sub in sorted(p for p in (home/'dwi_ml_ready').iterdir()):
        mask = np.asanyarray(nib.load(sub/'masks/brain.nii.gz').dataobj) > 0
        for group, file in (('input', 'dwi/sh'), ('wm_mask', 'masks/wm'), ('seed_mask', 'masks/interface')):
            img = nib.load(sub/f'{file}.nii.gz')
            a = img.get_fdata(dtype=np.float32)
            a = a.reshape(*a.shape[:3], -1)
            if group == 'input': a = (a-a[mask].mean())/max(a[mask].std(), 1e-6)
            f.create_dataset(f'{sub.name}/{group}/data', data=a)
        t = nib.streamlines.load(sub/'tractograms/whole.trk')
        s = t.streamlines
        g = f.create_group(f'{sub.name}/streamlines')
        g['data'], g['offsets'], g['lengths'] = s.get_data(), s._offsets, s._lengths
        g['euclidean_lengths'] = np.array([np.linalg.norm(np.diff(p, axis=0), axis=1).sum() for p in s], 'f4')
        for k, v in t.tractogram.data_per_streamline.items(): g[f'data_per_streamline/{k}'] = v
own = [int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM')]
print(*own)
"""


def spend(code, *arguments): # -> CPU-s, wall s, MiB of the largest process
    before, t = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, '-c', code, *map(str, arguments)], check=True, capture_output=True)
    wall, after = time.perf_counter()-t, resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime+after.ru_stime-before.ru_utime-before.ru_stime, wall, int(done.stdout)/1024


def as_double(path): # the files of dwi_ml's figure hold float64 with all bits in use: twice the bytes to unpack
    import nibabel as nib
    img = nib.load(path)
    nib.save(nib.Nifti1Image(np.asarray(img.dataobj, float)/3, img.affine), path)


def creation(folder, rounds):
    "Three full-size subjects from NIfTI (harmonics in float64) and trk to a store, as a command of its own"
    write_dwi_cohort(folder/'cohort', 3, seed=2024, **LARGE_HEAD)
    for path in (folder/'cohort').rglob('sh.nii.gz'): as_double(path)
    spent, out = {}, folder/'made'
    for _ in range(rounds):
        for name,code,more in (('store, one process', CREATE, ('1',)), ('store, two processes', CREATE, ('2',)),
                               ('nibabel and h5py, no checks, hashes or flush', USUAL, ())):
            spent.setdefault(name, []).append(spend(code, folder/'cohort', out, *more))
            size = sum(p.stat().st_size for p in out.rglob('*') if p.is_file()) if out.is_dir() else out.stat().st_size
            if out.is_dir(): shutil.rmtree(out)
            else: out.unlink()
    print(f'\ncreation of 3 subjects, {LARGE_HEAD["n_lines"]} lines and 45 channels each, {size/1e6:.0f} MB, import of Python included')
    print(f'{"":48}{"CPU-s median":>14}{"min":>8}{"wall s":>8}{"of 10.2":>9}{"largest process MiB":>21}')
    for name,ts in spent.items():
        cpu = [t[0] for t in ts]
        print(f'{name:48}{median(cpu):14.2f}{min(cpu):8.2f}{median(t[1] for t in ts):8.2f}{median(cpu)/DWI_ML_CREATE:9.2f}{max(t[2] for t in ts):21.0f}')
    print(f'asked: at most half of the {DWI_ML_CREATE} CPU-s that dwi_ml took for the same data on such a machine (idle); it needed 576 MiB')


def main(rounds=7):
    case, ct = dwi_phantom(seed=2024, **LARGE_HEAD), scan(192, 320)
    with tempfile.TemporaryDirectory(dir=os.environ.get('BENCH_TMP')) as d:
        folder, store = Path(d), Path(d)/'store'
        with StoreWriter(store) as w: w.add('large', dict(sh=case.sh, ct=ct), dict(lines=case.streamlines))
        for name,v in (('sh', case.sh), ('ct', ct)): whole(folder/f'{name}.npy', store, name, v.data, rounds)
        lines(store, case, rounds)
        patches(folder, ct, rounds)
        storage(folder, ct, case)
        mib = case.sh.data.nbytes/2**20
        memory('one volume of harmonics', {'np.load': lambda: np.load(folder/'sh.npy'),
               'store, into RAM': lambda: H5Store(store)['large'].volume('sh', mmap=False),
               'store, mapped, one slice': lambda: H5Store(store)['large'].volume('sh').data[30].copy()}, mib, 'store into RAM as np.load, mapped below 0.1')
        creation(folder, 3)


if __name__ == '__main__': main()
