"A synthetic series with an Agatston score of exactly 207.0, and every way known to us of damaging it."
import hashlib
import shutil
from pathlib import Path

import numpy as np
import pydicom

from jfr2020.ground.geometry import Geometry
from jfr2020.dicom.writing import Protocol, write_series
from jfr2020.ground.volume import CTVolume, MaskVolume

DISCS = dict(LAD=(2, 8, 30, 40, 3, 420), LCX=(3, 12, 50, 60, 4, 310), RCA=(4, 15, 60, 30, 2, 180)) # label, z, y, x, radius px, HU
SLICES, SIZE, SCORE = 24, 96, 207.
GRID = Geometry.from_spacing((SLICES, SIZE, SIZE), (3, .5, .5), centre=(0, 0, 34.5)) # slice k at z = 3 k mm


def volume(seed=0, grid=GRID):
    "(HU, labels): a body of 40 +- 12 HU in air, three discs of constant HU on three slices each"
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIZE, :SIZE]
    hu, mask = np.full(grid.shape, -1000, 'i2'), np.zeros(grid.shape, 'u1')
    body = np.hypot(y-(SIZE-1)/2, x-(SIZE-1)/2) <= .47*SIZE
    hu[:, body] = np.rint(rng.normal(40, 12, (grid.shape[0], int(body.sum())))).clip(-20, 100)
    for label, cz, cy, cx, r, value in DISCS.values():
        disc = (y-cy)**2 + (x-cx)**2 <= r*r
        hu[cz-1:cz+2, disc], mask[cz-1:cz+2, disc] = value, label
    return CTVolume(hu, grid), MaskVolume(mask, grid)


def edit(path, change):
    "Rewrite one file after `change(data set)`"
    ds = pydicom.dcmread(path)
    change(ds)
    ds.save_as(path, enforce_file_format=True)


def put(**tags):
    "A change that sets attributes; None deletes"
    def change(ds):
        for k, v in tags.items():
            if v is None: delattr(ds, k)
            else: setattr(ds, k, v)
    return change


def every(paths, change): [edit(p, change) for p in paths]


def copy(path, name, **tags):
    new = path.with_name(name)
    shutil.copy(path, new)
    edit(new, put(**tags))
    return new


def inner(rng): return int(rng.integers(2, SLICES-2))


