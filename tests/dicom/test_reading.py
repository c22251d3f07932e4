"One definition of HU, many ways to store it: whatever the coding, the volume is the same, or the series is refused."
import os, subprocess, sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.encaps import encapsulate, generate_frames
from pydicom.pixels import pixel_array

import jfr2020.dicom.reading as reader
from jfr2020.ground.errors import DicomSeriesError, JfrError
from jfr2020.ground.geometry import Geometry, lps2ras
from jfr2020.dicom.reading import get_dicom_series, pixel_findings, read_series
from jfr2020.dicom.series import find_series
from jfr2020.dicom.writing import SYNTAX_UIDS, Protocol, Storage, write_series
from jfr2020.ground.volume import OUTSIDE, CTVolume, check_landmark

from tests.dicom.enhanced import write_enhanced

SHARED = Path(__file__).resolve().parents[3]/'shared'/'data'
CORNERSTONE = SHARED/'dicom_edge'/'cornerstone_same_ct_all_transfer_syntaxes'


def scan(seed=0, shape=(4, 40, 48), low=-1024, high=3071):
    "Noise between `low` and `high` HU, both of them present"
    a = np.random.default_rng(seed).integers(low, high, shape, endpoint=True).astype('i2')
    a[0, 0, :2] = low, high
    return CTVolume(a, Geometry.from_spacing(shape, (3, .5, .4), centre=(10, -20, 30)))


def only(folder, fewest=3):
    "The one series of a folder, or its refusal raised"
    entries = find_series(folder, fewest=fewest)
    assert len(entries) == 1
    if entries[0].refusal: raise entries[0].refusal
    return entries[0].series


def definition(words, ds):
    "HU of one slice, written down independently: each bit, sign and padding by hand in Python integers and float64"
    bits, shift = ds.BitsStored, ds.HighBit+1-ds.BitsStored
    stored = words.astype(object) if words.dtype.itemsize > 4 else words.astype(np.int64)
    stored = np.floor_divide(stored, 2**shift) % 2**bits
    if ds.PixelRepresentation: stored = np.where(stored >= 2**(bits-1), stored - 2**bits, stored)
    hu = stored*float(ds.RescaleSlope) + float(ds.RescaleIntercept)
    if isinstance(pad := ds.get('PixelPaddingValue'), int):
        ends = [pad, ds.get('PixelPaddingRangeLimit') or pad]
        if ds.PixelRepresentation: ends = [e-65536 if e > 32767 else e for e in ends]
        hu = np.where((stored >= min(ends)) & (stored <= max(ends)), OUTSIDE, hu)
    return np.maximum(hu, OUTSIDE).astype(float)


def decoded(ds):
    "Words of a slice by pydicom; JPEG Lossless, for which it has no permissive decoder, by another one than the reader's"
    if ds.file_meta.TransferSyntaxUID != SYNTAX_UIDS['jpegll']: return pixel_array(ds, raw=True, correct_unused_bits=False)
    return pytest.importorskip('imagecodecs').ljpeg_decode(next(generate_frames(ds.PixelData, number_of_frames=1)))


def by_pydicom(files):
    "(volume, affine) of single-slice files, by pydicom, sorted along the normal"
    rows = []
    for p in files:
        ds = pydicom.dcmread(p, force=True)
        if 'TransferSyntaxUID' not in ds.file_meta: ds.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
        o = np.array(ds.ImageOrientationPatient, float)
        at = np.array(ds.ImagePositionPatient, float)
        rows.append((float(at @ np.cross(o[:3], o[3:])), tuple(at), o, np.array(ds.PixelSpacing, float), definition(decoded(ds), ds)))
    rows.sort(key=lambda r: r[0])
    A = np.eye(4)
    A[:3, 0] = (np.array(rows[-1][1])-rows[0][1])/(len(rows)-1)
    A[:3, 1], A[:3, 2], A[:3, 3] = rows[0][2][3:]*rows[0][3][0], rows[0][2][:3]*rows[0][3][1], rows[0][1]
    return np.stack([r[4] for r in rows]), lps2ras(A)


def same(ct, truth):
    assert ct.data.shape == truth.shape
    assert np.array_equal(ct.data.astype(float), np.asarray(truth, np.float32).astype(float))


CODINGS = [Storage(12, False, -1024), Storage(12, True, 1024), Storage(16, True, 0), Storage(16, True, -1024), Storage(16, False, -1024),
           Storage(15, False, -8192), Storage(16, True, 24), Storage(16, False, -32768)]


