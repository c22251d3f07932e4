"Stores made from folders of subjects: the numbers against plain numpy, the refusals, kills, and real scans where they are."
import csv, gzip, json, os, shutil, subprocess, sys, textwrap, time, tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from nibabel.streamlines import ArraySequence, Tractogram, TrkFile

import jfr2020.store.create as create
from jfr2020.ground.errors import ConfigError, GeometryError, StoreError
from jfr2020.store.check import check_store
from jfr2020.files.channels import channel_moments, nifti_head, read_channels
from jfr2020.store.create import create_store, study_lists
from jfr2020.store.groups import find_volume, read_volume_group
from jfr2020.store.hdf5 import H5Store
from jfr2020.files.nifti import VolumeFileError, write_nifti
from jfr2020.store.config import VolumeGroup, load_store_config, read_store_config
from jfr2020.files.tractogram import write_tractogram
from jfr2020.ground.streamlines import Streamlines
from jfr2020.ground.volume import CTVolume, FeatureVolume, MaskVolume

A = np.array([[2.,.1,0,-12], [-.1,1.8,.2,-9], [0,-.2,2.5,-10], [0,0,0,1]]) # (i,j,k) -> RAS+ mm, oblique, no voxel a cube
SHAPE = (12,10,8) # voxels, file order


# ---------------------------------------------------------------- a folder as dwi_ml wants it, written by nibabel alone
def save(path, a, affine=A, **header):
    path.parent.mkdir(parents=True, exist_ok=True)
    img = nib.Nifti1Image(a, affine)
    if header: img.header.set_slope_inter(**header)
    nib.save(img, path)
    return path


def some_lines(rng, n=40, shape=SHAPE):
    "n straight lines between voxels of the grid, RAS+ mm"
    ends = rng.uniform(0, np.array(shape)-1, (n,2,3))
    t = [np.linspace(0, 1, rng.integers(2, 30))[:,None] for _ in range(n)]
    return [((a*(1-u) + b*u) @ A[:3,:3].T + A[:3,3]).astype('f4') for (a,b),u in zip(ends, t)]


def save_trk(path, lines, per_line=None, per_point=None, affine=A, shape=SHAPE):
    path.parent.mkdir(parents=True, exist_ok=True)
    t = Tractogram(ArraySequence(lines), data_per_streamline=per_line, data_per_point=per_point, affine_to_rasmm=np.eye(4))
    TrkFile(t, dict(voxel_to_rasmm=affine.astype('f4'), voxel_sizes=nib.affines.voxel_sizes(affine).astype('f4'),
                    dimensions=np.array(shape, 'i2'), voxel_order=''.join(nib.aff2axcodes(affine)))).save(str(path))


def make_subject(folder, seed, channels=5):
    rng = np.random.default_rng(seed)
    brain = np.zeros(SHAPE, 'u1'); brain[2:-2,2:-2,1:-1] = 1
    sh = rng.normal(3, 2, (*SHAPE, channels)).astype('f4')*brain[...,None]
    truth = dict(sh=sh, brain=brain, t1=rng.normal(100, 10, SHAPE).astype('f4'), lines=some_lines(rng))
    save(folder/'dwi/sh.nii.gz', sh); save(folder/'masks/brain.nii.gz', brain)
    save(folder/f'anat/{seed}x__t1.nii.gz', truth['t1'])
    save_trk(folder/'tracts/whole.trk', truth['lines'],
             dict(bundle_id=np.arange(40.)[:,None].astype('f4'), weight=rng.uniform(size=(40,1)).astype('f4')))
    return truth


CONFIG = {'input': {'type': 'volume', 'files': ['dwi/sh.nii.gz', 'anat/*__t1.nii.gz'], 'standardization': 'all',
                    'std_mask': ['masks/brain.nii.gz']},
          'wm_mask': {'type': 'volume', 'files': 'masks/brain.nii.gz'},
          'tracts': {'type': 'streamlines', 'files': ['tracts/*.trk'], 'dps_keys': ['bundle_id']}}


@pytest.fixture(scope='module')
def study(tmp_path_factory):
    home = tmp_path_factory.mktemp('study')
    truth = {f'sub-{k}': make_subject(home/'dwi_ml_ready'/f'sub-{k}', k) for k in range(3)}
    (home/'config.json').write_text(json.dumps(CONFIG))
    for name,who in dict(training='sub-0', validation='sub-1', testing='sub-2').items():
        (home/f'{name}.txt').write_text(who+'\n')
    return home, truth


@pytest.fixture
def mine(study, tmp_path):
    "A copy of the study that a test may spoil"
    shutil.copytree(study[0]/'dwi_ml_ready', tmp_path/'mine'/'dwi_ml_ready')
    return tmp_path/'mine'


def stored(store): return {p.relative_to(store).as_posix(): p.read_bytes() for p in sorted(Path(store).rglob('*.h5'))} | \
    {'index.json': (Path(store)/'index.json').read_bytes()}


