"What is written is a DICOM CT: for a validator, for pydicom, and for our own reader, in the right place of the patient."
import shutil, subprocess

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jfr2020.ground.errors import MissingExtra
from jfr2020.ground.geometry import Geometry, lps2ras
from jfr2020.dicom.writing import SYNTAX_UIDS, WIDE, Protocol, write_series
from jfr2020.ground.volume import OUTSIDE, CTVolume


def scan(seed=0, shape=(4, 64, 80), geometry=None):
    rng = np.random.default_rng(seed)
    g = geometry or Geometry.from_spacing(shape, (3, .5, .4), centre=(10, -20, 30))
    return CTVolume(rng.integers(-1024, 3072, g.shape).astype('i2'), g)


@pytest.mark.parametrize('protocol', [Protocol(syntax=s) for s in SYNTAX_UIDS if s != 'deflated'] + [Protocol(storage=WIDE, padding=-2000), Protocol(thickness_mm=6)],
                         ids=lambda p: f'{p.syntax}-{p.padding}-{p.thickness_mm}')
def test_a_validator_finds_no_error(tmp_path, protocol):
    "Deflated files are left out: the validator does not inflate"
    if not shutil.which('dciodvfy'): pytest.skip('dciodvfy (Debian package dicom3tools) is not installed')
    for p in write_series(scan(), tmp_path/'s', protocol):
        said = subprocess.run(['dciodvfy', '-new', str(p)], capture_output=True, text=True)
        errors = [l for l in (said.stdout + said.stderr).splitlines() if l.startswith('Error')]
        assert errors == []


@pytest.mark.parametrize('syntax', SYNTAX_UIDS)
def test_pydicom_reads_the_same_numbers(tmp_path, syntax):
    ct = scan()
    try: files = write_series(ct, tmp_path/'s', Protocol(syntax=syntax))
    except MissingExtra as e: pytest.skip(str(e))
    for k, p in enumerate(files):
        ds = pydicom.dcmread(p)
        assert ds.file_meta.TransferSyntaxUID == SYNTAX_UIDS[syntax]
        if syntax == 'jpegll': continue # pydicom has no permissive decoder for it; test_dicom.py reads it
        assert np.array_equal(ds.pixel_array.astype(int)*int(ds.RescaleSlope) + int(ds.RescaleIntercept), ct.data[k])


@pytest.mark.parametrize('syntax', SYNTAX_UIDS)
def test_writing_twice_gives_the_same_bytes(tmp_path, syntax):
    "UIDs included: an encoder may not give new ones"
    try: a, b = (write_series(scan(), tmp_path/k, Protocol(syntax=syntax)) for k in 'ab')
    except MissingExtra as e: pytest.skip(str(e))
    assert [p.read_bytes() for p in a] == [p.read_bytes() for p in b]


def test_padding_is_declared(tmp_path):
    ct = scan()
    ct.data[:, :5] = OUTSIDE
    ds = pydicom.dcmread(write_series(ct, tmp_path/'s', Protocol(padding=-2000))[0])
    assert ds.PixelRepresentation == 1 and ds.PixelPaddingValue == -2000
    assert (ds.pixel_array[:5] == -2000).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32-1))
def test_every_oblique_grid_is_written_where_it_is(tmp_path_factory, seed):
    "Position of any voxel, computed by the standard's equation from the written attributes"
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    A = np.eye(4)
    A[:3, :3] = q @ np.diag(rng.uniform(.3, 4, 3))
    A[:3, 3] = rng.uniform(-900, 900, 3)
    ct = scan(seed, geometry=Geometry((3, 8, 9), A))
    files = write_series(ct, tmp_path_factory.mktemp('s')/'s')
    k, i, j = (int(rng.integers(n)) for n in ct.shape)
    ds = pydicom.dcmread(files[k])
    x, y = np.array(ds.ImageOrientationPatient[:3], float), np.array(ds.ImageOrientationPatient[3:], float)
    lps = np.array(ds.ImagePositionPatient, float) + x*float(ds.PixelSpacing[1])*j + y*float(ds.PixelSpacing[0])*i
    assert np.allclose(lps2ras(np.eye(4))[:3, :3] @ lps, ct.geometry.to_world([[k, i, j]])[0], atol=1e-4)
