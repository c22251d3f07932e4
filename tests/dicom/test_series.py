"The header walk equals pydicom on every real file, every syntax and every mutated header; series of the shared data get their verdict."
import os
import tracemalloc
import warnings
from collections import Counter

import numpy as np
import pydicom
import pytest
from tests.dicom.enhanced import write_enhanced
from tests.dicom.faults import GRID, Protocol, edit, put, volume, write_series
from hypothesis import given, settings
from hypothesis import strategies as st

from jfr2020.ground.errors import DicomSeriesError, LimitError
from jfr2020.dicom import header as header_room
from jfr2020.dicom.header import TAGS, read_header
from jfr2020.dicom.names import TYPED, repeats_name
from jfr2020.dicom.series import choose_series, find_series, series_table
from jfr2020.ground.volume import CTVolume


def plain(v):
    "A pydicom value as `Header.get` gives it: stripped texts, numbers, a tuple for several"
    many = list(v) if isinstance(v, pydicom.multival.MultiValue) else [v]
    out = tuple(None if o in (None, '') else o.strip(' \0') if isinstance(o, str) and not isinstance(o, pydicom.valuerep.IS)
                else float(o) if isinstance(o, float) else int(o) for o in many)
    return out[0] if len(out) == 1 else out


def by_pydicom(path):
    "Keyword -> value, straight from pydicom's own conversion"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        ds = pydicom.dcmread(path, stop_before_pixels=True)
        out, who = {}, [str(ds.get(k) or '') for k in ('PatientName', 'PatientID')]
        for k, (tag, vr) in TAGS.items():
            src = ds.file_meta if tag >> 16 == 2 else ds
            if k.startswith('Patient') and k != 'PatientPosition' or vr == 'XS' or tag not in src or src[tag].is_empty: continue
            if k in TYPED and repeats_name(str(src[tag].value), *who): out[k] = ''; continue # dropped
            out[k] = plain(src[tag].value)
        return out


def assert_same(path, h):
    for k, v in by_pydicom(path).items():
        got = h.get(k)
        assert got == v or got is None and v == '' or v != v and got != got, (k, got, v)


def walks(path):
    "Header by the walk alone, or None when it would ask pydicom"
    h = read_header(path)
    return h if h is not None and h.how == 'walk' else None


def test_walk_equals_pydicom_on_every_shared_file(shared_data):
    n = Counter()
    for path in sorted(p for d in ('ct', 'ct_slices', 'dicom_edge') for p in (shared_data/d).rglob('*') if p.is_file()):
        try: h = read_header(path)
        except DicomSeriesError as e: n[e.code] += 1; continue
        if h is None: n['none'] += 1; continue
        n[h.how] += 1
        if h.how != 'walk': continue
        assert_same(path, h)
        other = header_room._by_pydicom(path, h.size, '')
        assert {k: h.get(k) for k in TAGS} == {k: other.get(k) for k in TAGS}
        assert (h.patient, h.offset, h.syntax) == (other.patient, other.offset, other.syntax)
    assert n['walk'] > 450 and n['pydicom'] < 25 and n['UNREADABLE'] <= 1, n


@pytest.mark.parametrize('syntax', ['explicit', 'implicit', 'big', 'deflated', 'rle'])
def test_walk_equals_pydicom_in_every_syntax(tmp_path, syntax):
    for path in write_series(volume()[0], tmp_path/'s', Protocol(syntax=syntax, padding=-1010), SeriesDescription='Cœur à 3 mm')[:4]:
        h = read_header(path)
        assert h.how == ('pydicom' if syntax in ('big', 'deflated') else 'walk')
        assert h.get('SeriesDescription') == 'Cœur à 3 mm' and h.get('PixelPaddingValue') == 14
        if syntax != 'deflated': assert_same(path, h)


@pytest.mark.parametrize('charset', ['', 'ISO_IR 100', 'ISO_IR 192', 'ISO_IR 101', ['', 'ISO 2022 IR 100'], 'ISO_IR 144'])
def test_texts_in_every_character_set(tmp_path, charset):
    text = 'Грудь' if charset == 'ISO_IR 144' else 'Cœur'.replace('œ', 'oe') + ' été'
    path = write_series(volume()[0], tmp_path/'s')[0]
    edit(path, put(SpecificCharacterSet=charset or 'ISO_IR 100', SeriesDescription=text))
    assert read_header(path).get('SeriesDescription') == text


