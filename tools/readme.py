"`tools/readme.py [--check]`: write README.md and its pictures (docs/) from nbs/index.ipynb, whose code ran."
import base64, json, re, sys
from pathlib import Path


def output_markdown(
    o:dict, # one output of a cell
    name:str, # file name for a picture
    pictures:dict, # file name -> PNG bytes; filled
) -> str:
    "An output as the README shows it"
    data = o.get('data', {})
    if 'image/png' in data:
        pictures[name] = base64.b64decode(''.join(data['image/png']))
        return f'![what the code above draws](docs/{name})'
    text = ''.join(data.get('text/plain', '') or o.get('text', '')).strip()
    return f'```\n{text}\n```' if text and not text.startswith('<Figure') else ''


def cell_markdown(
    cell:dict, # of a notebook
    pictures:dict, # filled
) -> str: # '' for hidden cells
    "A cell as the README shows it"
    source = ''.join(cell['source']).strip()
    if cell['cell_type'] == 'markdown': return source
    if re.search(r'^#\|\s*(hide|default_exp)', source, re.M): return ''
    code = '\n'.join(l for l in source.splitlines() if not l.startswith('#|'))
    shown = [output_markdown(o, f'index-{cell["id"]}.png', pictures) for o in cell.get('outputs', [])]
    return '\n\n'.join([f'```python\n{code}\n```', *filter(None, shown)])


def markdown(
    index:Path, # nbs/index.ipynb
    pictures:dict=None, # file name -> PNG bytes; filled when given
) -> str:
    "The README's text"
    pictures = {} if pictures is None else pictures
    cells = json.loads(index.read_text(encoding='utf-8'))['cells']
    return '\n\n'.join(filter(None, (cell_markdown(c, pictures) for c in cells))) + '\n'


if __name__ == '__main__':
    root, pictures = Path(__file__).resolve().parents[1], {}
    text, to = markdown(root/'nbs'/'index.ipynb', pictures), root/'README.md'
    if '--check' in sys.argv: sys.exit('README.md differs from nbs/index.ipynb: run make readme' if to.read_text(encoding='utf-8') != text else 0)
    (root/'docs').mkdir(exist_ok=True)
    for old in (root/'docs').glob('index-*.png'): old.unlink()
    for name,png in pictures.items(): (root/'docs'/name).write_bytes(png)
    to.write_text(text, encoding='utf-8')
