"""`make check`: the fast loop of a developer. House rules, lint and export drift, then the pages and tests that a change touches, nearest first, for a minute.

What changed is the difference of the working tree to `--since REV` (default: the last commit, or where the branch left origin/main), and new files. What it touches follows from the imports.
Seconds of earlier runs are read from out/tests.xml, which `make test` and this tool write; what is not there is guessed. `make test` stays the whole check."""
import argparse, ast, json, re, subprocess, sys, time
import xml.etree.ElementTree as ET
from collections import defaultdict
from pathlib import Path

GUESS = dict(page=4., test=10.) # seconds of a page, of a test file, that never ran here
PROJECT, RUNNER = 'tests/test_project.py', 'tests/test_notebooks.py'


def module_of(path): # 'jfr2020/calcium/score.py' -> 'jfr2020.calcium.score'
    return '.'.join(Path(path).with_suffix('').parts).removesuffix('.__init__')


def sources(path, root): # the Python of a file: a page's code cells, one by one
    text = (root/path).read_text(encoding='utf-8')
    if path.endswith('.py'): return [text]
    cells = json.loads(text)['cells']
    return [''.join(l for l in c['source'] if l.lstrip()[:1] not in '%!') for c in cells if c['cell_type'] == 'code']


def asked(path, root):
    "Names of modules that the imports of a file ask for; those that are no module are harmless"
    here, out = module_of(path).split('.')[:-1], set()
    for source in sources(path, root):
        try: tree = ast.parse(source)
        except SyntaxError: continue
        for n in ast.walk(tree):
            if isinstance(n, ast.Import): out |= {a.name for a in n.names}
            if isinstance(n, ast.ImportFrom):
                base = '.'.join([*(here[:len(here)-n.level+1] if n.level else []), *filter(None, [n.module])])
                out |= {base, *(f'{base}.{a.name}' for a in n.names)}
        out |= {f'jfr2020.{m}' for m in re.findall(r"'((?:cli|ct|train)\.\w+)'", source)} # rooms that are opened by name
    return out


def exported(path, root): # the module that a page exports, '' for none
    m = re.search(r'#\| default_exp (\S+?)["\\]', (root/path).read_text(encoding='utf-8'))
    return f'jfr2020.{m[1]}' if m else ''


def distances(changed, files, root):
    "{file: how many imports away the nearest change is} of the files that a change touches; 0 has changed itself"
    names = {module_of(f): f for f in files if f.endswith('.py')}
    users = defaultdict(set)
    for f in files:
        for m in asked(f, root) & names.keys(): users[names[m]].add(f)
    pairs = [(f, names[m]) for f in files if f.endswith('.ipynb') and (m := exported(f, root)) in names]
    for page,module in pairs: users[module].add(page) # a page and its module are one thing
    own = dict(pairs)
    out, now = {}, {g for f in changed for g in (f, own.get(f)) if g in files}
    while now:
        out |= dict.fromkeys(now, max(out.values(), default=-1)+1)
        now = set().union(*(users[f] for f in now))-out.keys()
    return out


def seconds(xml): # {pytest's id: seconds} of earlier runs
    if not xml.exists(): return {}
    cases = ET.parse(xml).iter('testcase')
    return {f'{c.get("classname").replace(".", "/")}.py::{c.get("name")}': float(c.get('time')) for c in cases}


def target(path): # what pytest runs of a touched file, '' for nothing
    if path.endswith('.ipynb'): return f'{RUNNER}::test_page[{path.removeprefix("nbs/").removesuffix(".ipynb")}]'
    return path if re.search(r'(^|/)test_\w+\.py$', path) and path not in (PROJECT, RUNNER) else ''


def choose(touched, known, budget):
    "(what pytest is given, tests left out of it, files left out), nearest first, within `budget` seconds"
    take, less, out, spent = [], [], [], 0.
    for f in sorted(touched, key=lambda f: (touched[f], f)):
        if not (t := target(f)): continue
        cases = {t: known[t]} if t in known else {i: s for i,s in known.items() if i.split('::')[0] == t}
        cases = cases or {t: GUESS['page' if f.endswith('.ipynb') else 'test']}
        slow = [i for i,s in cases.items() if s > budget/4] if t not in cases else []
        need = sum(s for i,s in cases.items() if i not in slow)
        if spent+need > budget: out.append(f); continue
        take.append(t); less += slow; spent += need
    return take, less, out


def git(*words): return subprocess.run(['git', *words], capture_output=True, text=True).stdout.split()


def changes(since): # files that differ from `since`, and new ones
    if not since: since = (git('merge-base', 'HEAD', 'origin/main') or ['HEAD'])[0]
    return sorted({*git('diff', '--name-only', '--diff-filter=d', since), *git('ls-files', '--others', '--exclude-standard')})


def run(*words): return subprocess.run([sys.executable, '-m', *words]).returncode


def main(argv=None) -> int:
    "Exit status: 0 where all that was run passed"
    p = argparse.ArgumentParser('check.py', description=__doc__.splitlines()[0])
    p.add_argument('--since', help='revision to compare with')
    p.add_argument('--budget', type=float, default=80, help='seconds of tests, those of both processes together')
    a, root = p.parse_args(argv), Path.cwd()
    start, changed, xml = time.time(), changes(a.since), root/'out'/'tests.xml'
    bad = subprocess.run([sys.executable, 'tools/house_checks.py', '.']).returncode | run('ruff', 'check', '-q', '.')
    files = git('ls-files', '--cached', '--others', '--exclude-standard', '--', 'jfr2020', 'nbs', 'tests', 'tools')
    files = [f for f in files if f.endswith(('.py', '.ipynb')) and (root/f).exists()]
    touched = distances([f for f in changed if f in files], files, root)
    take, less, out = choose(touched, seconds(xml), a.budget)
    quick = [f'{PROJECT}::test_{k}' for k in ('notebooks_are_clean', 'readme_is_the_index_page')] if changed else []
    print(f'{len(changed)} files changed, {len(take)} pages and test files run', flush=True)
    if take+quick: bad |= run('pytest', '-n', '2', f'--junitxml={root/"out"/"check.xml"}', *quick, *take, *(f'--deselect={i}' for i in less))
    for what,some in (('tests too slow for now', less), ('pages and test files further away', out)):
        if some: print(f'left out, make test runs them: {len(some)} {what}, {", ".join(some[:3])}{" ..." if some[3:] else ""}')
    if not changed: print('nothing changed')
    print(f'{time.time()-start:.0f} s, {"something failed" if bad else "all that was run passed"}')
    return int(bool(bad))


if __name__ == '__main__': sys.exit(main())