def rich_header(folder, syntax):
    "A synthetic file with sequences of both kinds of length, private blocks, texts and padding"
    def more(ds, k):
        for kw, undefined in (('ReferencedImageSequence', True), ('SourceImageSequence', False), ('RequestAttributesSequence', True)):
            inner = pydicom.Dataset()
            inner.Rows, inner.SeriesDescription, inner.ReferencedSOPInstanceUID = 7, 'inside', '1.2.3'
            outer = pydicom.Dataset()
            outer.RequestAttributesSequence = [inner]
            setattr(ds, kw, [outer, inner])
            ds[kw].is_undefined_length = undefined
            for o in ds[kw].value: o.is_undefined_length_sequence_item = undefined
        block = ds.private_block(0x0029, 'SYNTH', create=True)
        block.add_new(0x10, 'OB', bytes(range(200)))
        block.add_new(0x11, 'LO', 'private')
    ct = CTVolume(volume()[0].data[:1, :8, :8].copy(), GRID.sliced((0, 0, 0), (1, 1, 1), (1, 8, 8)))
    return write_series(ct, folder, Protocol(syntax=syntax), edit=more)[0]


@pytest.mark.parametrize('syntax', ['explicit', 'implicit'])
def test_walk_equals_pydicom_under_mutation(tmp_path, syntax):
    "Random bytes of a header changed: both say the same, or the walk asks pydicom, or the file is refused; nothing else happens"
    whole = rich_header(tmp_path/'s', syntax).read_bytes()
    at, rng, n = read_header(next((tmp_path/'s').iterdir())).offset, np.random.default_rng(20), Counter()
    path = tmp_path/'mutated'
    for _ in range(1500):
        b = bytearray(whole)
        for k in rng.integers(128, at, rng.integers(1, 4)): b[k] = rng.integers(256)
        path.write_bytes(b)
        try: h = read_header(path)
        except DicomSeriesError as e: n[e.code] += 1; continue
        if h is None or h.how != 'walk': n['deferred'] += 1; continue
        n['walk'] += 1
        try: other = header_room._by_pydicom(path, h.size, '')
        except DicomSeriesError: n['only the walk'] += 1; continue
        same = {k: h.get(k) for k in TAGS}, {k: other.get(k) for k in TAGS}
        assert same[0] == same[1], [(k, same[0][k], same[1][k]) for k in TAGS if same[0][k] != same[1][k]]
        assert (h.patient, h.syntax) == (other.patient, other.syntax)
        if h.remark != 'CUT': assert h.offset == other.offset
    assert n['walk'] > 500 and n['only the walk'] < 30, n


def outcome(path):
    "What reading a header comes to: the header, or the refusal as it is shown"
    try: return read_header(path)
    except DicomSeriesError as e: return type(e), e.code, e.cause


def mutant(whole, places, end, rng):
    "A header changed in one or several of the ways in which siblings and damaged files differ"
    b = bytearray(whole)
    for way in rng.choice(8, rng.integers(1, 3), p=(.2, .35, .1, .1, .1, .05, .05, .05)):
        k, i, j = places[rng.integers(len(places))]
        if way == 0: b[rng.integers(end)] ^= 1 << int(rng.integers(8)) # any bit
        elif way == 1 and j > i: b[i:j] = rng.bytes(j-i) # a value
        elif way == 2: at = rng.integers(132, end); b[at:at] = rng.bytes(rng.integers(1, 9)) # inserted
        elif way == 3: at = rng.integers(132, end); del b[at:at+rng.integers(1, 9)] # lost
        elif way == 4 and b[i-2] < 250: # a value of another length: two bytes more, and said so
            for at in (i-2, i-4): # 16-bit and 32-bit lengths
                if int.from_bytes(b[at:i], 'little') == j-i: b[at] += 2; b[j:j] = b'1 '; break
        elif way == 5: return bytes(b[:rng.integers(100, len(b))]) # cut
        elif way == 6: b += bytes(20_000) # pixels that go on
        elif k == 'TransferSyntaxUID': b[i:j] = b'1.2.840.10008.1.2'.ljust(j-i, b'\0')
        else: b[end-12:end-12] = b'\2\0\x10\0UI\x12\x001.2.840.10008.1.2\0' # a second transfer syntax, too late to count
    return bytes(b)