@pytest.mark.parametrize('storage', CODINGS, ids=lambda s: f'{s.bits}{"s" if s.signed else "u"}{s.intercept:+}')
@pytest.mark.parametrize('syntax', SYNTAX_UIDS)
def test_every_syntax_and_coding_reads_the_same(tmp_path, syntax, storage):
    low, high = (o+storage.intercept for o in storage.limits)
    ct = scan(low=max(low, -1024), high=min(high, 3071))
    files = write_series(ct, tmp_path/'s', Protocol(syntax=syntax, storage=storage))
    got = read_series(only(tmp_path/'s'))
    assert got.data.dtype == np.int16
    same(got, ct.data)
    same(got, by_pydicom(files)[0])
    check_landmark(ct, got, tol=1e-3)


@pytest.mark.parametrize('syntax', [s for s in SYNTAX_UIDS if s != 'jpegll'])
def test_the_slow_road_gives_the_same(tmp_path, monkeypatch, syntax):
    "Without the direct reading and without imagecodecs, pydicom's decoders alone"
    ct = scan()
    write_series(ct, tmp_path/'s', Protocol(syntax=syntax, padding=-1024))
    series = only(tmp_path/'s')
    fast = read_series(series)
    monkeypatch.setattr(reader, '_is_plain', lambda *_: False)
    monkeypatch.setitem(sys.modules, 'imagecodecs', None)
    assert np.array_equal(read_series(series).data, fast.data)


def words_of(ds): return np.frombuffer(ds.PixelData, '<u2')


@pytest.mark.parametrize('signed', [False, True])
def test_what_lies_above_the_stored_bits_is_no_image(tmp_path, signed):
    "An old overlay in the four unused bits; with a sign it is also where the sign was not extended"
    ct, rng = scan(low=-1024, high=1023), np.random.default_rng(1)
    def overlay(ds, k): ds.PixelData = (words_of(ds) & 0xFFF | rng.integers(0, 16, ds.Rows*ds.Columns).astype('u2') << 12).tobytes()
    write_series(ct, tmp_path/'s', Protocol(storage=Storage(12, signed, 1024 if signed else -1024)), edit=overlay)
    same(read_series(only(tmp_path/'s')), ct.data)


def test_bits_that_begin_higher_up_in_the_word(tmp_path):
    def shifted(ds, k): ds.HighBit, ds.PixelData = 15, (words_of(ds) << 4).astype('<u2').tobytes()
    ct = scan()
    write_series(ct, tmp_path/'s', edit=shifted)
    same(read_series(only(tmp_path/'s')), ct.data)


@pytest.mark.parametrize('syntax', ['explicit', 'rle'])
@pytest.mark.parametrize('bits,stored,signed', [(8, 8, False), (8, 7, True), (32, 32, True), (32, 32, False), (32, 12, False)])
def test_words_of_8_and_32_bits(tmp_path, bits, stored, signed, syntax):
    low, high = (0, 100) if bits == 8 else (-1024, 3071)
    ct = scan(low=low, high=high, shape=(3, 40, 48)) if low >= 0 else scan(shape=(3, 40, 48))
    add = 60 if signed else low
    def wide(ds, k):
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation, ds.RescaleIntercept = bits, stored, stored-1, int(signed), str(add)
        ds.PixelData = (ct.data[k].astype('i8')-add).astype(f'<{"i" if signed else "u"}{bits//8}').tobytes()
        if bits == 8: ds['PixelData'].VR = 'OB'
    if bits == 32 and syntax == 'rle': pytest.skip('not in the standard')
    files = write_series(ct, tmp_path/'s', Protocol(syntax=syntax), edit=wide)
    got = read_series(only(tmp_path/'s'))
    same(got, ct.data)
    same(got, by_pydicom(files)[0])


def test_hu_beyond_int16_become_float(tmp_path):
    def bright(ds, k): ds.PixelData = words_of(ds).copy().tobytes()[:-2] + (60000).to_bytes(2, 'little')
    write_series(scan(), tmp_path/'s', Protocol(storage=Storage(16, False, -1024)), edit=bright)
    got = read_series(only(tmp_path/'s'))
    assert got.data.dtype == np.float32 and got.data[0, -1, -1] == 60000-1024


@pytest.mark.parametrize('slope,intercept,dtype', [(2, -1024, np.int16), (.5, -1024, np.float32), (1, -1000.25, np.float32), (3.7, -987.6, np.float32)])
def test_slope_and_intercept(tmp_path, slope, intercept, dtype):
    def scale(ds, k): ds.RescaleSlope, ds.RescaleIntercept = str(slope), str(intercept)
    files = write_series(scan(), tmp_path/'s', edit=scale)
    got = read_series(only(tmp_path/'s'))
    assert got.data.dtype == dtype
    same(got, by_pydicom(files)[0])
    same(got, np.maximum((scan().data.astype(float)+1024)*slope+intercept, OUTSIDE))


