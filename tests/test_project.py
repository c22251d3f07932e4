"The house itself: what is exported, what is written twice, what an import may touch."
import ast, configparser, filecmp, importlib, re, shutil, subprocess, sys

import pytest

from tools import house_checks, readme

PAGES = [p.relative_to(house_checks.Path(__file__).parents[1]/'nbs') for p in sorted((house_checks.Path(__file__).parents[1]/'nbs').rglob('*.ipynb'))]
ROOMS = {w: [p.stem[3:] for p in PAGES if p.parent.name == w] for w in house_checks.ORDER} # wing -> rooms, `all` among them
LOW = house_checks.ORDER[:house_checks.ORDER.index(house_checks.TORCH_FROM)]
LIGHT = [f'{w}.{r}' for w in LOW for r in ROOMS[w] if r != house_checks.DOOR] + ['train.runs', 'cli.main']


@pytest.fixture(scope='module')
def settings(root):
    cfg = configparser.ConfigParser(delimiters=['='], interpolation=None)
    cfg.read(root/'settings.ini', encoding='utf-8')
    return cfg['DEFAULT']


@pytest.fixture(scope='module')
def copy(root, tmp_path_factory):
    "The sources without anything built, to export and clean in"
    to = tmp_path_factory.mktemp('copy')
    for name in ('nbs', 'jfr2020'): shutil.copytree(root/name, to/name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    for name in ('settings.ini', 'pyproject.toml', 'setup.py', 'README.md'): shutil.copy(root/name, to)
    return to


def differing(a, b, pattern):
    "Names of files that differ between two folders, or exist in one only"
    names = {p.relative_to(d).as_posix() for d in (a, b) for p in d.rglob(pattern) if '.ipynb_checkpoints' not in p.parts}
    same = lambda n: (a/n).exists() and (b/n).exists() and filecmp.cmp(a/n, b/n, shallow=False)
    return sorted(n for n in names if not same(n))


def nbdev(copy, command):
    "Run one of nbdev's commands in `copy`"
    subprocess.run([sys.executable, '-c', command], cwd=copy, check=True, capture_output=True)


def test_house_checks_are_silent(root):
    assert [' '.join(map(str, o)) for o in house_checks.check(root)] == []


def test_modules_are_what_the_notebooks_export(root, copy):
    nbdev(copy, 'from nbdev.doclinks import nbdev_export; nbdev_export()')
    assert differing(root/'jfr2020', copy/'jfr2020', '*.py') == []


def test_notebooks_are_clean(root, copy):
    nbdev(copy, 'from nbdev.clean import nbdev_clean; nbdev_clean()')
    assert differing(root/'nbs', copy/'nbs', '*.ipynb') == []


def test_readme_is_the_index_page(root):
    assert (root/'README.md').read_text(encoding='utf-8') == readme.markdown(root/'nbs'/'index.ipynb')


def test_readme_python_runs(root, tmp_path):
    blocks = re.findall(r'^```python\n(.*?)^```', (root/'README.md').read_text(encoding='utf-8'), re.M | re.S)
    assert blocks, 'README shows no Python'
    subprocess.run([sys.executable, '-c', '\n'.join(blocks)], cwd=tmp_path, check=True, timeout=120)


def test_the_torch_pin_fits_the_range(root, settings):
    pin = re.search(r'^torch==(\S+)', (root/'constraints.txt').read_text(), re.M)[1]
    low, high = re.search(r'\btorch>=([\d.]+),<(\d+)', settings['requirements']).groups()
    number = lambda s: tuple(int(n) for n in s.split('.'))
    assert number(low) <= number(pin) < number(high)


def test_versions_are_stated_once(root, settings):
    "No file but settings.ini and the generated __version__ repeats the package's version"
    for name in ('setup.py', 'pyproject.toml', 'Makefile', 'constraints.txt'):
        assert f'"{settings["version"]}"' not in (root/name).read_text(), name


@pytest.mark.parametrize('extra', 'codecs compression streamlines dicomout comet lightning cluster bench dev'.split())
def test_extras_are_declared(settings, extra): assert settings[f'extra_{extra}'].split()


def test_every_extra_named_in_the_code_is_declared(root, settings):
    "The name an error tells the user to install exists in settings.ini"
    code = '\n'.join(p.read_text(encoding='utf-8') for p in (root/'jfr2020').rglob('*.py'))
    named = set(re.findall(r"import_extra\(\s*f?['\"][\w.]+['\"],\s*['\"](\w+)['\"]", code)) | set(re.findall(r'jfr2020\[(\w+)\]', code))
    assert named and all(f'extra_{n}' in settings for n in named)


GUARD = '''
import socket, sys
def refuse(*a, **k): raise AssertionError('network touched at import')
socket.socket.connect = socket.create_connection = refuse
import importlib
for name in {names!r}: importlib.import_module('jfr2020.' + name)
banned = {banned!r}
print([m for m in banned if m in sys.modules])
'''
OPTIONAL = ['imagecodecs', 'hdf5plugin', 'pylibjpeg', 'openjpeg', 'jpeg_ls', 'gdcm', 'trx', 'highdicom', 'comet_ml', 'lightning', 'dask', 'distributed',
            'SimpleITK', 'skimage', 'nbdev', 'hypothesis', 'ipywidgets', 'torchvision', 'spacy']


def imported(names, banned):
    out = subprocess.run([sys.executable, '-c', GUARD.format(names=names, banned=banned)], capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
    return out.stdout.strip()


def test_light_modules_import_neither_torch_nor_anything_optional():
    assert imported(LIGHT, OPTIONAL + ['torch', 'fastai', 'pandas', 'matplotlib', 'pydicom', 'scipy', 'nibabel', 'h5py', 'jinja2']) == '[]'


@pytest.mark.parametrize('wing', LOW)
def test_a_wing_below_data_loads_no_torch(wing):
    assert imported([f'{wing}.{r}' for r in ROOMS[wing]], OPTIONAL + ['torch', 'fastai', 'fasttransform']) == '[]'


@pytest.mark.parametrize('wing', ['data', 'models', 'train'])
def test_what_every_network_needs_knows_no_calcium(wing):
    "Lines are learned on the same rooms: they never meet a scan's anatomy, a score, a report"
    assert imported([f'{wing}.{r}' for r in ROOMS[wing]], [f'jfr2020.{w}' for w in ('calcium', 'agreement', 'datasets', 'dicom')]) == '[]'


def test_everything_imports_without_torchvision_or_extras(): assert imported(['all'], OPTIONAL) == '[]'


def defined(path):
    "Public names that a module defines itself: neither re-exports nor methods patched onto a class"
    targets = lambda n: n.targets if isinstance(n, ast.Assign) else [n.target] if isinstance(n, ast.AnnAssign) else []
    out, public = set(), []
    for n in ast.parse(path.read_text(encoding='utf-8')).body:
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)): out.add(n.name)
        names = {t.id for target in targets(n) for t in ast.walk(target) if isinstance(t, ast.Name)}
        if names == {'__all__'} and isinstance(n.value, ast.List): public = ast.literal_eval(n.value)
        out |= names
    return out & set(public)