@pytest.mark.parametrize('syntax', ['explicit', 'implicit', 'rle'])
def test_a_header_read_after_its_siblings_is_the_header_read_alone(tmp_path, monkeypatch, syntax):
    "Layouts remembered from a good file, and from all mutants before, change nothing: not a value, not a refusal"
    path = rich_header(tmp_path/'s', syntax)
    whole, path, rng, used, n = path.read_bytes(), tmp_path/'mutated', np.random.default_rng(21), [], Counter()
    fits = header_room._fits
    monkeypatch.setattr(header_room, '_fits', lambda o, b: fits(o, b) and not used.append(1))
    monkeypatch.setattr(header_room, '_layouts', ())
    path.write_bytes(whole)
    end, (good,) = read_header(path).offset, header_room._layouts
    seen = ()
    for k in range(2000):
        path.write_bytes(mutant(whole, good.places, end, rng))
        monkeypatch.setattr(header_room, '_layouts', ())
        alone = outcome(path)
        assert not used
        for name, layouts in (('after good', (good,)), ('after many', seen)):
            monkeypatch.setattr(header_room, '_layouts', layouts)
            assert outcome(path) == alone, k
            n[name] += len(used)
            used.clear()
        seen = header_room._layouts
        n[alone.how if hasattr(alone, 'how') else alone and alone[1]] += 1
    assert n['after many'] > n['after good'] > 400 and n['walk'] > 900 and n['pydicom'] > 50 and n['TRUNCATED'] > 50, n


def test_few_layouts_are_kept_and_threads_may_share_them(tmp_path, monkeypatch):
    "Series of different layouts read by four threads at once: as one after the other"
    from concurrent.futures import ThreadPoolExecutor
    monkeypatch.setattr(header_room, '_layouts', ())
    paths = [p for k in range(20) for p in write_series(volume()[0], tmp_path/f'{k}', SeriesDescription='x'*2*k)[:8]]
    alone = [read_header(p) for p in paths]
    assert len(header_room._layouts) == 16
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5): assert list(pool.map(read_header, paths[::-1])) == alone[::-1]
    assert len(header_room._layouts) == 16


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400), st.booleans())
def test_any_bytes_are_none_or_refused(tmp_path_factory, b, magic):
    "Whatever the bytes: a header, None, or the library's own refusal"
    path = tmp_path_factory.getbasetemp()/f'any{os.getpid()}'
    path.write_bytes((bytes(128) + b'DICM' if magic else b'') + b)
    try: h = read_header(path)
    except DicomSeriesError: return
    assert h is None or (h.size == path.stat().st_size and isinstance(h.get('Rows', 0), (int, tuple, str)))


def test_long_headers_and_long_texts(tmp_path):
    "Pixels far beyond the first read are found, and values across its end are whole"
    def long(ds, k):
        ds.private_block(0x0019, 'SYNTH', create=True).add_new(1, 'OB', bytes(16384 - 700 + k))
        ds.private_block(0x0021, 'SYNTH', create=True).add_new(1, 'OB', bytes(300_000))
    for path in write_series(volume()[0], tmp_path/'s', edit=long):
        h = read_header(path)
        assert h.how == 'walk' and h.offset > 300_000
        assert_same(path, h)


@pytest.mark.parametrize('syntax', ['explicit', 'implicit'])
def test_a_long_header_takes_no_memory_for_its_elements(tmp_path, syntax):
    whole, path = rich_header(tmp_path/'s', syntax).read_bytes(), tmp_path/'long'
    end = read_header(next((tmp_path/'s').iterdir())).offset - (12 if syntax == 'explicit' else 8)
    empty = b'\x29\0\x01\x20' + (b'LO\0\0' if syntax == 'explicit' else bytes(4))
    path.write_bytes(whole[:end] + empty*200_000 + whole[end:])
    tracemalloc.start()
    try: h, (_, peak) = read_header(path), tracemalloc.get_traced_memory()
    finally: tracemalloc.stop()
    assert h.how == 'walk' and h.offset > 1_600_000 and peak < 4*h.size, peak/h.size