def test_each_slice_has_its_own_slope(tmp_path):
    ct = scan(high=900)
    ct.data[:] = ct.data[:1] # neighbours alike, so that the stored values follow the slope
    def own(ds, k):
        if k % 2: ds.RescaleSlope, ds.RescaleIntercept, ds.PixelData = '0.5', '-1524', ((words_of(ds).astype(int)+500)*2).astype('<u2').tobytes()
    write_series(ct, tmp_path/'s', Protocol(storage=Storage(16, False, -1024)), edit=own)
    same(read_series(only(tmp_path/'s')), ct.data)


def circle(shape=(4, 48, 48)):
    "A scan with corners outside of the reconstructed circle; the air inside has noise"
    rng = np.random.default_rng(0)
    hu = np.where(rng.random(shape) < .5, rng.normal(-1000, 10, shape), rng.normal(40, 20, shape)).clip(-1020, 3000).astype('i2')
    h, w = np.ogrid[-1:1:48j, -1:1:48j]
    hu[:, np.hypot(h, w) > 1] = OUTSIDE
    return CTVolume(hu, Geometry.from_spacing(shape, (3, 2, 2)))


@pytest.mark.parametrize('tagged', [True, False])
@pytest.mark.parametrize('pad', [-1000, -1024, -2000, -2048, -3024])
def test_hu_do_not_depend_on_the_padding(tmp_path, pad, tagged):
    "The mean of a slice moved by hundreds of HU between these in software that guessed offsets from it"
    ct = circle()
    def untag(ds, k):
        if not tagged: del ds.PixelPaddingValue
    write_series(ct, tmp_path/'s', Protocol(padding=pad, storage=Storage(16, True, 0)), edit=untag)
    got, inside = read_series(only(tmp_path/'s')), ct.data != OUTSIDE
    if pad != -1000: same(got, ct.data)
    elif not tagged: assert np.array_equal(got.data[inside], ct.data[inside]) and (got.data[~inside] == -1000).all()
    else: # air of just this value cannot be told from it
        assert (got.data[~inside] == OUTSIDE).all() and np.array_equal(got.data[inside & (ct.data != -1000)], ct.data[inside & (ct.data != -1000)])


def test_a_range_of_padding(tmp_path):
    ct = circle()
    def ranged(ds, k): ds.add_new('PixelPaddingRangeLimit', 'SS', -1030)
    write_series(ct, tmp_path/'s', Protocol(padding=-3024, storage=Storage(16, True, 0)), edit=ranged)
    same(read_series(only(tmp_path/'s')), ct.data)


def test_padding_as_an_unsigned_number_of_signed_pixels(tmp_path):
    "63536 is -2000 in 16 bits; some scanners write it so"
    ct = circle()
    def unsigned(ds, k): ds.add_new('PixelPaddingValue', 'US', 63536)
    write_series(ct, tmp_path/'s', Protocol(padding=-2000, storage=Storage(16, True, 0)), edit=unsigned)
    same(read_series(only(tmp_path/'s')), ct.data)


@pytest.mark.parametrize('hu', [300, 40])
def test_padding_that_would_be_tissue_is_refused(tmp_path, hu):
    "Blanking these voxels could delete calcium, keeping them could invent it"
    ct = circle()
    ct.data[2, 20:24, 20:24] = hu
    def lie(ds, k): ds.add_new('PixelPaddingValue', 'US', hu+1024)
    write_series(ct, tmp_path/'s', edit=lie)
    with pytest.raises(DicomSeriesError, match='PADDING'): read_series(only(tmp_path/'s'))


def test_names_say_nothing_about_order(tmp_path):
    ct = scan(shape=(7, 16, 16))
    files = write_series(ct, tmp_path/'s')
    for k, p in enumerate(files): p.rename(tmp_path/'s'/f'{(k*4) % 7}')
    same(read_series(only(tmp_path/'s')), ct.data)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32-1))