def test_a_public_name_means_one_thing(root):
    "What `from jfr2020.all import *` brings must not hang on the order of its imports"
    owners = {}
    for path in sorted((root/'jfr2020').rglob('*.py')):
        for n in defined(path): owners.setdefault(n, []).append(path.stem)
    assert {n: o for n,o in owners.items() if len(o) > 1} == {}


@pytest.mark.parametrize('wing', [w for w in house_checks.ORDER if ROOMS[w]])
def test_a_door_brings_every_room_of_its_wing(root, wing):
    brought = set(re.findall(r'^from \.(\w+) import \*', (root/'jfr2020'/wing/'all.py').read_text(encoding='utf-8'), re.M))
    assert brought == {r for r in ROOMS[wing] if r != house_checks.DOOR}


def test_behind_every_door_a_name_is_ours():
    "Where a name is also fastai's or numpy's, a door gives the one of this library"
    rooms = {f'{w}.{r}': importlib.import_module(f'jfr2020.{w}.{r}') for w in house_checks.ORDER for r in ROOMS[w]}
    for door in [importlib.import_module('jfr2020.all'), *(m for n,m in rooms.items() if n.endswith('.'+house_checks.DOOR))]:
        wings = {door.__name__.split('.')[1]} - {house_checks.DOOR} or set(house_checks.ORDER)
        own = {k: o for n,m in rooms.items() if n.split('.')[0] in wings and not n.endswith('.all') for k,o in vars(m).items() if k in m.__all__}
        assert [k for k,o in own.items() if getattr(door, k, None) is not o] == [], door.__name__


def test_the_house_is_in_all(root):
    "`from jfr2020.all import *` brings every wing"
    brought = set(re.findall(r'^from \.(\w+)\.all import \*', (root/'jfr2020'/'all.py').read_text(encoding='utf-8'), re.M))
    assert brought == {w for w in house_checks.ORDER if ROOMS[w]}
