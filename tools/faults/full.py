"A disk that is full: small file systems in memory; the writer must say so clearly, lose nothing, and go on when there is room."
import json, os, subprocess, sys, tempfile
from pathlib import Path

from tools.faults import NAMES, Plan, carry_out, leftovers, verify


def can_mount(): # -> how to get a file system of our own, or None
    test = 'mount -t tmpfs -o size=64k tmpfs "$1" && umount "$1"'
    with tempfile.TemporaryDirectory() as d:
        for way in ([], ['unshare', '-Urm'], ['unshare', '-m']):
            try: p = subprocess.run([*way, 'sh', '-c', test, 'sh', d], capture_output=True, timeout=20)
            except (OSError, subprocess.TimeoutExpired): continue
            if p.returncode == 0: return way or ['unshare', '-m'] if os.geteuid() == 0 else way
    return None


def fill(folder, plan): # write until the disk is full -> allowed versions, commits, what the refusal was
    from jfr2020.ground.errors import StoreError
    from jfr2020.store.hdf5 import StoreWriter
    allowed, commits = {n: {v} for n,v in plan.now.items()}, 0
    try:
        with StoreWriter(folder) as w:
            for _ in range(3000):
                name, version = plan.next()
                if version is None or (plan.now[name] is not None and plan.rng.random() < .5): continue # fills sooner
                allowed[name] = allowed[name] | {version}
                carry_out(w, name, version)
                plan.done(name, version); allowed[name] = {version}; commits += 1
                if commits > 8 and all(plan.now.values()) and not grow(folder.parent): return allowed, commits, 'OTHER', ''
    except StoreError as e: return allowed, commits, e.code, str(e)
    except Exception as e: return allowed, commits, type(e).__name__, str(e)
    return allowed, commits, 'NONE', 'the disk did not fill'


def one_size(mount, kb, seed):
    "One file system of `kb` kB: fill, look, make room, go on; a list of what was wrong"
    from jfr2020.store.check import check_store
    from jfr2020.store.hdf5 import StoreWriter
    run = lambda *a: subprocess.run(a, check=True, capture_output=True)
    run('mount', '-t', 'tmpfs', '-o', f'size={kb}k', 'tmpfs', str(mount))
    try:
        plan, folder, wrong, total = Plan(seed), mount/'store', [], 0
        while True:
            allowed, n, code, text = fill(folder, plan)
            total += n
            if code != 'OTHER': break
            allowed, n, code, text = again(folder, plan, allowed)
            total += n
            if code != 'NONE': break
        if code != 'DISK': wrong.append(f'needed a StoreError DISK, got {code}: {text}')
        held = sum(None not in a for a in allowed.values())
        found, bad = verify(folder, allowed)
        wrong += bad + [f'left behind: {p}' for p in leftovers(folder)]
        run('mount', '-o', 'remount,size=32m', str(mount))
        with StoreWriter(folder) as w:
            for k,name in enumerate(NAMES):
                carry_out(w, name, 20_000+k)
        wrong += verify(folder, {name: {20_000+k} for k,name in enumerate(NAMES)})[1]
        wrong += [f'left behind: {p}' for p in leftovers(folder)] + [f'check says {f}' for f in check_store(folder)]
        return dict(kb=kb, commits=total, held=held, text=text, wrong=wrong)
    finally: run('umount', str(mount))


def grow(folder): # somebody else's data on the same disk; False where it does not fit
    try:
        with open(folder/'other', 'ab') as f: f.write(bytes(37_000))
    except OSError: return False
    return True


def again(folder, plan, allowed): # replace subjects while not a byte is free
    from jfr2020.ground.errors import StoreError
    from jfr2020.store.hdf5 import StoreWriter
    n = 0
    try:
        with StoreWriter(folder) as w:
            for name in NAMES:
                plan.last += 1
                allowed[name] = allowed[name] | {plan.last}
                carry_out(w, name, plan.last)
                plan.done(name, plan.last); allowed[name] = {plan.last}; n += 1
    except StoreError as e: return allowed, n, e.code, str(e)
    except Exception as e: return allowed, n, type(e).__name__, str(e)
    return allowed, n, 'NONE', 'there was room'


def main(sizes=20, seed=0):
    "Returns rows and what was wrong; rows say so where no file system could be mounted"
    way = can_mount()
    if way is None: return [('disk full', 0, 'SKIPPED: neither root nor user namespaces may mount a file system here')], []
    kbs = [round(40*(1600/40)**(k/max(1, sizes-1))) for k in range(sizes)]
    p = subprocess.run([*way, sys.executable, '-m', 'tools.faults.full', *map(str, kbs), str(seed)], capture_output=True, text=True)
    done = [json.loads(l) for l in p.stdout.splitlines()]
    wrong = [f'{d["kb"]} kB: {w}' for d in done for w in d['wrong']]
    if p.returncode or len(done) < sizes: wrong.append(f'the writer ended with {p.returncode} after {len(done)} sizes: {p.stderr[-500:]}')
    if 'Exception ignored' in p.stderr: wrong.append(f'{p.stderr.count("Exception ignored")} errors written past the caller')
    held = [d['held'] for d in done] or [0]
    said = sorted({d['text'].split(': ', 1)[-1].split(' ', 3)[-1][:60] for d in done})
    return [('disk full', len(done), f'{kbs[0]}..{kbs[-1]} kB, {sum(d["commits"] for d in done)} commits, {min(held)}..{max(held)} subjects held '
             f'when full; said: {"; ".join(said)}')], wrong


if __name__ == '__main__':
    *kbs, seed = map(int, sys.argv[1:])
    with tempfile.TemporaryDirectory() as d:
        for k in kbs: print(json.dumps(one_size(Path(d), k, seed)), flush=True)