# damage: (paths in slice order, rng) -> None
def missing_slice(p, rng): p[inner(rng)].unlink()
def missing_block(p, rng): [q.unlink() for q in p[10:13]]
def dup_file(p, rng): shutil.copy(p[inner(rng)], p[0].with_name('copy.dcm'))
def dup_pos_new_uid(p, rng): copy(p[inner(rng)], 'again.dcm', SOPInstanceUID='1.2.3.4.5')
def two_patients(p, rng): every(p[inner(rng):], put(PatientID='OTHER', PatientName='OTHER^ONE'))
def two_studies(p, rng): every(p[inner(rng):], put(StudyInstanceUID='1.2.3.4'))
def two_frames(p, rng): every(p[inner(rng):], put(FrameOfReferenceUID='1.2.3.4'))
def two_kernels(p, rng): every(p[inner(rng):], put(ConvolutionKernel='B70f'))
def two_voltages(p, rng): every(p[inner(rng):], put(KVP='100'))
def contrast_half(p, rng): every(p[inner(rng):], put(ContrastBolusAgent='AGENT'))
def two_phases(p, rng): [copy(q, f'phase{i}.dcm', SOPInstanceUID=f'1.2.3.{i}') for i, q in enumerate(p)]
def localizer(p, rng): copy(p[inner(rng)], 'scout.dcm', SOPInstanceUID='1.2.9', ImageType=['ORIGINAL', 'PRIMARY', 'LOCALIZER'])
def only_localizer(p, rng): every(p, put(ImageType=['ORIGINAL', 'PRIMARY', 'LOCALIZER']))
def no_slope(p, rng): every(p, put(RescaleSlope=None))
def no_intercept(p, rng): every(p, put(RescaleIntercept=None))
def one_without_rescale(p, rng): edit(p[inner(rng)], put(RescaleSlope=None, RescaleIntercept=None))
def rescale_varies(p, rng): edit(p[inner(rng)], put(RescaleIntercept='0'))
def rescale_varies_little(p, rng): edit(p[inner(rng)], put(RescaleIntercept='-1000'))
def slope_varies(p, rng): edit(p[inner(rng)], put(RescaleSlope='1.5'))
def slope_zero(p, rng): every(p, put(RescaleSlope='0'))
def slope_huge(p, rng): every(p, put(RescaleSlope='1e308'))
def not_hu(p, rng): every(p, put(RescaleType='US'))
def no_ipp(p, rng): every(p, put(ImagePositionPatient=None))
def one_no_ipp(p, rng): edit(p[inner(rng)], put(ImagePositionPatient=None))
def no_orientation(p, rng): every(p, put(ImageOrientationPatient=None))
def no_pixelspacing(p, rng): every(p, put(PixelSpacing=None))
def zero_spacing(p, rng): every(p, put(PixelSpacing=[0, 0]))
def negative_spacing(p, rng): every(p, put(PixelSpacing=[-.5, .5]))
def nan_spacing(p, rng): every(p, lambda ds: _text(ds, 'PixelSpacing', b'nan\\nan '))
def nan_position(p, rng): edit(p[inner(rng)], lambda ds: _text(ds, 'ImagePositionPatient', b'0\\0\\nan'))
def pixelspacing_varies(p, rng): edit(p[inner(rng)], put(PixelSpacing=[.6, .6]))
def orientation_varies(p, rng): edit(p[inner(rng)], put(ImageOrientationPatient=[0, 1, 0, -1, 0, 0]))
def orientation_skewed(p, rng): every(p, put(ImageOrientationPatient=[1, 0, 0, .5, .5, 0]))
def coronal(p, rng): [edit(q, put(ImageOrientationPatient=[1, 0, 0, 0, 0, -1], ImagePositionPatient=[0, 3*i, 0])) for i, q in enumerate(p)]
def uneven(p, rng): [edit(q, put(ImagePositionPatient=[0, 0, 3*i+.4*(i > 11)])) for i, q in enumerate(p)]
def shifted(p, rng): edit(p[k := inner(rng)], put(ImagePositionPatient=[5, 0, 3*k]))
def tilt_tag(p, rng): every(p, put(GantryDetectorTilt='15'))
def truncated_pixels(p, rng): _cut(p[inner(rng)], lambda n: n - int(rng.integers(1, 9000)))
def truncated_header(p, rng): _cut(p[inner(rng)], lambda n: int(rng.integers(133, 900)))
def truncated_preamble(p, rng): _cut(p[inner(rng)], lambda n: int(rng.integers(1, 132)))
def zero_byte(p, rng): _cut(p[inner(rng)], lambda n: 0)
def zero_byte_last(p, rng): _cut(p[-1], lambda n: 0)
def rows_mismatch(p, rng): edit(p[inner(rng)], lambda ds: put(Rows=48, PixelData=ds.PixelData[:len(ds.PixelData)//2])(ds))
def rows_lie(p, rng): every(p, put(Rows=95))
def bits_differ(p, rng): edit(p[inner(rng)], put(BitsStored=16, HighBit=15))
def colour(p, rng): every(p, put(SamplesPerPixel=3, PhotometricInterpretation='RGB'))
def inverted(p, rng): every(p, lambda ds: put(PhotometricInterpretation='MONOCHROME1', PixelData=(4095-np.frombuffer(
    ds.PixelData, '<u2')).astype('<u2').tobytes())(ds))
def modality_mr(p, rng): every(p, put(Modality='MR'))
def one_mr(p, rng): edit(p[inner(rng)], put(Modality='MR'))
def reformat(p, rng): every(p, put(ImageType=['DERIVED', 'SECONDARY', 'REFORMATTED', 'AVERAGE']))
def capture(p, rng): every(p, put(SOPClassUID='1.2.840.10008.5.1.4.1.1.7'))
def no_pixels(p, rng): every(p, put(PixelData=None))
def too_few(p, rng): [q.unlink() for q in p[2:]]
def bad_number(p, rng): every(p, lambda ds: _text(ds, 'RescaleIntercept', b'-1O24 '))
def bitflip_manifest(p, rng): _flip(p, rng, 1)
def zeroed_manifest(p, rng): _flip(p, rng, 64)
def missing_last_manifest(p, rng): _manifest(p); p[-1].unlink()


def gantry_tilt(p, rng):
    "15 degrees: the orientation leans, the table moves along z"
    c, s = np.cos(np.radians(15)), np.sin(np.radians(15))
    for i, q in enumerate(p): edit(q, put(ImageOrientationPatient=[1, 0, 0, 0, float(c), float(s)], ImagePositionPatient=[0, 0, 3*i]))


def unknown_syntax(p, rng):
    for q in p:
        b = q.read_bytes()
        q.write_bytes(b.replace(b'1.2.840.10008.1.2.1\0', b'1.2.840.10008.9.9.9\0', 1))


def _text(ds, keyword, raw): # a value that pydicom would not write
    ds._dict[pydicom.tag.Tag(keyword)] = pydicom.dataelem.RawDataElement(pydicom.tag.Tag(keyword), 'DS', len(raw), raw, 0, False, True)


def _cut(path, size): path.write_bytes(path.read_bytes()[:max(0, size(path.stat().st_size))])


def _manifest(p):
    (p[0].parent/'manifest.sha256').write_text(''.join(f'{hashlib.sha256(q.read_bytes()).hexdigest()}  {q.name}\n' for q in p))


def _flip(p, rng, n):
    _manifest(p)
    path, at = p[inner(rng)], int(rng.integers(1200, 9000))
    b = bytearray(path.read_bytes())
    b[-at:-at+n] = bytes([b[-at] ^ 4]) if n == 1 else bytes(n)
    path.write_bytes(b)


# what stays right
def ok(p, rng): pass
def text_named_dcm(p, rng): (p[0].parent/'notes.dcm').write_text('a text, whatever its name says')
def no_meta(p, rng): [q.write_bytes(q.read_bytes()[_after_meta(q):]) for q in p]
def shuffled_numbers(p, rng): [edit(q, put(InstanceNumber=int(n))) for q, n in zip(p, rng.permutation(len(p))+1)]
def reversed_numbers(p, rng): [edit(q, put(InstanceNumber=len(p)-i)) for i, q in enumerate(p)]
def absent_numbers(p, rng): every(p, put(InstanceNumber=None))
def shuffled_names(p, rng): [q.rename(q.with_name(f'{n:08d}')) for q, n in zip(p, rng.permutation(len(p)))]
def other_files(p, rng): [(p[0].parent/n).write_bytes(b'x'*500) for n in ('LICENSE', 'viewer.exe', '._hidden.dcm')]
def empty_marker(p, rng): (p[0].parent/'COMPLETE.txt').touch()
def with_manifest(p, rng): _manifest(p)
def monochrome1(p, rng): every(p, put(PhotometricInterpretation='MONOCHROME1'))
def numbers_jump(p, rng): [edit(q, put(InstanceNumber=i+1+5*(i > 11))) for i, q in enumerate(p)]
def program_preamble(p, rng): p[3].write_bytes(b'MZ' + p[3].read_bytes()[2:])
def thick(p, rng): every(p, put(SliceThickness='6'))
def thin(p, rng): every(p, put(SliceThickness='1'))
def derived(p, rng): every(p, put(ImageType=['DERIVED', 'PRIMARY', 'AXIAL']))


def rescale_followed(p, rng):
    "Each slice its own intercept, and the stored values follow it"
    for i, q in enumerate(p):
        ds = pydicom.dcmread(q)
        stored = np.frombuffer(ds.PixelData, '<u2').astype(int) + 7*(i % 5)
        edit(q, put(RescaleIntercept=str(-1024-7*(i % 5)), PixelData=stored.astype('<u2').tobytes()))


def _after_meta(path):
    b = path.read_bytes()
    return 144 + int.from_bytes(b[140:144], 'little')


REFUSED = dict(
    missing_slice='MISSING_SLICE', missing_block='MISSING_SLICE', dup_file='DUPLICATE_POSITION', dup_pos_new_uid='DUPLICATE_POSITION',
    two_patients='MIXED_PATIENTS', two_studies='VARIES_StudyInstanceUID', two_frames='VARIES_FrameOfReferenceUID',
    two_kernels='VARIES_ConvolutionKernel', two_voltages='VARIES_KVP', contrast_half='VARIES_ContrastBolusAgent',
    two_phases='MULTIPLE_PHASES', localizer='LOCALIZER', only_localizer='LOCALIZER', no_slope='MISSING_RescaleSlope',
    no_intercept='MISSING_RescaleIntercept', one_without_rescale='MISSING_RescaleSlope', rescale_varies='VARIES_RescaleIntercept',
    rescale_varies_little='VARIES_RescaleIntercept', slope_varies='VARIES_RescaleSlope', slope_zero='SLOPE_RANGE',
    slope_huge='SLOPE_RANGE', not_hu='RESCALE_TYPE', no_ipp='MISSING_ImagePositionPatient', one_no_ipp='MISSING_ImagePositionPatient',
    no_orientation='MISSING_ImageOrientationPatient', no_pixelspacing='MISSING_PixelSpacing', zero_spacing='SPACING_RANGE',
    negative_spacing='SPACING_RANGE', nan_spacing='SPACING_RANGE', nan_position='POSITION_RANGE',
    pixelspacing_varies='VARIES_PixelSpacing', orientation_varies='VARIES_ImageOrientationPatient', orientation_skewed='ORIENTATION',
    coronal='REFORMAT', uneven='UNEVEN_SPACING', shifted='SHIFTED', gantry_tilt='GANTRY_TILT', tilt_tag='GANTRY_TILT',
    truncated_pixels='TRUNCATED', truncated_header='TRUNCATED', truncated_preamble='UNREADABLE', zero_byte='UNREADABLE',
    zero_byte_last='UNREADABLE', rows_mismatch='VARIES_Rows', rows_lie='PIXEL_LENGTH', bits_differ='VARIES_BitsStored',
    colour='PHOTOMETRIC', inverted='PHOTOMETRIC', modality_mr='NOT_CT', one_mr='NOT_CT', reformat='REFORMAT',
    capture='SECONDARY_CAPTURE', no_pixels='NO_PIXELS', too_few='TOO_FEW_SLICES', bad_number='MISSING_RescaleIntercept',
    unknown_syntax='UNSUPPORTED_SYNTAX', bitflip_manifest='CHECKSUM', zeroed_manifest='CHECKSUM', missing_last_manifest='MISSING_FILE')

ACCEPTED = dict(ok='', text_named_dcm='', no_meta='', shuffled_numbers='', reversed_numbers='', absent_numbers='', shuffled_names='',
    other_files='', empty_marker='', with_manifest='', monochrome1='PHOTOMETRIC', numbers_jump='INSTANCE_JUMP',
    program_preamble='PREAMBLE', thick='OVERLAP', thin='GAP', derived='DERIVED', rescale_followed='RESCALE_PER_SLICE') # finding


def damaged(folder, case, seed):
    "Write the fixture into `folder`, do `case` to it, and return the truth (HU, labels)"
    ct, mask = volume(seed)
    paths = write_series(ct, Path(folder), Protocol(description='fixture'), seed=seed)
    globals()[case](paths, np.random.default_rng(seed))
    return ct, mask
