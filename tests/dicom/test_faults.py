"Every class of series fault is refused with its code and place; what is only odd is read, and scores as it should."
import importlib.util

from tests.dicom import faults
import numpy as np
import pytest
from tests.dicom.faults import ACCEPTED, GRID, REFUSED, SCORE, damaged, edit, put, volume, write_series

from jfr2020.calcium.score import calcium_score
from jfr2020.dicom.series import choose_series, find_series
from jfr2020.ground.volume import CTVolume

SEEDS = range(2)
READS = importlib.util.find_spec('jfr2020.dicom.reading') is not None


def read(series):
    "HU of a series: by the library's reader, or plainly from the offsets where it is not there yet"
    if READS:
        from jfr2020.dicom.reading import read_series
        return read_series(series)
    planes = []
    for h in series.headers:
        stored = np.frombuffer(h.path.read_bytes()[h.offset:h.offset+h.length], '<u2').reshape(h.get('Rows'), h.get('Columns'))
        planes.append(stored*h.get('RescaleSlope') + h.get('RescaleIntercept'))
    return CTVolume(np.asarray(planes, 'f4'), series.geometry)


def test_the_fixture_scores_207():
    ct, mask = volume()
    s = calcium_score(ct, mask)
    assert s.agatston == SCORE and s.volume_mm3 == 204.75
    assert {n: v.agatston for n, v in s.vessels.items() if v.lesions} == dict(LAD=87., LCX=110.25, RCA=9.75)


@pytest.mark.parametrize('seed', SEEDS)
@pytest.mark.parametrize('case', REFUSED)
def test_refused(tmp_path, case, seed):
    damaged(tmp_path/'s', case, seed)
    entries = find_series(tmp_path/'s')
    assert entries and all(e.series is None for e in entries), entries
    e = next(e for e in entries if e.uid)
    assert e.refusal.code == REFUSED[case], e.refusal
    assert e.refusal.fix and len(e.refusal.cause) > 20
    assert not any(w in str(e.refusal) for w in ('SYN00', 'SYNTHETIC', 'OTHER')) # nobody is named


@pytest.mark.parametrize('seed', SEEDS)
@pytest.mark.parametrize('case', ACCEPTED)
def test_accepted(tmp_path, case, seed):
    ct, mask = damaged(tmp_path/'s', case, seed)
    entries = find_series(tmp_path/'s')
    assert [e.verdict for e in entries] == [', '.join(filter(None, ['ok', ACCEPTED[case]]))], entries[0].refusal
    s = entries[0].series
    assert s.geometry.matches(GRID)
    got = read(s)
    assert np.array_equal(got.data, ct.data)
    assert calcium_score(got, mask).agatston == SCORE


@pytest.mark.parametrize(('case', 'place'), dict(
    missing_slice='between slice 7 at z=21.00 mm and slice 8 at z=27.00 mm', dup_pos_new_uid='slice 8 at z=24.00 mm and slice 9 at z=24',
    two_kernels='B35f in slice 0 at z=0.00 mm and B70f in slice 8 at z=24.00 mm', one_no_ipp='in file', truncated_pixels='slice 8 at z=24',
    rescale_varies='in slice 7 at z=21.00 mm and 1, 0 in slice 8 at z=24.00 mm', shifted='slice 8 at z=24.00 mm is 37.3 mm beside',
    localizer='slice 9 at z=24.00 mm', two_patients='from slice 8 at z=24.00 mm', pixelspacing_varies='in slice 8 at z=24.00').items())
def test_the_place_is_named(tmp_path, monkeypatch, case, place):
    monkeypatch.setattr(faults, 'inner', lambda rng: 8)
    damaged(tmp_path/'s', case, 0)
    cause = next(e for e in find_series(tmp_path/'s') if e.uid).refusal.cause
    assert place in cause, cause


def test_two_series_in_one_folder_are_two_entries(tmp_path):
    ct, mask = damaged(tmp_path/'s', 'ok', 0)
    other = write_series(volume(1)[0], tmp_path/'t', seed=1)
    for p in other: p.rename(tmp_path/'s'/f'b{p.name}')
    entries = find_series(tmp_path/'s')
    assert len(entries) == 2 and all(e.series for e in entries)
    assert all(calcium_score(read(e.series), mask).agatston == SCORE for e in entries)
    with pytest.raises(ValueError, match='AMBIGUOUS'): choose_series(entries)


def test_a_broken_file_of_a_known_series_leaves_the_other_series_alone(tmp_path):
    damaged(tmp_path/'s', 'ok', 0)
    other = write_series(volume(1)[0], tmp_path/'t', seed=1)
    b = other[5].read_bytes()
    cut = b.index(b'\x28\0\x02\0') # after the series UID, before the pixels
    for p in other: p.rename(tmp_path/'s'/f'b{p.name}')
    (tmp_path/'s'/f'b{other[5].name}').write_bytes(b[:cut])
    assert sorted(e.verdict for e in find_series(tmp_path/'s')) == ['TRUNCATED', 'ok']


def test_a_slice_missing_at_an_end_needs_a_count(tmp_path):
    "No header betrays it, unless it says how many there were"
    paths = write_series(volume()[0], tmp_path/'s', ImagesInAcquisition='24')
    paths[-1].unlink()
    assert [e.verdict for e in find_series(tmp_path/'s')] == ['ok, FEWER_THAN_SAID']


@pytest.mark.parametrize('syntax', ['implicit', 'big', 'deflated', 'rle', 'jpegls', 'j2k'])
def test_every_syntax_is_indexed_alike(tmp_path, syntax):
    from tests.dicom.faults import Protocol
    pytest.importorskip('jpeg_ls' if syntax == 'jpegls' else 'openjpeg' if syntax == 'j2k' else 'numpy')
    write_series(volume()[0], tmp_path/'s', Protocol(syntax=syntax))
    e, = find_series(tmp_path/'s')
    assert e.verdict == 'ok' and e.series.geometry.matches(GRID)
    paths = sorted((tmp_path/'s').iterdir())
    paths[7].write_bytes(paths[7].read_bytes()[:-40]) # and a cut is seen in each
    assert find_series(tmp_path/'s')[0].verdict in ('TRUNCATED', 'UNREADABLE')


def test_an_enhanced_file_is_its_frames(tmp_path):
    from tests.dicom.enhanced import write_enhanced
    ct, mask = volume()
    path = write_enhanced(ct, tmp_path/'one')
    s = find_series(path)[0].series
    assert s.geometry.matches(GRID) and s.files == (path,) and len(s.headers) == 24
    assert s.facts.kernel == 'B35f' and s.facts.kvp == 120
    write_enhanced(ct, path, skip=8)
    assert 'between slice 7 at z=21.00 mm and slice 8 at z=27.00 mm' in find_series(path)[0].refusal.cause


def test_oblique_and_flipped_stacks_keep_their_place(tmp_path):
    "Whatever the order and direction of the slices, a voxel stays where it is in the patient"
    ct, _ = volume()
    paths = write_series(ct, tmp_path/'s')
    flip = put(ImageOrientationPatient=[-1, 0, 0, 0, 1, 0]) # rows from right to left: the normal points down
    for p in paths: edit(p, flip)
    s = find_series(tmp_path/'s')[0].series
    assert s.geometry.code == 'IPR'
    assert np.allclose(s.geometry.to_world([[0, 0, 0]])[0, 2], 69)
