"Every page's examples, run against the exported module: what a user imports is what the page shows."
import importlib, os
from pathlib import Path

import pytest
from nbdev.test import nb_test_cells

NBS = Path(__file__).resolve().parents[1]/'nbs'
EXPORTED = {'export', 'exporti', 'exports', 'default_exp'}


def directives(cell): return {l.strip()[2:].split()[0] for l in cell.source.splitlines() if l.strip().startswith('#|') and len(l.strip()) > 2}


def module_of(page): # 22_calcium.ipynb -> jfr2020.calcium; tutorials and the index have none
    stem = page.stem.split('_', 1)[-1]
    return None if stem.startswith('tutorial') or page.stem == 'index' else importlib.import_module(f'jfr2020.{stem}')


@pytest.mark.parametrize('page', sorted(NBS.glob('*.ipynb')), ids=lambda p: p.stem)
def test_page(page, monkeypatch):
    monkeypatch.chdir(NBS)
    monkeypatch.setenv('IN_TEST', '1')
    module = module_of(page)
    names = {**(vars(module) if module else {}), '__name__': '__main__'}
    import matplotlib.pyplot as plt
    for cell in nb_test_cells(page, skip_flags=['notest', 'slow', 'cuda', 'data']):
        if cell.cell_type != 'code' or EXPORTED & directives(cell): continue
        source = os.linesep.join(l for l in cell.source.splitlines() if not l.strip().startswith('#|'))
        exec(compile(source, f'{page.name}#{cell.id}', 'exec'), names)
    plt.close('all')