def test_enhanced_frames_in_any_order(tmp_path):
    "Frames are slices: shuffled, with a slope of their own, they are the same stack"
    ct, _ = volume()
    order = list(np.random.default_rng(0).permutation(24))
    path = write_enhanced(ct, tmp_path/'one', order=order, slopes={k: 1 + k % 2 for k in range(24)})
    s = find_series(path)[0].series
    assert s.geometry.matches(GRID) and [h.frame for h in s.headers] == list(np.argsort(order))
    assert [h.get('RescaleSlope') for h in s.headers] == [1 + k % 2 for k in range(24)]
    assert {f.code for f in s.findings} == {'RESCALE_PER_SLICE'}
    assert read_header(path).frames and len(read_header(path).each_frame()) == 24


EXPECTED = dict(ibsi1_pat1_contrast_crop=['NOT_CT', 'ok'], lungdx_A0002_B40f=['ok'], ricord1a_001012=['ok'],
                totalseg_example_ct_dicom_noheart=['ok, NO_SERIES_UID, OVERLAP, NO_SOP_CLASS'])
EDGE = dict(dcmqa_ge_tilt_uneven_7slices=['GANTRY_TILT'], dcmqa_philips_localizer=['LOCALIZER'], covid19_ny_sbu_reformats=['REFORMAT']*2,
            lungdx_A0002_second_series_B70f_4slices=['ok'], panimg_dicom_4d=['ok']*19, monai_ct_noext=['MISSING_SLICE'],
            pydicom_dicomdir_tree=['LOCALIZER', 'MISSING_SLICE'] + ['NOT_CT']*6 + ['ok'], wg04_ct1_noext=['TOO_FEW_SLICES']*2,
            panimg_per_slice_dicom_slope=['TOO_FEW_SLICES'], panimg_per_slice_dicom_intercept=['TOO_FEW_SLICES'], charsets=['NOT_CT']*6)


def test_verdicts_on_the_shared_data(shared_data):
    for d, table in (('ct', EXPECTED), ('dicom_edge', EDGE)):
        for name, verdicts in table.items():
            assert sorted(e.verdict for e in find_series(shared_data/d/name)) == verdicts, name


def test_phases_with_a_series_uid_each_are_not_guessed_between(shared_data, tmp_path):
    entries = find_series(shared_data/'dicom_edge'/'panimg_dicom_4d')
    with pytest.raises(DicomSeriesError, match='AMBIGUOUS'): choose_series(entries)
    for p in (shared_data/'dicom_edge'/'panimg_dicom_4d').iterdir(): # the same under one UID
        (tmp_path/p.name).write_bytes(p.read_bytes())
        edit(tmp_path/p.name, put(SeriesInstanceUID='1.2.3'))
    assert '76 slices at 4 positions: 19 phases' in find_series(tmp_path)[0].refusal.cause


def test_a_second_kernel_mixed_into_a_real_series(shared_data, tmp_path):
    for p in (shared_data/'ct'/'lungdx_A0002_B40f').iterdir(): (tmp_path/p.name).symlink_to(p)
    for p in (shared_data/'dicom_edge'/'lungdx_A0002_second_series_B70f_4slices').iterdir(): (tmp_path/f'b{p.name}').symlink_to(p)
    entries = find_series(tmp_path)
    assert len(series_table(entries)) == 2
    entry, why = choose_series(entries)
    assert entry.facts.kernel == 'B40f' and 'best of 2' in why


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(6)), st.floats(-30, 30), st.floats(.5, 5), st.integers(0, 2**31))
def test_any_order_and_lean_gives_the_same_place(tmp_path_factory, order, lean, gap, seed):
    "Slices written in any order, leaning together by any angle: every voxel is where its header says"
    folder = tmp_path_factory.mktemp('lean')
    c, s = np.cos(np.radians(lean)), np.sin(np.radians(lean))
    paths = write_series(CTVolume(np.zeros((6, 4, 5), 'i2'), GRID.sliced((0, 0, 0), (1, 1, 1), (6, 4, 5))), folder/'s', seed=seed)
    corner = np.random.default_rng(seed).uniform(-200, 200, 3)
    normal = np.array([0, -s, c])
    for p, k in zip(paths, order):
        at = [round(float(v), 6) for v in corner + k*gap*normal]
        edit(p, put(ImageOrientationPatient=[1, 0, 0, 0, round(float(c), 8), round(float(s), 8)], ImagePositionPatient=at))
    got = find_series(folder/'s')[0]
    assert got.series, got.refusal
    assert [order[paths.index(f)] for f in got.series.files] == list(range(6))
    lps = corner + 3*gap*normal + 2*.5*np.array([0, c, s]) + 4*.5*np.array([1, 0, 0])
    assert np.allclose(got.series.geometry.to_world([[3, 2, 4]])[0], lps*[-1, -1, 1], atol=1e-3)