# ---------------------------------------------------------------- values
def theirs(a, how, counts, inside): # dwi_ml's standardisation in plain numpy, float64
    out, ends = a.astype('f8'), np.cumsum([0, *(counts if how == 'per_file' else (a.shape[-1],))])
    for i,j in zip(ends, ends[1:]):
        part = out[...,i:j]
        m = inside if inside is not None else (part != 0).all(-1)
        axis = 0 if how == 'independent' else None
        mean, std = part[m].mean(axis), np.maximum(part[m].std(axis), 1e-6)
        out[...,i:j] = (part-mean)/std
    return out


def test_a_dwi_ml_study_becomes_a_store(study, tmp_path):
    home, truth = study
    lists = {k: home/f'{k}.txt' for k in ('training','validation','testing')}
    made = create_store(load_store_config(home/'config.json'), home, tmp_path/'s', lists)
    assert made.done == ('sub-0','sub-1','sub-2') and not made.refused
    store = H5Store(tmp_path/'s')
    assert store.lists == dict(training=('sub-0',), validation=('sub-1',), testing=('sub-2',))
    for name,t in truth.items():
        s = store[name]
        raw = np.concatenate([t['sh'], t['t1'][...,None]], -1)
        want = theirs(raw, 'all', None, t['brain'] > 0)
        got = s.volume('input')
        np.testing.assert_allclose(got.data, want.transpose(2,1,0,3), atol=2e-6)
        assert isinstance(got, FeatureVolume) and got.data.dtype == np.float32
        attrs = s.attrs('input')
        np.testing.assert_allclose(got.data*attrs['std']+attrs['mean'], raw.transpose(2,1,0,3), atol=1e-4)
        np.testing.assert_allclose(got.geometry.affine[:,[2,1,0,3]], A, atol=1e-6)
        assert s.volume('wm_mask').data.dtype == np.uint8 and isinstance(s.volume('wm_mask'), MaskVolume)
        lines = s.streamlines('tracts').load()
        assert list(lines.per_line) == ['bundle_id'] and lines.per_line['bundle_id'][:,0].tolist() == list(range(40))
        np.testing.assert_allclose(lines.points, np.concatenate(t['lines']), atol=1e-4)
        assert lines.geometry.matches(got.geometry)


@pytest.mark.parametrize('how', ['all', 'independent', 'per_file'])
@pytest.mark.parametrize('masked', [True, False])
def test_standardisation_is_theirs(tmp_path, how, masked):
    rng = np.random.default_rng(3)
    one, two = rng.normal(1000, 3, (*SHAPE,3)).astype('f4'), rng.normal(-2, .1, (*SHAPE,2)).astype('f4')
    one[:3], two[:,:2], two[4,4,4,1] = 0, 0, 0
    m1, m2 = np.zeros((2,*SHAPE), 'i2'); m1[3:6] = 1; m2[5:9,4:] = 7
    paths = [save(tmp_path/'1.nii.gz', one), save(tmp_path/'2.nii', two)]
    masks = [save(tmp_path/'m1.nii.gz', m1), save(tmp_path/'m2.nii', m2)] if masked else []
    group = VolumeGroup('g', ('1', '2'), standardization=how, std_mask=('x',)*bool(masked))
    v,attrs = read_volume_group(find_volume(group, paths, masks))
    want = theirs(np.concatenate([one, two], -1), how, (3,2), (m1+m2) > 0 if masked else None)
    np.testing.assert_allclose(v.data, want.transpose(2,1,0,3), rtol=2e-4, atol=2e-4) # float32 of values about 1000
    assert attrs['channels'] == [3,2] and len(set(attrs['mean'])) == dict(all=1, independent=5, per_file=2)[how]


