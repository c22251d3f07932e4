"`python -m tools.faults [--short]`: put faults into a store, count what is lost, wrong or not found; exit 1 if anything is."
import argparse, sys, time

from tools.faults import flips, full, kills, soak

p = argparse.ArgumentParser(prog='python -m tools.faults', description=__doc__)
p.add_argument('--short', action='store_true', help='a run of less than a minute')
p.add_argument('--kills', type=int, help='kill -9 of a writer [500, short 40]')
p.add_argument('--sizes', type=int, help='sizes of a disk that fills [20, short 6]')
p.add_argument('--seconds', type=float, help='of readers beside a writer [60, short 4]')
p.add_argument('--flips', type=int, help='bits turned [1000, short 60]')
p.add_argument('--seed', type=int, default=0, help='of all random choices [0]')
a = p.parse_args()
asked = {k: getattr(a, k) if getattr(a, k) is not None else v[a.short] for k,v in
         dict(kills=(500, 40), sizes=(20, 6), seconds=(60, 4), flips=(1000, 60)).items()}

failed = 0
print(f'{"fault":40}{"done":>8}{"wrong":>8}{"s":>8}  what happened')
for module, name in ((kills, 'kills'), (full, 'sizes'), (soak, 'seconds'), (flips, 'flips')):
    if not asked[name]: continue
    t = time.monotonic()
    rows, wrong = module.main(asked[name], seed=a.seed)
    for what, done, text in rows: print(f'{what:40}{done:8}{len(wrong):8}{time.monotonic()-t:8.1f}  {text}', flush=True)
    for w in wrong[:10]: print(f'    {w}', file=sys.stderr)
    failed += len(wrong)
print('wanted: 0 wrong in every line')
sys.exit(failed > 0)