def test_many_small_trees_and_limits(tmp_path, monkeypatch):
    write_series(volume()[0], tmp_path/'s')
    seen = []
    assert find_series([tmp_path/'s', str(tmp_path/'s')], progress=seen.append)[1].series and seen[-1] == 24
    from dataclasses import replace

    from jfr2020.dicom import walk as files_room
    monkeypatch.setattr(files_room, 'LIMITS', replace(files_room.LIMITS, files=10))
    e, = find_series(tmp_path/'s')
    assert isinstance(e.refusal, LimitError) and e.verdict == 'LIMIT_FILES'


def test_a_flipped_bit_in_a_header_never_moves_a_slice_or_its_hu(tmp_path):
    "One slice of the fixture gets header bits flipped: the series is refused, or still is the same volume"
    ct, _ = volume()
    path = write_series(ct, tmp_path/'s')[8]
    whole, rng, n = path.read_bytes(), np.random.default_rng(3), Counter()
    at = read_header(path).offset
    for _ in range(400):
        b = bytearray(whole)
        for k in rng.integers(128, at, rng.integers(1, 3)): b[k] ^= 1 << int(rng.integers(8))
        path.write_bytes(b)
        entries = find_series(tmp_path/'s')
        ready = [e.series for e in entries if e.series]
        n['ok' if ready else entries[0].verdict] += 1
        for s in ready:
            assert len(entries) == 1 and s.geometry.matches(GRID, tol=.05), s
            h = s.headers[8]
            stored = np.frombuffer(bytes(b)[h.offset:h.offset+h.length], '<u2').reshape(96, 96)
            hu = stored*h.numbers('RescaleSlope')[0] + h.numbers('RescaleIntercept')[0]
            assert np.abs(hu - ct.data[8]).max() < 1, h
    assert 100 < n['ok'] < 380 and len(n) > 8, n


NAME, NUMBER = 'Dupont^Jean Rémy', 'HUG-4711'
TEXTS = dict(SeriesDescription='CaSc DUPONT J.', ProtocolName='REMY_3.0', StudyDescription='coeur hug-4711', ConvolutionKernel='Jean1',
             ContrastBolusAgent='pour M. Dupont', BodyPartExamined='DUPONTHEART', FilterType='JEAN')


def told(thing): # all that it would tell, in one text
    text = repr(thing) + ' '.join(map(str, vars(thing).values())) if hasattr(thing, '__dict__') else repr(thing)
    return text.casefold()


@pytest.mark.parametrize('syntax', ['explicit', 'deflated', 'enhanced'])
def test_a_name_typed_into_other_tags_goes_no_further(tmp_path, syntax):
    "Planted in every text that a site may fill: not in headers, facts, tables or refusals; harmless texts stay"
    folder, plant = tmp_path/'s', put(PatientName=NAME, PatientID=NUMBER, SpecificCharacterSet='ISO_IR 192', **TEXTS)
    if syntax == 'enhanced':
        folder.mkdir()
        edit(write_enhanced(volume()[0], folder/'one'), plant)
    else:
        for p in write_series(volume()[0], folder, Protocol(syntax=syntax)): edit(p, plant)
    e, = find_series(folder)
    assert e.series, e.refusal
    said = ' '.join(told(o) for o in (e, e.facts, e.series, *e.series.headers, *e.series.findings)) + str(series_table([e]).to_dict())
    raws = b' '.join(v for h in e.series.headers for k, v in h.raw.items() if k != 'ContrastBolusAgent').decode('latin-1')
    for word in ('dupont', 'jean', 'remy', 'rémy', '4711'): assert word not in said + raws.casefold(), word
    assert e.facts.contrast == 'an agent is named' and e.facts.modality == 'CT'