def test_an_oblique_scan_comes_back_where_it_was(tmp_path_factory, seed):
    rng = np.random.default_rng(seed)
    axis, angle = rng.normal(size=3), np.radians(rng.uniform(0, 40))
    K = np.cross(np.eye(3), axis/np.linalg.norm(axis))
    R = np.eye(3) + np.sin(angle)*K + (1-np.cos(angle))*K @ K
    shape = tuple(int(n) for n in rng.integers((3, 5, 5), (7, 20, 20)))
    g = Geometry.from_spacing(shape, rng.uniform((.5, .2, .2), (5, 1.5, 1.5)), centre=rng.uniform(-300, 300, 3))
    A = g.affine.copy()
    A[:3] = R @ A[:3]
    ct = CTVolume(scan(seed % 1000, shape).data, Geometry(shape, A))
    k = tuple(int(rng.integers(n)) for n in shape)
    ct.data[ct.data > 3000] = 3000
    ct.data[k] = 3071
    folder = tmp_path_factory.mktemp('s')/'s'
    write_series(ct, folder)
    got = read_series(only(folder))
    same(got, ct.data)
    check_landmark(ct, got, tol=1e-3)
    assert got.geometry.matches(ct.geometry, tol=1e-2)


@pytest.mark.parametrize('packed', ['', 'rle', 'jpegls', 'j2k'])
def test_enhanced_multiframe(tmp_path, packed):
    ct = scan(shape=(5, 40, 48), high=900)
    ct.data[:] = ct.data[:1]
    path = write_enhanced(ct, tmp_path/'one.dcm', order=[3, 0, 4, 1, 2])
    if packed:
        ds = pydicom.dcmread(path)
        ds.compress(SYNTAX_UIDS[packed])
        ds.save_as(path)
    series = only(tmp_path)
    got = read_series(series)
    assert len(series.files) == 1
    same(got, ct.data)
    assert got.geometry.matches(ct.geometry)


def packed_series(folder, syntax, ct):
    if syntax == 'jpegll': pytest.importorskip('imagecodecs')
    write_series(ct, folder, Protocol(syntax=syntax))
    return only(folder)


def test_jpeg_lossless(tmp_path, monkeypatch):
    ct = scan()
    series = packed_series(tmp_path/'s', 'jpegll', ct)
    same(read_series(series), ct.data)
    monkeypatch.setitem(sys.modules, 'imagecodecs', None)
    monkeypatch.setattr('importlib.util.find_spec', lambda *_: None)
    with pytest.raises(JfrError, match=r'JPEG Lossless.*jfr2020\[codecs\]'): read_series(series)


