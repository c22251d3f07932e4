"Agatston score of a whole synthetic chest, bones included, against scikit-image and SciPy: equal first, then timed."
import numpy as np

from jfr2020.calcium.score import AGATSTON, agatston, calcium_score
from jfr2020.synth.thorax import chest_phantom
from jfr2020.ground.volume import CTVolume, MaskVolume
from tools.bench import interleaved, table

LOW = 130 # HU


def weighted(areas, peaks, pixels): # whole pixels times weights of the lesions that are large enough
    areas, peaks = np.asarray(areas), np.asarray(peaks)
    keep = areas >= pixels
    return int((areas*(1 + np.searchsorted((200,300,400), peaks, side='right')))[keep].sum())


def skimage_loop(hu, mask, pixels):
    "The usual notebook: label and regionprops slice by slice"
    from skimage.measure import label, regionprops
    total = 0
    for d in range(len(hu)):
        found = regionprops(label((hu[d] >= LOW) & (mask[d] > 0), connectivity=2), intensity_image=hu[d])
        total += weighted([r.area for r in found], [r.intensity_max for r in found], pixels)
    return total


def skimage_table(hu, mask, pixels):
    "The same with regionprops_table, which builds no objects for the caller"
    from skimage.measure import label, regionprops_table
    total = 0
    for d in range(len(hu)):
        lab = label((hu[d] >= LOW) & (mask[d] > 0), connectivity=2)
        if lab.any():
            t = regionprops_table(lab, hu[d], properties=('area','intensity_max'))
            total += weighted(t['area'], t['intensity_max'], pixels)
    return total


def scipy_loop(hu, mask, pixels):
    "scipy.ndimage.label and its statistics, slice by slice"
    from scipy import ndimage as ndi
    total = 0
    for d in range(len(hu)):
        lab, n = ndi.label((hu[d] >= LOW) & (mask[d] > 0), np.ones((3,3)))
        if n: total += weighted(np.bincount(lab.ravel())[1:], ndi.maximum(hu[d], lab, np.arange(1, n+1)), pixels)
    return total


def scipy_tall(hu, mask, pixels):
    "All slices as one tall image with a blank row between them, one label call"
    from scipy import ndimage as ndi
    z,y,x = hu.shape
    tall = np.zeros((z, y+1, x), bool)
    np.logical_and(hu >= LOW, mask > 0, out=tall[:,:y])
    lab, n = ndi.label(tall.reshape(-1, x), np.ones((3,3)))
    lab = lab.reshape(z, y+1, x)[:,:y]
    here = lab > 0
    of, peaks = lab[here], np.full(n+1, -32768, 'i2')
    np.maximum.at(peaks, of, hu[here])
    return weighted(np.bincount(of, minlength=n+1)[1:], peaks[1:], pixels)


def compare(title, ct, mask, rounds, target=''):
    "One table: all methods on one scan and mask"
    hu, m, (dz,h,w) = ct.data, mask.data, ct.spacing
    pixels = AGATSTON.pixels(h*w)
    others = {'scikit-image label + regionprops, per slice': skimage_loop,
              'scikit-image regionprops_table, per slice': skimage_table,
              'scipy label + maximum, per slice': scipy_loop, 'scipy label, one tall image': scipy_tall}
    answers = {n: f(hu, m, pixels)*(h*w)*(dz/3) for n,f in others.items()}
    answers['ours'], whole = agatston(ct, mask), calcium_score(ct, mask)
    if len({*answers.values(), whole.agatston}) > 1: raise SystemExit(f'{title}: scores differ: {answers}')
    methods = {n: lambda f=f: f(hu, m, pixels) for n,f in others.items()}
    methods['ours: agatston, the number'] = lambda: agatston(ct, mask)
    methods['ours: calcium_score, with lesions and volumes'] = lambda: calcium_score(ct, mask)
    times = interleaved(methods, rounds)
    size, n = ' x '.join(map(str, ct.shape)), sum(l.voxels for l in whole.lesions)
    table(f'{title}, {size} int16, {n} voxels count, {len(whole.lesions)} lesions, equal scores',
          times, 'ours: agatston, the number', target)


def sixty(ct):
    "The first 60 slices"
    return CTVolume(np.ascontiguousarray(ct.data[:60]), ct[:60].geometry)


def main(rounds=5):
    case = chest_phantom(1, fov='chest', coverage=(-100,90), matrix=512, increment=3., agatston=400)
    ct = sixty(case.ct)
    everywhere = MaskVolume(np.ones(ct.shape, 'u1'), ct.geometry)
    compare('Whole synthetic chest', ct, everywhere, rounds, 'ours at least 3 x faster than the regionprops loop')
    start, stop = (np.array([ct.shape])*[[.1,.3,.3],[.9,.68,.68]]).astype(int)
    box = tuple(slice(*o) for o in zip(start, stop))
    inner = CTVolume(np.ascontiguousarray(ct.data[box]), ct[box].geometry)
    compare('Box in the middle of it', inner, everywhere[box], rounds)
    lesions = MaskVolume(case.lesions.data[:60], ct.geometry)
    compare('Its coronary lesions only, mask on the whole grid', ct, lesions, rounds)


if __name__ == '__main__': main()
