"Files that lie about their size are refused, quickly and in bounded memory."
import os
import struct
import subprocess
import sys
import zipfile
import zlib

import numpy as np
import pytest
from tests.dicom.faults import damaged

from jfr2020.ground.errors import DicomSeriesError, LimitError
from jfr2020.dicom.header import DEFLATED, LIMITS, read_dataset, read_header
from jfr2020.dicom.series import find_series

MEMORY_MB, SECONDS = 300, 10


def measured(path):
    "Verdicts of `find_series` in a process of its own, which may grow by 300 MB and take 10 s"
    code = '''
import resource, sys, time
from jfr2020.dicom.series import find_series
import pydicom, numpy
now = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
before, t = now(), time.perf_counter()
out = [e.verdict for e in find_series(sys.argv[1], fewest=1)]
print(now()-before, time.perf_counter()-t, *out, sep='|')
'''
    run = subprocess.run([sys.executable, '-c', code, path], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr[-500:]
    mb, s, *verdicts = run.stdout.strip().split('|')
    assert float(mb) < MEMORY_MB and float(s) < SECONDS, run.stdout
    return verdicts


def element(tag, vr, value): return struct.pack('<HH2sH', tag >> 16, tag & 0xFFFF, vr, len(value)) + value


def a_file(path, syntax='1.2.840.10008.1.2.1', rows=64, columns=64, frames=None, pixels=None, length=None, before=b''):
    "One CT slice written by hand, so that it can lie"
    ds = [(0x00080016, b'UI', b'1.2.840.10008.5.1.4.1.1.2\0'), (0x00080018, b'UI', b'1.2.3.4\0'), (0x00080060, b'CS', b'CT'),
          (0x0020000D, b'UI', b'1.2.1\0'), (0x0020000E, b'UI', b'1.2.2\0'), (0x00200032, b'DS', b'0\\0\\0 '),
          (0x00200037, b'DS', b'1\\0\\0\\0\\1\\0 '), (0x00280002, b'US', b'\1\0'), (0x00280004, b'CS', b'MONOCHROME2 '),
          *([(0x00280008, b'IS', str(frames).encode().ljust(len(str(frames))+len(str(frames)) % 2))] if frames else []),
          (0x00280010, b'US', struct.pack('<H', rows)), (0x00280011, b'US', struct.pack('<H', columns)),
          (0x00280030, b'DS', b'.5\\.5 '), (0x00280100, b'US', b'\x10\0'), (0x00280101, b'US', b'\x0c\0'),
          (0x00280102, b'US', b'\x0b\0'), (0x00280103, b'US', b'\0\0'), (0x00281052, b'DS', b'-1024 '), (0x00281053, b'DS', b'1 ')]
    pixels = bytes(rows*columns*2) if pixels is None else pixels
    head = struct.pack('<HH2sHI', 0x7FE0, 0x10, b'OW', 0, len(pixels) if length is None else length)
    body = b''.join(element(*o) for o in ds[:3]) + before + b''.join(element(*o) for o in ds[3:]) + head + pixels
    uid = syntax.encode().ljust(len(syntax)+len(syntax) % 2, b'\0')
    if syntax == DEFLATED:
        z = zlib.compressobj(9, wbits=-15)
        body = z.compress(body) + z.flush()
    path.write_bytes(bytes(128) + b'DICM' + element(0x00020010, b'UI', uid) + body)
    return path


def encapsulated(*fragments):
    part = lambda b: struct.pack('<HHI', 0xFFFE, 0xE000, len(b)) + b
    return part(b'') + b''.join(map(part, fragments)) + struct.pack('<HHI', 0xFFFE, 0xE0DD, 0)


def test_the_honest_file_is_read(tmp_path):
    a_file(tmp_path/'ok', before=element(0x00180050, b'DS', b'3 '))
    assert measured(tmp_path/'ok') == ['ok']


def test_deflate_bomb(tmp_path):
    "1.2 MB that unpack to 1.2 GB"
    z = zlib.compressobj(9, wbits=-15)
    block = bytes(1 << 20)
    packed = b''.join(z.compress(block) for _ in range(1200)) + z.flush()
    path = tmp_path/'bomb'
    path.write_bytes(bytes(128) + b'DICM' + element(0x00020010, b'UI', DEFLATED.encode()) + packed)
    assert path.stat().st_size < 1_500_000
    assert measured(path) == ['DEFLATE_BOMB']
    with pytest.raises(LimitError): read_dataset(path, pixels=True)


def test_rle_of_huge_dimensions(tmp_path):
    rle = struct.pack('<16I', 2, 64, 1064, *[0]*13) + bytes([0x81, 0])*1000
    path = a_file(tmp_path/'rle', '1.2.840.10008.1.2.5', 20000, 20000, pixels=encapsulated(rle), length=0xFFFFFFFF)
    assert measured(path) == ['LIMIT_Rows']
    with pytest.raises(LimitError): read_dataset(path, pixels=True)


@pytest.mark.parametrize(('what', 'code'), [
    (dict(rows=65535, columns=65535, pixels=bytes(1000)), 'LIMIT_Rows'),
    (dict(columns=65535, pixels=bytes(1000)), 'LIMIT_Columns'),
    (dict(frames=10**8), 'LIMIT_NumberOfFrames'),
    (dict(frames=4000), 'TRUNCATED'),
    (dict(frames=-1), 'LIMIT_NumberOfFrames'),
    (dict(rows=0), 'PIXEL_CODING'),
    (dict(rows=4096, columns=4096, frames=4096, pixels=bytes(1000)), 'LIMIT_BYTES'),
    (dict(length=0xFFFFFFF0), 'TRUNCATED'),
    (dict(length=0xFFFFFFFF), 'TRUNCATED'),
    (dict(pixels=bytes(100)), 'TRUNCATED'),
    (dict(pixels=bytes(100_000)), 'PIXEL_LENGTH'),
    (dict(frames=2, pixels=bytes(64*64*4)), 'MULTIFRAME'),
])
def test_liars(tmp_path, what, code):
    path = a_file(tmp_path/'liar', **what)
    assert measured(path) == [code]


@pytest.mark.parametrize('syntax', ['1.2.840.10008.1.2.1', '1.2.840.10008.1.2'])
def test_nesting(tmp_path, syntax):
    for depth, verdict in ((20, 'UNREADABLE'), (3000, 'LIMIT_NESTING')):
        vr = b'' if syntax.endswith('1.2') else b'SQ\0\0'
        one = struct.pack('<HH', 8, 0x1140) + vr + struct.pack('<I', 0xFFFFFFFF) + struct.pack('<HHI', 0xFFFE, 0xE000, 0xFFFFFFFF)
        path = tmp_path/f'deep{depth}'
        path.write_bytes(bytes(128) + b'DICM' + element(0x00020010, b'UI', syntax.encode().ljust(len(syntax)+len(syntax) % 2, b'\0'))
                         + one*depth)
        found = measured(path)
        assert found == [verdict] or depth == 20 and found == ['TRUNCATED']


def test_nesting_without_preamble_goes_to_pydicom(tmp_path):
    one = struct.pack('<HH2sHI', 8, 0x1140, b'SQ', 0, 0xFFFFFFFF) + struct.pack('<HHI', 0xFFFE, 0xE000, 0xFFFFFFFF)
    (tmp_path/'deep').write_bytes(element(0x00080008, b'CS', b'ORIGINAL') + one*3000)
    verdict, = measured(tmp_path/'deep')
    assert verdict in ('LIMIT_NESTING', 'UNREADABLE', 'NO_DICOM', 'NOT_CT')


def test_a_header_without_end_is_bounded(tmp_path):
    "200 MB of private data before any pixel"
    path = a_file(tmp_path/'long')
    b = path.read_bytes()
    with open(tmp_path/'long', 'wb') as f:
        f.write(b[:400 - (400 - b.index(b'\x20\0\x0d\0'))])
        f.write(struct.pack('<HH2sHI', 0x0009, 0x1010, b'OB', 0, 200 << 20))
        f.truncate(f.tell() + (200 << 20))
    assert measured(path) == ['LIMIT_HEADER']


def test_many_fragments_are_bounded(tmp_path, monkeypatch):
    path = a_file(tmp_path/'f', '1.2.840.10008.1.2.5', pixels=encapsulated(*[b'ab']*70_000), length=0xFFFFFFFF)
    with pytest.raises(LimitError, match='FRAGMENTS'): read_header(path)


@pytest.mark.parametrize('case', ['zero_spacing', 'negative_spacing', 'nan_spacing', 'slope_zero', 'slope_huge', 'nan_position'])
def test_numbers_that_are_none(tmp_path, case):
    damaged(tmp_path/'s', case, 0)
    assert find_series(tmp_path/'s')[0].series is None


def test_every_truncation_is_refused(tmp_path):
    "A small file cut at every 512th byte and at random places; every cut is refused, with the library's own error"
    path = a_file(tmp_path/'whole', before=element(0x00180050, b'DS', b'3 '))
    b, cut = path.read_bytes(), tmp_path/'cut'
    rng = np.random.default_rng(0)
    for n in [*range(0, len(b), 512), *rng.integers(0, 700, 200), *rng.integers(0, len(b), 100)]:
        cut.write_bytes(b[:n])
        e, = find_series(cut, fewest=1)
        assert e.series is None and isinstance(e.refusal, DicomSeriesError), n
        assert e.refusal.code in ('TRUNCATED', 'UNREADABLE', 'NO_PIXELS', 'NOT_CT'), (n, e.refusal)


def test_truncation_of_compressed_files(tmp_path):
    rle = struct.pack('<16I', 2, 64, 1064, *[0]*13) + bytes([0x81, 0])*3000
    path = a_file(tmp_path/'rle', '1.2.840.10008.1.2.5', pixels=encapsulated(rle), length=0xFFFFFFFF,
                  before=element(0x00180050, b'DS', b'3 '))
    b = path.read_bytes()
    assert find_series(path, fewest=1)[0].series
    for n in range(len(b)-1, 140, -37):
        path.write_bytes(b[:n])
        assert find_series(path, fewest=1)[0].series is None, n


def test_pipes_devices_and_loops_are_stepped_over(tmp_path):
    damaged(tmp_path/'s', 'ok', 0)
    os.mkfifo(tmp_path/'s'/'pipe')
    (tmp_path/'s'/'loop').symlink_to(tmp_path/'s')
    (tmp_path/'s'/'zero').symlink_to('/dev/zero')
    (tmp_path/'s'/'dangling').symlink_to('nowhere')
    assert measured(tmp_path/'s') == ['ok']
    assert [e.verdict for e in find_series(tmp_path/'s'/'pipe')] == ['UNREADABLE']


def test_archives(tmp_path):
    damaged(tmp_path/'s', 'ok', 0)
    with zipfile.ZipFile(tmp_path/'ok.zip', 'w', zipfile.ZIP_DEFLATED) as z:
        for p in sorted((tmp_path/'s').iterdir()): z.write(p, f'study/{p.name}')
    assert measured(tmp_path/'ok.zip') == ['ok']
    with zipfile.ZipFile(tmp_path/'bomb.zip', 'w', zipfile.ZIP_DEFLATED, compresslevel=9) as z: z.writestr('b', bytes(500 << 20))
    with zipfile.ZipFile(tmp_path/'slip.zip', 'w') as z: z.writestr('../x', b'x')
    with zipfile.ZipFile(tmp_path/'many.zip', 'w') as z: [z.writestr(f'{i}', b'') for i in range(LIMITS.zip_files+1)]
    (tmp_path/'cut.zip').write_bytes((tmp_path/'ok.zip').read_bytes()[:-2000])
    for name in ('bomb', 'slip', 'many'): assert measured(tmp_path/f'{name}.zip') == ['ZIP']
    assert find_series(tmp_path/'cut.zip')[0].series is None