def test_texts_without_the_name_stay(tmp_path):
    for p in write_series(volume()[0], tmp_path/'s'): edit(p, put(PatientName='TAN^LI', PatientID='12', ConvolutionKernel='STANDARD',
                                                                  SeriesDescription='CaSc 12 Titan'))
    facts = find_series(tmp_path/'s')[0].facts
    assert (facts.kernel, facts.description) == ('STANDARD', 'CaSc 12 Titan')


def test_a_refusal_does_not_repeat_the_agent(tmp_path):
    paths = write_series(volume()[0], tmp_path/'s')
    for p in paths[9:]: edit(p, put(ContrastBolusAgent='for Mrs Martin'))
    cause = find_series(tmp_path/'s')[0].refusal.cause
    assert 'ContrastBolusAgent is absent in slice 0 at z=0.00 mm and named in slice 9' in cause and 'Martin' not in cause


@pytest.mark.parametrize('value', ['0', '-3', 'nan', 'thick', ''])
def test_a_thickness_or_voltage_that_is_none_is_not_handed_on(tmp_path, value):
    raw = lambda ds: [_raw_text(ds, k, value) for k in ('SliceThickness', 'KVP')]
    for p in write_series(volume()[0], tmp_path/'s'): edit(p, raw)
    e, = find_series(tmp_path/'s')
    assert e.verdict == 'ok, NO_THICKNESS' and (e.facts.thickness_mm, e.facts.kvp) == (None, None)


def _raw_text(ds, keyword, text):
    tag, b = pydicom.tag.Tag(keyword), text.encode()
    ds._dict[tag] = pydicom.dataelem.RawDataElement(tag, 'DS', len(b)+len(b) % 2, b.ljust(len(b)+len(b) % 2), 0, False, True)


def test_a_file_is_told_by_its_place_not_by_its_name(tmp_path):
    "Names such as DUPONT_JEAN_5.dcm in two folders, broken in every way that has a cause of its own"
    for f in ('MARTIN', 'DURAND'):
        for k, p in enumerate(write_series(volume()[0], tmp_path/'s'/f, seed=len(f)+ord(f[1]))): p.rename(p.with_name(f'DUPONT_JEAN_{k:02}.dcm'))
    whole = (tmp_path/'s'/'MARTIN'/'DUPONT_JEAN_05.dcm').read_bytes()
    broken = dict(cut=whole[:500], empty=b'', preamble=whole[:100], syntax=whole.replace(b'1.2.840.10008.1.2.1\0', b'1.2.840.10008.9.9.9\0', 1),
                  nowhere=whole.replace(b'\x20\0\x32\0DS', b'\x20\0\x31\0DS'), pixels=whole[:-99])
    for name, b in broken.items():
        (tmp_path/'s'/'MARTIN'/'DUPONT_JEAN_05.dcm').write_bytes(b)
        entries = find_series(tmp_path/'s')
        refusals = [e.refusal for e in entries if e.refusal]
        assert len(refusals) == 1 and len(entries) == 2, (name, entries)
        assert not any(w in str(refusals[0]) for w in ('DUPONT', 'MARTIN', 'DURAND', '.dcm')), refusals
        if name in ('cut', 'empty', 'preamble'): assert 'file 6 of 24 in folder 2 of 2 (in the order of names)' in refusals[0].cause
        if name == 'nowhere': assert 'in file 6 of 24' in refusals[0].cause


def test_unreadable_files_of_one_input_differ_in_what_is_said(tmp_path):
    "The same damage in two folders: two entries that can be told apart"
    for f in 'ab':
        (tmp_path/f).mkdir()
        (tmp_path/f/'x').write_bytes(bytes(128) + b'DICM' + b'\2\0\0\0UL')
    entries = find_series(tmp_path)
    assert len(entries) == 2 and len({e.refusal.cause for e in entries}) == 2


def discs(value, folder):
    "A small series of one HU"
    ct = CTVolume(np.full((4, 8, 8), value, 'i2'), GRID.sliced((0, 0, 0), (1, 1, 1), (4, 8, 8)))
    return write_series(ct, folder, seed=abs(value))