@given(seed=st.integers(0, 2**20), scale=st.floats(-3, 6), rows=st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_moments_do_not_depend_on_pieces(seed, scale, rows):
    rng = np.random.default_rng(seed)
    a = (rng.normal(10**scale, 1, (rows,3,7,2))).astype('f4')
    inside = rng.random(a.shape[:3]) < .4
    n,mean,m2 = channel_moments(a, inside)
    assert n == inside.sum()
    if n:
        np.testing.assert_allclose(mean, a[inside].mean(0, dtype='f8'), rtol=1e-9)
        np.testing.assert_allclose(m2/n, a[inside].var(0, dtype='f8'), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize('kind', ['u1','i2','>i2','i4','f4','f8','>f8'])
@pytest.mark.parametrize('name', ['v.nii','v.nii.gz'])
def test_channels_are_what_nibabel_reads(tmp_path, kind, name):
    rng = np.random.default_rng(1)
    a = rng.integers(0, 200, (*SHAPE,19)).astype(kind)
    img = nib.Nifti1Image(a, A)
    if np.dtype(kind).byteorder == '>': img = nib.Nifti1Image(a, A, nib.Nifti1Header(endianness='>'))
    img.set_data_dtype(np.dtype(kind).newbyteorder('='))
    if kind == 'i2': img.header.set_slope_inter(.25, -7)
    nib.save(img, tmp_path/name)
    v,counts = read_channels([tmp_path/name])
    np.testing.assert_allclose(v.data, nib.load(tmp_path/name).get_fdata().transpose(2,1,0,3), rtol=1e-6)
    assert counts == (19,) and v.data.flags.c_contiguous


def test_gzip_of_several_members_and_of_damage(tmp_path):
    raw = save(tmp_path/'v.nii', np.random.default_rng(0).normal(size=(*SHAPE,2)).astype('f4')).read_bytes()
    many = tmp_path/'many.nii.gz'
    many.write_bytes(b''.join(gzip.compress(raw[i:i+5000]) for i in range(0, len(raw), 5000)) + bytes(64))
    want = read_channels([tmp_path/'v.nii'])[0].data
    np.testing.assert_array_equal(read_channels([many])[0].data, want)
    whole, rng = gzip.compress(raw), np.random.default_rng(0)
    for k in range(60): # any flipped bit and any cut is found, or changes nothing
        b = bytearray(whole)
        if k % 2: b = b[:int(rng.integers(400, len(b)))]
        else: b[int(rng.integers(400, len(b)))] ^= 1 << int(rng.integers(8))
        (tmp_path/'bad.nii.gz').write_bytes(b)
        with pytest.raises(VolumeFileError): read_channels([tmp_path/'bad.nii.gz'])


def test_a_lie_in_the_header_is_refused_before_memory_is_taken(tmp_path):
    p = save(tmp_path/'v.nii.gz', np.zeros((*SHAPE,2), 'f4'))
    raw = bytearray(gzip.decompress(p.read_bytes()))
    raw[48:50] = (30000).to_bytes(2, 'little') # dim[4], channels
    p.write_bytes(gzip.compress(bytes(raw)))
    with pytest.raises(VolumeFileError): nifti_head(p)


def test_numbers_that_are_none(tmp_path):
    a = np.ones((*SHAPE,2), 'f4'); a[0,0,0] = np.nan
    p, m = save(tmp_path/'v.nii', a), save(tmp_path/'m.nii', np.ones(SHAPE, 'u1'))
    v,attrs = read_volume_group(find_volume(VolumeGroup('g', ('v',)), [p]))
    assert attrs['not_finite'] == 2 and np.isnan(v.data).sum() == 2
    v,attrs = read_volume_group(find_volume(VolumeGroup('g', ('v',), nan_to_zero=True), [p]))
    assert attrs['nan_to_zero'] == 2 and (v.data == 0).sum() == 2 and 'not_finite' not in attrs
    with pytest.raises(GeometryError, match='not numbers'):
        read_volume_group(find_volume(VolumeGroup('g', ('v',), standardization='all', std_mask=('m',)), [p], [m]))
    with pytest.raises(GeometryError, match='65504'):
        big = save(tmp_path/'big.nii', np.full((*SHAPE,2), 1e5, 'f4'))
        read_volume_group(find_volume(VolumeGroup('g', ('v',), dtype='float16'), [big]))


# ---------------------------------------------------------------- config
words = st.text(st.characters(codec='utf-8', categories=('L','N','P','S')), max_size=12)
values = st.recursive(st.none() | st.booleans() | st.integers(-5, 5000) | st.floats() | words, lambda o: st.lists(o, max_size=3))
entries = st.dictionaries(st.sampled_from(['type','files','standardization','std_mask','dps_keys','kind','step_mm','nb_points',
    'connectivity_matrix','connectivity_nb_blocs','reference','several','dtype']) | words,
    st.sampled_from(['volume','streamlines','table','all','mask','a.nii','own']) | values, max_size=6)


@given(st.dictionaries(words, entries | values, max_size=4) | values)
@settings(max_examples=150, deadline=None)
def test_any_config_is_read_or_refused(d):
    try: c = read_store_config(d)
    except ConfigError as e: assert '\n' not in str(e) and len(str(e)) < 600
    else: assert read_store_config(json.loads(json.dumps(c.as_dict()))) == c


def test_lists(tmp_path):
    (tmp_path/'a.txt').write_text('s1\ts2  s3\n\n s4')
    assert study_lists(dict(testing=tmp_path/'a.txt'))['testing'] == ('s1','s2','s3','s4')
    (tmp_path/'empty.txt').write_text('')
    assert study_lists(dict(training=tmp_path/'empty.txt'))['training'] == ()
    with pytest.raises(ConfigError, match='cannot be read') as e: study_lists(dict(training=tmp_path/'gone.txt'))
    assert e.value.code == 'CONFIG' # wrong usage
    with pytest.raises(ConfigError, match='twice in training'): study_lists(dict(training=['a','b','a']))
    with pytest.raises(ConfigError, match='in training and in testing'): study_lists(dict(training=['a'], testing=['a']))


# ---------------------------------------------------------------- what goes wrong between files
def run(config, home, out, **options): return create_store(read_store_config(config), home, out, **options)


def test_all_that_is_missing_is_said_at_once(mine, tmp_path):
    ready = mine/'dwi_ml_ready'
    (ready/'sub-0/dwi/sh.nii.gz').unlink(); (ready/'sub-2/dwi/sh.nii.gz').unlink()
    shutil.copy(ready/'sub-1/anat/1x__t1.nii.gz', ready/'sub-1/anat/again__t1.nii.gz')
    with pytest.raises(StoreError) as e: run(CONFIG, mine, tmp_path/'s', lists=dict(training=['sub-0','sub-1','sub-2','sub-9']))
    for text in ('4 of 4 subjects', 'dwi/sh.nii.gz is missing (subjects: sub-0, sub-2)', 'fits 2 files, one is needed',
                 'the folder of the subject is missing (subjects: sub-9)'): assert text in e.value.cause
    assert not (tmp_path/'s').exists()
    made = run({**CONFIG, 'input': {**CONFIG['input'], 'several': True}}, mine, tmp_path/'s', incomplete='skip')
    assert made.done == ('sub-1',) and H5Store(tmp_path/'s')['sub-1'].volume('input').data.shape[-1] == 7


def test_one_bad_subject_stops_nobody(mine, tmp_path):
    ready = mine/'dwi_ml_ready'
    (ready/'sub-0/dwi/sh.nii.gz').write_bytes(b'nonsense')
    b = bytearray((ready/'sub-1/dwi/sh.nii.gz').read_bytes()); b[len(b)//2] ^= 4
    (ready/'sub-1/dwi/sh.nii.gz').write_bytes(b)
    made = run(CONFIG, mine, tmp_path/'s')
    assert made.done == ('sub-2',) and {s: e.code for s,e in made.refused.items()} == {'sub-0': 'NOT_NIFTI', 'sub-1': 'TRUNCATED'}
    assert H5Store(tmp_path/'s').subjects == ('sub-2',)
    assert not list((tmp_path/'s'/'subjects').glob('.*')) # no half file stays
    assert str(tmp_path) not in repr(made) and '.nii' not in repr(made.refused)


@pytest.mark.parametrize('spoil,code', [
    (lambda s: save(s/'masks/brain.nii.gz', np.ones(SHAPE, 'u1'), A+np.eye(4)[:,[3,1,2,0]]*.5), 'SPACE'),
    (lambda s: save(s/'masks/brain.nii.gz', np.ones((12,10,9), 'u1')), 'SPACE'),
    (lambda s: save(s/'masks/brain.nii.gz', np.zeros(SHAPE, 'u1')), 'EMPTY'),
    (lambda s: save(s/'anat/0x__t1.nii.gz', np.ones(SHAPE, 'f4'), A+np.diag([1e-3,0,0,0])), 'SPACE'),
    (lambda s: save_trk(s/'tracts/whole.trk', some_lines(np.random.default_rng(0)), affine=A+np.diag([0,0,.05,0])), 'SPACE'),
    (lambda s: save_trk(s/'tracts/whole.trk', some_lines(np.random.default_rng(0))), 'NO_DATA'),
    (lambda s: save_trk(s/'tracts/whole.trk', [l+60 for l in some_lines(np.random.default_rng(0))],
                        dict(bundle_id=np.zeros((40,1), 'f4'))), 'OUTSIDE')])
def test_clashes_between_files(mine, tmp_path, spoil, code):
    spoil(mine/'dwi_ml_ready/sub-0')
    made = run(CONFIG, mine, tmp_path/'s')
    assert {s: e.code for s,e in made.refused.items()} == {'sub-0': code}, made
    assert made.done == ('sub-1','sub-2')
    said = str(made.refused['sub-0'])
    assert any(g in said for g in CONFIG), said # of which group
    if code == 'SPACE' and 'std_mask' not in said and 'file' not in said: assert 'reference = "own"' in said


def test_a_file_counts_once(mine, tmp_path):
    config = {**CONFIG, 'tracts': {**CONFIG['tracts'], 'files': ['tracts/whole.trk', 'tracts/*.trk']}}
    with pytest.raises(StoreError, match='names already'): run(config, mine, tmp_path/'s')


def test_lines_outside_are_left_out_only_when_asked(mine, tmp_path):
    lines = some_lines(np.random.default_rng(0), 10)
    lines[3] = lines[3] + np.float32(100); lines[7][-1] += 50
    save_trk(mine/'dwi_ml_ready/sub-0/tracts/whole.trk', lines, dict(bundle_id=np.arange(10.)[:,None].astype('f4')))
    made = run(CONFIG, mine, tmp_path/'s')
    assert '2 of 10 lines leave the box of input' in made.refused['sub-0'].cause
    config = {**CONFIG, 'tracts': {**CONFIG['tracts'], 'remove_invalid': True}}
    run(config, mine, tmp_path/'t')
    s = H5Store(tmp_path/'t')['sub-0'].streamlines('tracts')
    assert s.load().per_line['bundle_id'].ravel().tolist() == [0,1,2,4,5,6,8,9] and s.attrs['removed_outside'] == 2


def test_a_tck_takes_the_space_that_the_config_names(mine, tmp_path):
    fine = A @ np.diag([.5,.5,.5,1])
    for s in (mine/'dwi_ml_ready').iterdir():
        save(s/'anat/fine.nii.gz', np.ones((24,20,16), 'f4'), fine)
        lines = Streamlines.from_list(some_lines(np.random.default_rng(0)))
        (s/'tracts/whole.trk').unlink(); write_tractogram(lines, s/'tracts/whole.tck')
    groups = {'a': dict(type='volume', files='dwi/sh.nii.gz'), 'b': dict(type='volume', files='anat/fine.nii.gz', reference='own')}
    tracts = dict(type='streamlines', files='tracts/whole.tck')
    for order,reference,shape in (('ab', '', (8,10,12)), ('ab', 'b', (16,20,24))):
        out = tmp_path/f's{reference}'
        run({**{k: groups[k] for k in order}, 'tracts': {**tracts, 'reference': reference}}, mine, out)
        assert H5Store(out)['sub-1'].streamlines('tracts').geometry.shape == shape
    made = run({**groups, 'b': dict(type='volume', files='anat/fine.nii.gz'), 'tracts': tracts}, mine, tmp_path/'c')
    assert {e.code for e in made.refused.values()} == {'SPACE'} # without 'own' all volumes share a grid
    made = run({'tracts': tracts}, mine, tmp_path/'d')
    assert {e.code for e in made.refused.values()} == {'NO_AFFINE'}
    run({'tracts': {**tracts, 'reference': 'own'}}, mine, tmp_path/'e')
    assert H5Store(tmp_path/'e')['sub-1'].streamlines('tracts').geometry is None


def test_lines_of_several_files_their_data_and_their_resampling(mine, tmp_path):
    for k,s in enumerate(sorted((mine/'dwi_ml_ready').iterdir())):
        rng = np.random.default_rng(k)
        lines = some_lines(rng, 6)
        save_trk(s/'tracts/z.trk', lines, dict(bundle_id=np.full((6,1), 9, 'f4')), dict(fa=[rng.random((len(p),1)).astype('f4') for p in lines]))
    drop = {k: v for k,v in CONFIG['tracts'].items() if k != 'dps_keys'}
    for name,tracts,keys in (('listed', CONFIG['tracts'], ['bundle_id']), ('common', drop, ['bundle_id'])):
        run({**CONFIG, 'tracts': tracts}, mine, tmp_path/name)
        s = H5Store(tmp_path/name)['sub-1'].streamlines('tracts')
        assert len(s) == 46 and list(s.per_line) == keys and s.attrs['lines_a_file'].tolist() == [40,6]
    for k,v in dict(step_mm=.5, nb_points=12, compress_mm=.1).items():
        c = read_store_config(CONFIG).with_lines(**{k: v})
        create_store(c, mine, tmp_path/k)
        s = H5Store(tmp_path/k)['sub-0'].streamlines('tracts')
        assert s.attrs[k] == v
        if k == 'nb_points': assert set(s.lengths) == {12}
        if k == 'compress_mm': assert set(s.lengths) <= set(range(2,6))
        if k == 'step_mm':
            step = s.lengths_mm/(s.lengths-1)
            assert np.abs(step-.5).max() < .13
    half = create_store(read_store_config(CONFIG).with_lines(float16=True), mine, tmp_path/'half')
    assert half.done and H5Store(tmp_path/'half')['sub-0'].attrs('tracts')['max_error_mm'] < .02


def test_trx_groups_and_connectivity_by_labels(mine, tmp_path):
    from jfr2020.files.channels import nifti_head
    labels = np.zeros(SHAPE, 'i2'); labels[:4], labels[8:] = 3, 11
    for s in (mine/'dwi_ml_ready').iterdir():
        g = nifti_head(s/'dwi/sh.nii.gz').geometry
        lines = Streamlines.from_list(some_lines(np.random.default_rng(0), 4), {'groups/left': np.array([1,0,1,1], bool)}, geometry=g)
        write_tractogram(lines, s/'tracts/whole.trx')
        save(s/'labels.nii.gz', labels); np.save(s/'conn.npy', np.array([[4,0],[0,1]]))
    config = {**CONFIG, 'tracts': dict(type='streamlines', files='tracts/whole.trx', connectivity_matrix='conn.npy',
                                       connectivity_labels='labels.nii.gz')}
    assert len(run(config, mine, tmp_path/'s').done) == 3
    s = H5Store(tmp_path/'s')['sub-2'].streamlines('tracts')
    assert s.per_line['groups:left'].ravel().tolist() == [1,0,1,1]
    assert s.extra['connectivity_matrix'].tolist() == [[1,0],[0,1]]
    np.testing.assert_array_equal(s.extra['connectivity_labels'], labels.T)
    np.save(mine/'dwi_ml_ready/sub-0/conn.npy', np.eye(3))
    assert 'labels' in run(config, mine, tmp_path/'t').refused['sub-0'].cause


def test_tables_and_a_ct_of_other_formats(tmp_path):
    from jfr2020.ground.geometry import Geometry
    from jfr2020.dicom.writing import write_series
    hu = np.full((6,40,40), -900, 'i2'); hu[1:5,8:30,8:30] = 35
    g = Geometry.from_spacing(hu.shape, (3,1,1))
    for k in range(2):
        s = tmp_path/'study'/f'p{k}'
        write_series(CTVolume(hu+np.int16(k), g), s/'series')
        write_nifti(CTVolume(hu, g), s/'ct.nii.gz')
        with open(s/'scores.csv', 'w', newline='') as f: csv.writer(f).writerows([['reader','agatston'], ['A', 12.5*k], ['B', 3]])
    config = {'ct': dict(type='volume', files='series', storage='gzip'), 'again': dict(type='volume', files='ct.nii.gz', kind='ct'),
              'scores': dict(type='table', files='scores.csv')}
    made = run(config, tmp_path/'study', tmp_path/'s')
    assert made.done == ('p0','p1'), made
    s = H5Store(tmp_path/'s')['p1']
    assert isinstance(s.volume('ct'), CTVolume) and s.volume('ct').data.dtype == np.int16
    np.testing.assert_array_equal(s.volume('ct').data, hu+1)
    assert s.attrs('ct')['series_uid'].replace('.', '').isdigit() and s.table('scores')['agatston'].tolist() == [12.5, 3]
    (tmp_path/'study/p0/series'/sorted(os.listdir(tmp_path/'study/p0/series'))[2]).unlink() # a missing slice
    made = run(config, tmp_path/'study', tmp_path/'t')
    assert made.done == ('p1',) and made.refused['p0'].code == 'MISSING_SLICE'


# ---------------------------------------------------------------- again, stopped, replaced
def test_same_bytes_whatever_the_order_of_the_work(study, tmp_path):
    home,_ = study
    run(CONFIG, home, tmp_path/'one'); run(CONFIG, home, tmp_path/'two', workers=2)
    run(CONFIG, home, tmp_path/'some', lists=dict(training=['sub-2','sub-0']))
    run(CONFIG, home, tmp_path/'some', lists=None)
    one = stored(tmp_path/'one')
    assert stored(tmp_path/'two') == one
    assert {k: v for k,v in stored(tmp_path/'some').items() if k != 'index.json'} == {k: v for k,v in one.items() if k != 'index.json'}


def test_a_stopped_run_goes_on(study, tmp_path):
    home,_ = study
    run(CONFIG, home, tmp_path/'whole')
    def stop(k, n, text):
        if k == 2: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): run(CONFIG, home, tmp_path/'s', progress=stop)
    assert len(H5Store(tmp_path/'s')) == 2
    made = run(CONFIG, home, tmp_path/'s')
    assert (made.skipped, made.done) == (('sub-0','sub-1'), ('sub-2',))
    assert stored(tmp_path/'s') == stored(tmp_path/'whole')


def test_stopped_with_workers_leaves_a_whole_store(study, tmp_path):
    home,_ = study
    def stop(k, n, text): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): run(CONFIG, home, tmp_path/'s', workers=2, progress=stop)
    assert len(H5Store(tmp_path/'s')) == 1
    assert len(run(CONFIG, home, tmp_path/'s').done) == 2 and not list((tmp_path/'s').rglob('.part-*'))


def test_killed_at_any_moment_nothing_is_torn(study, tmp_path):
    home,_ = study
    run(CONFIG, home, tmp_path/'whole')
    code = f'''
        from jfr2020.store.create import create_store
        from jfr2020.store.config import load_store_config
        print('ready', flush=True)
        create_store(load_store_config({str(home/"config.json")!r}), {str(home)!r}, {str(tmp_path/"s")!r})'''
    for wait in (.0, .15, .3): # s after the imports; the whole takes about .3
        p = subprocess.Popen([sys.executable, '-c', textwrap.dedent(code)], stdout=subprocess.PIPE)
        p.stdout.readline(); time.sleep(wait); p.kill(); p.wait(); p.stdout.close()
    run(CONFIG, home, tmp_path/'s')
    assert stored(tmp_path/'s') == stored(tmp_path/'whole')
    assert not [f for f in (tmp_path/'s').rglob('.part-*')]


def of_session(leader): # processes that a process started, still alive
    lines = [p.read_text().rsplit(')', 1)[1].split() for p in Path('/proc').glob('[0-9]*/stat') if p.exists()]
    return [l for l in lines if int(l[3]) == leader and l[0] != 'Z']


@pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='looks into /proc')
def test_no_worker_outlives_a_killed_run(study, tmp_path):
    home,_ = study
    words = [sys.executable, '-m', 'jfr2020', 'store', 'create', home, '-o', tmp_path/'s', '--config', home/'config.json', '--workers', '2']
    p = subprocess.Popen([*map(str, words)], start_new_session=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    p.stderr.readline() # the first subject is written: both workers are there
    p.kill(); p.wait(); p.stderr.close()
    for _ in range(50):
        if not of_session(p.pid): break
        time.sleep(.1)
    assert of_session(p.pid) == []


def test_changed_files_are_another_subject(mine, tmp_path):
    run(CONFIG, mine, tmp_path/'s')
    before = stored(tmp_path/'s')
    make_subject(mine/'dwi_ml_ready/sub-1', 77); (mine/'dwi_ml_ready/sub-1/anat/1x__t1.nii.gz').unlink()
    made = run(CONFIG, mine, tmp_path/'s')
    assert made.skipped == ('sub-0','sub-2') and made.refused['sub-1'].code == 'EXISTS' and stored(tmp_path/'s') == before
    made = run(CONFIG, mine, tmp_path/'s', overwrite=True)
    assert made.done == ('sub-1',) and made.skipped == ('sub-0','sub-2') and stored(tmp_path/'s') != before
    other = {**CONFIG, 'input': {**CONFIG['input'], 'standardization': 'independent'}}
    assert len(run(other, mine, tmp_path/'s').refused) == 3


@pytest.mark.parametrize('spoil', [lambda p: p.unlink(), lambda p: os.truncate(p, p.stat().st_size//2)], ids=['gone','cut'])
def test_a_damaged_subject_in_the_store_concerns_nobody_else(mine, tmp_path, spoil):
    run(CONFIG, mine, tmp_path/'s')
    before = stored(tmp_path/'s')
    spoil(H5Store(tmp_path/'s')['sub-1'].path)
    made = run(CONFIG, mine, tmp_path/'s')
    assert made.skipped == ('sub-0','sub-2') and [(s, e.code) for s,e in made.refused.items()] == [('sub-1', 'CHANGED')]
    assert '--overwrite' in made.refused['sub-1'].fix
    assert run(CONFIG, mine, tmp_path/'s', overwrite=True).done == ('sub-1',)
    assert stored(tmp_path/'s') == before and check_store(tmp_path/'s') == []


def dies(job):
    if job[0] == 'bad': os._exit(9)
    return job[0]*2


def test_other_channels_are_remarked(mine, tmp_path):
    make_subject(mine/'dwi_ml_ready/sub-2', 2, channels=3)
    made = run(CONFIG, mine, tmp_path/'s')
    assert len(made.done) == 3 and [f.code for f in made.findings] == ['CHANNELS']
    assert '4 in 1 subjects (sub-2), 6 in 2 subjects (sub-0, ...)' in made.findings[0].text


def test_a_worker_that_dies_takes_nobody_with_it():
    out = {j[0]: r for j,r in create._each(dies, [('a',), ('bad',), ('b',), ('c',)], 2)}
    assert (out['a'], out['b'], out['c']) == ('aa','bb','cc')
    assert create._as_refusal('bad', out['bad']).code == 'WORKER_DIED'


@pytest.mark.parametrize('error,code', [(MemoryError(), 'MEMORY'), (RuntimeError('/home/x'), 'UNREADABLE'), (PermissionError(13, 'no'), 'NO_FILE')])
def test_any_failure_is_a_line(study, tmp_path, monkeypatch, error, code):
    real = create.make_subject
    def broken(plan, *a):
        if plan.subject == 'sub-1': raise error
        return real(plan, *a)
    monkeypatch.setattr(create, 'make_subject', broken)
    made = run(CONFIG, study[0], tmp_path/'s')
    assert made.done == ('sub-0','sub-2') and made.refused['sub-1'].code == code and '/home' not in repr(made)


def test_a_full_disk_stops_everything(study, tmp_path, monkeypatch):
    def full(*a): raise StoreError('cannot write x: No space left on device', 'DISK')
    monkeypatch.setattr(create, 'make_subject', full)
    with pytest.raises(StoreError, match='No space'): run(CONFIG, study[0], tmp_path/'s')


def test_memory_is_that_of_the_largest_group(tmp_path):
    shape, n = (48,48,40), 24
    s = tmp_path/'study/sub-0'
    for k in range(3): save(s/f'{k}.nii', np.random.default_rng(k).normal(size=(*shape,n)).astype('f4'))
    config = read_store_config({f'g{k}': dict(type='volume', files=f'{k}.nii', standardization='independent') for k in range(3)})
    one = np.prod(shape)*n*4
    create_store(config, tmp_path/'study', tmp_path/'warm') # imports
    tracemalloc.start()
    try:
        create_store(config, tmp_path/'study', tmp_path/'s')
        peak = tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()
    assert peak < one*(1+16/n)+10e6, f'{peak/1e6:.1f} MB for groups of {one/1e6:.1f} MB' # the group, 16 channels that wait, the rest


# ---------------------------------------------------------------- real scans and lines
def link(folder, **files):
    for name,source in files.items():
        target = folder/name.replace('__', '.')
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(source)


def test_real_diffusion_and_lines(shared_data, tmp_path):
    d = shared_data/'tracto'
    link(tmp_path/'study/phantom', sh__nii__gz=d/'mrtrix_sift_phantom/derived_nifti/fods.nii.gz',
         tissue__nii__gz=d/'mrtrix_sift_phantom/derived_nifti/5tt.nii.gz', whole__tck=d/'mrtrix_sift_phantom/tracks.tck')
    def config(**options): return {'sh': dict(type='volume', files='sh.nii.gz', standardization='independent', **options),
        'tissue': dict(type='volume', files='tissue.nii.gz', reference='own'),
        'tracts': dict(type='streamlines', files='*.tck', reference='tissue')}
    made = run(config(), tmp_path/'study', tmp_path/'s') # dwi_ml's rule leaves no voxel here, and it would write NaN
    assert 'no voxel where no channel is zero' in made.refused['phantom'].cause
    made = run(config(std_mask='sh.nii.gz'), tmp_path/'study', tmp_path/'s')
    assert made.done == ('phantom',), made
    s = H5Store(tmp_path/'s')['phantom']
    img = nib.load(d/'mrtrix_sift_phantom/derived_nifti/fods.nii.gz')
    v,a = s.volume('sh'), s.attrs('sh')
    np.testing.assert_allclose(v.data*a['std']+a['mean'], img.get_fdata().transpose(2,1,0,3), atol=1e-4)
    want = nib.streamlines.load(d/'mrtrix_sift_phantom/tracks.tck').streamlines
    assert len(s.streamlines('tracts')) == len(want) == 5000
    np.testing.assert_allclose(s.streamlines('tracts').load().points, want.get_data(), atol=1e-4)


def test_real_peaks_and_bundles(shared_data, tmp_path):
    d = shared_data/'tracto/tractseg'
    link(tmp_path/'study/hcp', peaks__nii__gz=d/'peaks.nii.gz', FA__nii__gz=d/'FA.nii.gz', mask__nii__gz=d/'nodif_brain_mask.nii.gz',
         cst__nii__gz=d/'bundle_segmentations/CST_left.nii.gz')
    def config(**options): return {'input': dict(type='volume', files=['peaks.nii.gz','FA.nii.gz'], standardization='per_file',
        std_mask='mask.nii.gz', **options), 'cst': dict(type='volume', files='cst.nii.gz', kind='mask')}
    made = run(config(), tmp_path/'study', tmp_path/'s') # NaN where there is no peak
    assert made.refused['hcp'].code == 'NOT_FINITE'
    made = run(config(nan_to_zero=True), tmp_path/'study', tmp_path/'s')
    assert made.done == ('hcp',), made
    s = H5Store(tmp_path/'s')['hcp']
    assert s.volume('input').data.shape == (73,87,73,10) and np.isfinite(s.volume('input').data).all()
    assert s.attrs('input')['nan_to_zero'] == np.isnan(nib.load(d/'peaks.nii.gz').get_fdata()).sum()
    fa, a = nib.load(d/'FA.nii.gz').get_fdata(), s.attrs('input')
    np.testing.assert_allclose(s.volume('input').data[...,9]*a['std'][9]+a['mean'][9], fa.T, atol=1e-5)
    assert s.volume('cst').data.sum() == (nib.load(d/'bundle_segmentations/CST_left.nii.gz').get_fdata() > 0).sum()
    assert s.volume('cst').data.dtype == np.uint8


def test_real_ct_series_and_one_that_is_refused(shared_data, tmp_path):
    link(tmp_path/'study/a', series=shared_data/'ct/lungdx_A0002_B40f')
    link(tmp_path/'study/b', series=shared_data/'dicom_edge/dcmqa_ge_tilt_uneven_7slices')
    made = run({'ct': dict(type='volume', files='series')}, tmp_path/'study', tmp_path/'s')
    assert made.done == ('a',) and list(made.refused) == ['b'], made
    ct = H5Store(tmp_path/'s')['a'].volume('ct')
    assert isinstance(ct, CTVolume) and ct.data.dtype == np.int16 and ct.shape[0] == 30 and ct.data.min() == -1024
    assert isinstance(ct.data, np.ndarray) and not ct.data.flags.writeable # mapped where it lies