@pytest.mark.parametrize('syntax', ['rle', 'jpegls', 'j2k', 'jpegll'])
def test_a_damaged_packed_slice_is_no_image(tmp_path, syntax):
    "Its end lost to zeros, at every place: refused with its slice, or unharmed. In RLE the very last bytes are plain pixels, like any other flipped bit"
    ct = scan(shape=(3, 40, 48), low=0, high=400)
    series = packed_series(tmp_path/'s', syntax, ct)
    at, n = series.headers[1].fragments[-1]
    whole, refused = series.files[1].read_bytes(), 0
    for keep in [*range(0, n-60, max(1, n//60)), *(() if syntax == 'rle' else (n-3, n-2, n-1))]:
        b = bytearray(whole)
        b[at+keep:at+n] = bytes(n-keep)
        series.files[1].write_bytes(b)
        try: same(read_series(series), ct.data)
        except DicomSeriesError as e: refused += 1; assert 'slice' in e.cause and series.files[1].name not in e.cause
    assert refused > 50


@pytest.mark.parametrize('syntax', ['jpegls', 'j2k', 'jpegll'])
def test_a_stream_that_claims_to_be_large_is_not_unpacked(tmp_path, syntax):
    ct = scan(shape=(3, 40, 48))
    series = packed_series(tmp_path/'s', syntax, ct)
    b, old = bytearray(series.files[1].read_bytes()), {'j2k': (48).to_bytes(4, 'big')+(40).to_bytes(4, 'big')}.get(syntax, b'\0\x28\0\x30')
    i = b.index(old, series.headers[1].fragments[-1][0])
    b[i:i+len(old)] = (65000).to_bytes(len(old)//2, 'big')*2
    series.files[1].write_bytes(b)
    with pytest.raises(DicomSeriesError, match='65000'): read_series(series)


@pytest.mark.parametrize('pad', [b'\x0f', b'\xc0', b'\0', b'\0\0'])
def test_the_byte_after_the_end_of_a_stream_may_be_anything(tmp_path, pad):
    "Fragments have an even length; real scanners leave whatever was in memory"
    ct = scan(shape=(3, 40, 48))
    series = packed_series(tmp_path/'s', 'jpegll', ct)
    ds = pydicom.dcmread(series.files[1])
    b = next(generate_frames(ds.PixelData, number_of_frames=1))
    b = b[:b.rindex(b'\xff\xd9')+2] + pad
    ds.PixelData = encapsulate([b])
    ds.save_as(series.files[1])
    same(read_series(only(tmp_path/'s')), ct.data)


def test_a_lost_block_is_seen(tmp_path):
    rng = np.random.default_rng(0)
    hu = rng.normal(40, 20, (6, 64, 64)).round().astype('i2')
    ct = CTVolume(hu, Geometry.from_spacing(hu.shape, (3, 1, 1)))
    for signed in (False, True):
        write_series(ct, tmp_path/f'{signed}', Protocol(storage=Storage(16, signed, 0 if signed else -1024)))
        series = only(tmp_path/f'{signed}')
        assert pixel_findings(read_series(series), series) == ()
        for k, start in ((0, 1000), (3, 2222), (5, 4000)):
            whole = series.files[k].read_bytes()
            at = series.headers[k].offset+start
            series.files[k].write_bytes(whole[:at] + bytes(512) + whole[at+512:])
            found, = pixel_findings(read_series(series), series)
            assert found.code == 'ZERO_BLOCK' and f'slice {k} ' in found.text
            series.files[k].write_bytes(whole)


def test_a_file_that_was_cut_after_it_was_found(tmp_path):
    write_series(scan(), tmp_path/'s')
    series = only(tmp_path/'s')
    os.truncate(series.files[2], series.files[2].stat().st_size-10)
    with pytest.raises(DicomSeriesError, match='slice'): read_series(series)
    series.files[1].unlink()
    with pytest.raises(DicomSeriesError): read_series(series)


def test_one_series_refused_says_why(tmp_path):
    files = write_series(scan(shape=(6, 16, 16)), tmp_path/'s')
    files[3].unlink()
    with pytest.raises(DicomSeriesError, match='MISSING_SLICE'): get_dicom_series(tmp_path/'s')


def mutants(seed, n):
    "(name, position, new byte) of `n` mutations"
    rng = np.random.default_rng(seed)
    return rng.random(n), rng.integers(0, 256, n), rng.integers(0, 2, n)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('syntax', ['explicit', 'implicit'])
def test_a_mutated_header_is_refused_or_read_as_pydicom_reads_it(tmp_path, syntax):
    "One byte of one file changed before the pixels: no volume that differs from what pydicom makes of the same files"
    ct = scan(shape=(3, 16, 16))
    files = write_series(ct, tmp_path/'s', Protocol(syntax=syntax, padding=-1024))
    whole, end = files[1].read_bytes(), only(tmp_path/'s').headers[1].offset
    read = refused = 0
    for u, byte, flip in zip(*mutants(0, 700)):
        i = int(u*(end-128))+128
        b = bytearray(whole)
        b[i] = b[i] ^ (1 << byte % 8) if flip else byte
        files[1].write_bytes(b)
        try: got = read_series(only(tmp_path/'s'))
        except (JfrError, AssertionError): refused += 1; continue
        try: truth, affine = by_pydicom(files)
        except Exception: truth, affine = ct.data, ct.geometry.affine # pydicom gives up: then nothing but the scan as it was
        same(got, truth)
        assert np.allclose(got.geometry.affine, affine, atol=1e-4), f'byte {i}'
        read += 1
    assert read > 50 and refused > 50


def test_every_readable_series_of_the_shared_data():
    if not SHARED.is_dir(): pytest.skip('no shared data beside the project')
    n = 0
    for e in find_series([SHARED/'ct', SHARED/'dicom_edge']):
        if not e.series: continue
        got = read_series(e.series)
        truth, affine = by_pydicom(e.series.files)
        same(got, truth)
        assert np.allclose(got.geometry.affine, affine, atol=1e-4)
        assert pixel_findings(got, e.series) == ()
        n += 1
    assert n >= 4


@pytest.mark.parametrize('path', sorted(CORNERSTONE.glob('*.dcm')) if CORNERSTONE.is_dir() else [None], ids=lambda p: p.stem.split('_')[1] if p else 'absent')
def test_one_image_in_every_transfer_syntax(path):
    if path is None: pytest.skip('no shared data beside the project')
    plain = read_series(only(next(CORNERSTONE.glob('*LittleEndianExplicit*')), fewest=1))
    lossy = any(w in path.name for w in ('JPEG2000TransferSyntax', 'Process1Transfer'))
    try: got = read_series(only(path, fewest=1))
    except JfrError as e: assert lossy and e.cause, str(e); return
    if lossy: assert np.abs(got.data.astype(float)-plain.data).mean() < 20
    else: same(got, plain.data)


def test_importing_the_reader_imports_no_more_than_numpy():
    code = 'import sys, jfr2020.dicom.reading; print([m for m in ("pydicom", "scipy", "pandas", "matplotlib", "torch", "imagecodecs") if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'