@pytest.mark.parametrize('names', [('a.zip', 'b.zip'), ('a', 'b')])
def test_two_archives_never_share_a_file(tmp_path, names):
    "Same names and layout, other pixels, one call, with and without a folder to unpack in"
    import zipfile

    from jfr2020.dicom.reading import read_series
    for value, name in zip((100, 300), names):
        for k, p in enumerate(discs(value, tmp_path/f'{value}')): p.rename(p.with_name(f'{k}.dcm'))
        with zipfile.ZipFile(tmp_path/name, 'w') as z:
            for p in sorted((tmp_path/f'{value}').iterdir()): z.write(p, f'study/{p.name}')
    for unpack in (None, tmp_path/'out'):
        entries = find_series([tmp_path/n for n in names], unpack=unpack)
        assert [int(read_series(e.series).data.max()) for e in entries] == [100, 300]
        assert all((read_series(e.series).data == v).all() for e, v in zip(entries, (100, 300)))


def test_archives_and_volumes_inside_a_folder_are_counted(tmp_path):
    (tmp_path/'x').mkdir()
    for n in ('a.zip', 'b.ZIP', 'c.nii.gz', 'd.txt'): (tmp_path/'x'/n).write_bytes(b'x'*200)
    e, = find_series(tmp_path/'x')
    assert e.refusal.code == 'NO_DICOM' and '4 files (zip archives: 2, NIfTI: 1)' in e.refusal.cause
    assert find_series(tmp_path/'x'/'c.nii.gz')[0].refusal.cause == 'no DICOM file among 1 files' # was given by name
    discs(100, tmp_path/'y')
    (tmp_path/'x'/'a.zip').rename(tmp_path/'y'/'a.zip')
    assert find_series(tmp_path/'y')[0].verdict == 'ok, ARCHIVE'


def test_a_folder_that_cannot_be_listed_is_one_entry(tmp_path, monkeypatch):
    discs(100, tmp_path/'s'/'b')
    discs(200, tmp_path/'s'/'c')
    for n in ('SECRET', 'b/SECRET'): (tmp_path/'s'/n).mkdir()
    scandir = os.scandir
    def closed(folder):
        if os.path.basename(folder) == 'SECRET': raise PermissionError(13, 'Permission denied')
        return scandir(folder)
    monkeypatch.setattr(os, 'scandir', closed)
    entries = find_series(tmp_path/'s')
    lost = [e.refusal for e in entries if e.refusal]
    assert sorted(e.verdict for e in entries) == ['UNREADABLE', 'UNREADABLE', 'ok', 'ok']
    assert len({e.cause for e in lost}) == 2 and all('cannot be listed: Permission denied' in e.cause for e in lost)
    assert not any('SECRET' in str(e) for e in lost)
    assert [e.verdict for e in find_series(tmp_path/'s'/'SECRET')] == ['UNREADABLE']


def test_what_is_no_file_no_folder_and_no_archive(tmp_path):
    os.mkfifo(tmp_path/'pipe')
    for path in (tmp_path/'pipe', '/dev/null'):
        e, = find_series(path)
        assert e.refusal.code == 'UNREADABLE' and 'is not a regular file or folder' in e.refusal.cause
    import zipfile
    with zipfile.ZipFile(tmp_path/'empty', 'w'): pass
    (tmp_path/'corrupt.zip').write_bytes(b'PK\3\4' + bytes(range(200)))
    (tmp_path/'zero.zip').touch()
    for name, what in (('empty', 'is empty'), ('corrupt.zip', 'is damaged'), ('zero.zip', 'is damaged')):
        e, = find_series(tmp_path/name)
        assert e.refusal.code == 'ZIP' and f'the archive {what}' in e.refusal.cause
    path = discs(100, tmp_path/'s')[0] # a DICOM file that ends in an archive stays one
    path.write_bytes(path.read_bytes() + (tmp_path/'empty').read_bytes())
    assert find_series(path)[0].refusal.code != 'ZIP'


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    import zipfile

    from jfr2020.ground.errors import StoreError
    from jfr2020.dicom import walk as files_room
    with zipfile.ZipFile(tmp_path/'a.zip', 'w') as z:
        for p in discs(100, tmp_path/'s'): z.write(p, p.name)
    def full(path, mode):
        f = open(path, mode, buffering=0)
        f.truncate(10)
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(files_room, 'open', full, raising=False)
    with pytest.raises(StoreError, match='DISK: .*No space left'): find_series(tmp_path/'a.zip', unpack=tmp_path/'out')
    assert list((tmp_path/'out').iterdir()) == []
