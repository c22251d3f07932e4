"Every page, run against the exported module: what a user imports is what the page shows, and the kept outputs are still true."
import ast, importlib, json, os, re
from pathlib import Path

import pytest
from IPython.lib.pretty import pretty
from nbdev.test import nb_test_cells

from jfr2020.ground.errors import MissingExtra

NBS = Path(__file__).resolve().parents[1]/'nbs'
EXPORTED = {'export', 'exporti', 'exports', 'default_exp'}


def directives(cell): return {l.strip()[2:].split()[0] for l in cell.source.splitlines() if l.strip().startswith('#|') and len(l.strip()) > 2}


def module_of(page): # what a page exports; tutorials and the index export nothing
    cells = (''.join(c['source']) for c in json.loads(page.read_text(encoding='utf-8'))['cells'])
    name = re.search(r'^#\| default_exp (\S+)', next(cells), re.M)
    return importlib.import_module(f'jfr2020.{name[1]}') if name else None


def run_cell(source, name, names):
    "Run a cell; the value of its last expression, as a notebook shows it"
    tree, last = ast.parse(source), None
    if tree.body and isinstance(tree.body[-1], ast.Expr) and not source.rstrip().endswith(';'): last = ast.Expression(tree.body.pop().value)
    exec(compile(tree, name, 'exec'), names)
    return eval(compile(last, name, 'eval'), names) if last else None


def kept(cell):
    "The text of a cell's kept value, '' for none or a picture"
    data = [o.get('data', {}) for o in cell.get('outputs', []) if o.get('output_type') == 'execute_result']
    return ''.join(data[0].get('text/plain', '')) if data and 'image/png' not in data[0] else ''


def comparable(text):
    "`text` with numbers to three digits, and without what differs from run to run: addresses, temporary folders, times"
    text = re.sub(r'0x[0-9a-f]+|/tmp/\S+|2\.25\.\d+|<Figure.*?>|\s+', ' ', text)
    return re.sub(r'-?\d+\.\d+(e[-+]?\d+)?', lambda m: f'{float(m[0]):.3g}', text)


PAGES = sorted(p for p in NBS.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
title = lambda p: p.relative_to(NBS).with_suffix('').as_posix()


@pytest.mark.parametrize('page', PAGES, ids=title)
def test_page(page, monkeypatch): run_page(page, monkeypatch, ['notest', 'slow', 'cuda', 'data'])


@pytest.mark.parametrize('page', [p for p in PAGES if '"#| data' in p.read_text(encoding='utf-8')], ids=title)
def test_page_on_real_data(page, monkeypatch, shared_data): run_page(page, monkeypatch, ['notest', 'slow', 'cuda'])


def run_page(page, monkeypatch, skip_flags):
    "Run the cells of a page that are not exported, and compare what they show with what it keeps"
    import pandas as pd
    pd.reset_option('^display') # what an earlier page of this process has set
    monkeypatch.chdir(page.parent)
    monkeypatch.setenv('IN_TEST', '1')
    module = module_of(page)
    names = {**(vars(module) if module else {}), '__name__': '__main__'}
    import matplotlib.pyplot as plt
    stale = []
    for cell in nb_test_cells(page, skip_flags=skip_flags):
        if cell.cell_type != 'code' or EXPORTED & directives(cell): continue
        source = os.linesep.join(l for l in cell.source.splitlines() if not l.strip().startswith('#|'))
        try: value = run_cell(source, f'{title(page)}#{cell.id}', names)
        except MissingExtra as e: pytest.skip(f'{title(page)}: {e}')
        if (was := kept(cell)) and 'hide' not in directives(cell):
            now = pretty(value)
            if comparable(now) != comparable(was): stale.append(f'{title(page)}#{cell.id} shows\n{was}\nbut gives\n{now}')
    plt.close('all')
    assert not stale, '\n\n'.join(stale)
