"`make check` on a toy house: what a change touches, what a minute leaves out, what a failure says."
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools import check


def page(folder, room, *cells):
    (folder/'nbs/wing').mkdir(parents=True, exist_ok=True)
    code = [dict(cell_type='code', source=c.splitlines(True)) for c in (f'#| default_exp wing.{room}\n', *cells)]
    (folder/f'nbs/wing/01_{room}.ipynb').write_text(json.dumps(dict(cells=code)))


@pytest.fixture
def toy(tmp_path):
    "floor <- wall <- roof, and a shed that stands alone; each with a page, some with a test"
    under = dict(floor='', wall='from .floor import *\n', roof='def f():\n    from jfr2020.wing.wall import g\n', shed='')
    for folder in ('jfr2020/wing', 'tests/wing'): (tmp_path/folder).mkdir(parents=True)
    for room,source in under.items():
        (tmp_path/f'jfr2020/wing/{room}.py').write_text(source)
        page(tmp_path, room, source.replace('from .', 'from jfr2020.wing.'))
    (tmp_path/'tests/wing/helper.py').write_text('from jfr2020.wing import floor\n')
    (tmp_path/'tests/wing/test_floor.py').write_text('from tests.wing.helper import x\n')
    (tmp_path/'tests/wing/test_roof.py').write_text('from jfr2020.wing.roof import f\n')
    (tmp_path/'tests/wing/test_shed.py').write_text('import jfr2020.wing.shed\n')
    return tmp_path, [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob('*.*'))]


def touched(toy, *changed): return check.distances(changed, toy[1], toy[0])


def test_a_change_touches_what_imports_it_nearest_first(toy):
    got = touched(toy, 'nbs/wing/01_floor.ipynb')
    assert got['nbs/wing/01_floor.ipynb'] == got['jfr2020/wing/floor.py'] == 0
    assert got['jfr2020/wing/wall.py'] == 1 and got['jfr2020/wing/roof.py'] == 2 # though it imports late
    assert got['tests/wing/test_floor.py'] == 2 and got['tests/wing/test_roof.py'] == 3 # the first by its helper
    assert not any('shed' in f for f in got)


def test_a_module_brings_its_page_and_a_roof_brings_no_floor(toy):
    got = touched(toy, 'jfr2020/wing/roof.py')
    assert set(got) == {'jfr2020/wing/roof.py', 'nbs/wing/01_roof.ipynb', 'tests/wing/test_roof.py'}


def test_a_budget_leaves_out_the_far_and_the_slow_and_says_so(toy):
    got = touched(toy, 'nbs/wing/01_floor.ipynb')
    take, less, out = check.choose(got, {}, 16.)
    assert take[0] == 'tests/test_notebooks.py::test_page[wing/01_floor]' and 'tests/wing/test_roof.py' in out and less == []
    known = {'tests/wing/test_floor.py::test_a': 1., 'tests/wing/test_floor.py::test_b': 30.}
    take, less, out = check.choose(got, known, 60.)
    assert 'tests/wing/test_floor.py' in take and less == ['tests/wing/test_floor.py::test_b']


def test_seconds_are_those_of_the_last_whole_run(tmp_path):
    (tmp_path/'t.xml').write_text('<testsuites><testsuite><testcase classname="tests.wing.test_a" name="test_b[1]" time="2.5"/></testsuite></testsuites>')
    assert check.seconds(tmp_path/'t.xml') == {'tests/wing/test_a.py::test_b[1]': 2.5} and check.seconds(tmp_path/'no.xml') == {}


def test_a_failing_test_is_the_exit_status(tmp_path, monkeypatch, capsys):
    (tmp_path/'tools').mkdir(); (tmp_path/'tests').mkdir()
    (tmp_path/'tools/house_checks.py').write_text('')
    (tmp_path/'pyproject.toml').write_text('')
    test = tmp_path/'tests/test_one.py'
    test.write_text('def test_it():\n    pass\n')
    (tmp_path/'tests/test_project.py').write_text('def test_notebooks_are_clean():\n    pass\n\n\ndef test_readme_is_the_index_page():\n    pass\n')
    monkeypatch.chdir(tmp_path)
    for words in (['init', '-q'], ['add', '.'], ['-c', 'user.name=a', '-c', 'user.email=a@b', 'commit', '-qm', 'one']): subprocess.run(['git', *words], check=True)
    assert check.main([]) == 0 and 'nothing changed' in capsys.readouterr().out
    test.write_text('def test_it():\n    assert True\n'); assert check.main([]) == 0
    test.write_text('def test_it():\n    assert False\n'); assert check.main([]) == 1


def test_every_room_of_the_house_is_reached_from_its_page(root):
    "On the house itself: a change of geometry reaches the command line"
    files = [p.relative_to(root).as_posix() for d in ('jfr2020', 'nbs', 'tests') for p in (root/d).rglob('*') if p.suffix in ('.py', '.ipynb')]
    got = check.distances(['nbs/ground/02_geometry.ipynb'], files, Path(root))
    assert {'jfr2020/ground/geometry.py', 'nbs/cli/07_main.ipynb', 'tests/cli/test_main.py', 'tests/dicom/test_series.py'} <= got.keys()
    assert sys.executable and got['jfr2020/ground/volume.py'] == 1
