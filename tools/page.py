"`tools/page.py NOTEBOOK...`: export a notebook, run it top to bottom keeping its outputs, clean it. Exit 1 if a cell fails."
import os, sys
from pathlib import Path

from fastcore.nbio import read_nb, write_nb
from execnb.shell import CaptureShell
from nbdev.clean import nbdev_clean
from nbdev.doclinks import _build_modidx
from nbdev.export import nb_export


def flags(cell) -> set: # directives of a code cell, e.g. {'hide', 'eval: false'}
    lines = [l.strip() for l in cell.source.splitlines()]
    return {l.removeprefix('#|').strip() for l in lines if l.startswith('#|')} if cell.cell_type == 'code' else set()


def tidy(nb):
    "Hidden cells keep no output, nor do those on real data; progress and warnings are never kept"
    for c in nb.cells:
        if c.cell_type == 'code': c.outputs = [] if flags(c) & {'hide', 'default_exp', 'data'} else [o for o in c.get('outputs', []) if o.get('name') != 'stderr']


root = Path(__file__).resolve().parents[1]


def run_page(
    path:Path, # a notebook
) -> bool: # did every cell run
    "Export, run, save and clean one notebook"
    nb_export(path)
    if pandas := sys.modules.get('pandas'): pandas.reset_option('^display') # what an earlier page of this process has set
    nb, shell, here = read_nb(path), CaptureShell(path, mpl_format='png'), Path.cwd()
    os.chdir(path.parent); os.environ['IN_TEST'] = '1'
    passed_over = {'eval: false', 'slow', 'cuda'} | (set() if (root/'..'/'shared'/'data').is_dir() else {'data'})
    try: shell.run_all(nb, exc_stop=True, preproc=lambda c: bool(flags(c) & passed_over))
    except BaseException: print(shell.prettytb(fname=path), file=sys.stderr); return False
    finally: os.chdir(here); os.environ.pop('IN_TEST')
    tidy(nb)
    write_nb(nb, path)
    nbdev_clean(str(path))
    return True


if __name__ == '__main__':
    pages = [Path(p).resolve() for p in sys.argv[1:]] or sorted((root/'nbs').rglob('*.ipynb'))
    os.chdir(root)
    os.environ.setdefault('MPLBACKEND', 'agg'); sys.path.insert(0, str(root))
    done = all([run_page(p) for p in pages])
    _build_modidx()
    sys.exit(not done)
