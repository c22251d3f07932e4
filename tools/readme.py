"`tools/readme.py [--check]`: write README.md from nbs/index.ipynb, whose code ran."
import json, re, sys
from pathlib import Path


def cell_markdown(
    cell:dict, # of a notebook
) -> str: # '' for hidden cells
    "A cell as the README shows it"
    source = ''.join(cell['source']).strip()
    if cell['cell_type'] == 'markdown': return source
    if re.search(r'^#\|\s*(hide|default_exp)', source, re.M): return ''
    code = '\n'.join(l for l in source.splitlines() if not l.startswith('#|'))
    texts = [''.join(o.get('data', {}).get('text/plain', '') or o.get('text', '')) for o in cell.get('outputs', [])]
    shown = [f'```\n{t.strip()}\n```' for t in texts if t.strip() and not t.startswith('<Figure')]
    return '\n\n'.join([f'```python\n{code}\n```', *shown])


def markdown(
    index:Path, # nbs/index.ipynb
) -> str:
    "The README's text"
    cells = json.loads(index.read_text(encoding='utf-8'))['cells']
    return '\n\n'.join(filter(None, map(cell_markdown, cells))) + '\n'


if __name__ == '__main__':
    root = Path(__file__).resolve().parents[1]
    text, to = markdown(root/'nbs'/'index.ipynb'), root/'README.md'
    if '--check' in sys.argv: sys.exit('README.md differs from nbs/index.ipynb: run make readme' if to.read_text(encoding='utf-8') != text else 0)
    to.write_text(text, encoding='utf-8')
