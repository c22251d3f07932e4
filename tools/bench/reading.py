"From a folder of DICOM files to a volume in HU, whole: ours beside SimpleITK and pydicom; equal first, then timed, then peak memory."
import ctypes, gc, os, tempfile, time
from pathlib import Path

import numpy as np
import pydicom

from jfr2020.ground.geometry import Geometry
from jfr2020.dicom.reading import read_series
from jfr2020.dicom.series import find_series
from jfr2020.dicom.writing import Protocol, write_series
from jfr2020.ground.volume import OUTSIDE, CTVolume
from tools.bench import interleaved, table
from tools.bench.index import like_a_scanner


def scan(slices, size=512):
    "A synthetic body in the circle of a scanner, with noise that packs like a CT's"
    rng, line = np.random.default_rng(0), np.linspace(-1, 1, size, dtype='f4')
    y, x = line[:, None], line[None]
    body = np.where((x/.88)**2+(y/.66)**2 < 1, np.float32(40), np.float32(-1000))
    for side in (-1, 1): body[((x-side*.42)/.3)**2+(y/.44)**2 < 1] = -860
    out = np.empty((slices, size, size), 'i2')
    for hu in out:
        hu[:] = np.rint(body + rng.normal(0, 12, body.shape)).clip(OUTSIDE, 3071)
        hu[np.hypot(x, y) > 1] = OUTSIDE
    return CTVolume(out, Geometry.from_spacing(out.shape, (3, .4, .4)))


def ours(folder, workers=None):
    "All that `jfr2020` does: walk the folder, read and check every header, read the pixels"
    return read_series(find_series(folder)[0].series, workers).data


def raw(series):
    "The limit: the bytes of the pixels, from files and offsets that are known, into a new volume"
    out = np.empty(series.geometry.shape, 'i2')
    for v,h in zip(out, series.headers):
        fd = os.open(h.path, os.O_RDONLY)
        os.preadv(fd, [v], h.offset)
        os.close(fd)
    return out


def sitk_array(folder):
    "As its users do: names sorted by GDCM, ImageSeriesReader, an array of their own"
    import SimpleITK as sitk
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder)))
    return sitk.GetArrayFromImage(reader.Execute())


def sitk_least(names):
    "The least it can do: names given in order, no checks, the array not copied"
    import SimpleITK as sitk
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(names)
    image = reader.Execute()
    return image, sitk.GetArrayViewFromImage(image) # the view needs its image


def naive(folder):
    "The usual notebook: dcmread, sort by position, rescale in float64, stack"
    slices = sorted((pydicom.dcmread(p) for p in Path(folder).iterdir()), key=lambda s: float(s.ImagePositionPatient[2]))
    return np.stack([s.pixel_array*float(s.RescaleSlope)+float(s.RescaleIntercept) for s in slices])


def check(name, out, ct):
    "Raise unless `out` holds the HU that were written"
    values = out[1] if isinstance(out, tuple) else out.data if isinstance(out, CTVolume) else out
    if not np.array_equal(values, ct.data): raise ValueError(f'{name} differs from what was written')


def peak_mib(f):
    "MiB that `f` needs at most beyond what is there before"
    gc.collect()
    try: ctypes.CDLL('libc.so.6').malloc_trim(0)
    except OSError: pass
    at = lambda k: next(int(l.split()[1]) for l in Path('/proc/self/status').read_text().splitlines() if l.startswith(k))/1024
    Path('/proc/self/clear_refs').write_text('5')
    before, out = at('VmRSS'), f()
    return at('VmHWM') - before, out


def processor(title, methods, base, rounds=3):
    "Print the least processor time of each method: what is left of a ratio when other work shares the machine"
    least = {}
    for _ in range(rounds):
        for name,f in methods.items():
            gc.collect()
            t = time.process_time(); f(); t = time.process_time()-t
            least[name] = min(t, least.get(name, t))
    print(f'\nprocessor time, {title}')
    for name,t in least.items(): print(f'{name:44}{t*1e3:11.2f} ms{t/least[base]:12.2f} x')


def memory(title, methods, volume_mib, target):
    "Print the peak of each method as a ratio to the int16 volume"
    print(f'\npeak memory, {title}, volume {volume_mib:.0f} MiB')
    for name,f in methods.items(): print(f'{name:44}{(m := peak_mib(f)[0]):11.1f} MiB{m/volume_mib:10.2f} x volume')
    print(f'asked: {target}')


def plain(folder, slices, rounds):
    ct = scan(slices)
    write_series(ct, folder, edit=like_a_scanner)
    series = find_series(folder)[0].series
    names = [str(p) for p in series.files]
    methods = {'limit: the bytes alone': lambda: raw(series), 'jfr2020: folder to volume': lambda: ours(folder),
        'jfr2020: headers and checks alone': lambda: find_series(folder), 'jfr2020: pixels alone': lambda: read_series(series),
        'SimpleITK: folder to volume': lambda: sitk_array(folder), 'SimpleITK: names given, array not copied': lambda: sitk_least(names),
        'pydicom, the usual way (float64)': lambda: naive(folder)}
    for n,f in methods.items():
        if 'headers' in n or 'limit' in n: continue
        check(n, f(), ct)
    title = f'{slices} x 512 x 512, explicit little endian'
    table(title, interleaved(methods, rounds), 'jfr2020: folder to volume',
          'SimpleITK >= 8 and the limit >= 0.40 (2.5 x faster at most); page cache warm')
    processor(title, methods, 'jfr2020: folder to volume')
    mib = ct.data.nbytes/2**20
    del ct
    memory(title, {n: f for n,f in methods.items() if 'alone' not in n and 'given' not in n}, mib, 'jfr2020 <= 1.1')


def packed(folder, syntax, slices=24, rounds=5):
    ct, threads = scan(slices), os.cpu_count()
    series = find_series(write_series(ct, folder, Protocol(syntax=syntax), edit=like_a_scanner)[0].parent)[0].series
    size = sum(p.stat().st_size for p in series.files)
    methods = {f'jfr2020: folder to volume, {threads} threads': lambda: ours(folder), 'jfr2020: folder to volume, 1 thread': lambda: ours(folder, 1),
        'pydicom and its plugins (float64)': lambda: naive(folder), 'SimpleITK: folder to volume': lambda: sitk_array(folder)}
    for n,f in methods.items(): check(n, f(), ct)
    table(f'{syntax}, {slices} x 512 x 512, packed {ct.data.nbytes/size:.2f} times', interleaved(methods, rounds), next(iter(methods)),
          'pydicom >= 1.7 on two free cores')


def main():
    with tempfile.TemporaryDirectory() as tmp:
        plain(Path(tmp)/'60', 60, 7)
        plain(Path(tmp)/'400', 400, 3)
        for syntax in ('rle', 'jpegls', 'j2k'): packed(Path(tmp)/syntax, syntax)
