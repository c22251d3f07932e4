"kill -9 of a writer: at random moments from outside, and at chosen steps inside (before or after a rename, a flush, a removal)."
import os, random, signal, tempfile, time
from collections import Counter
from pathlib import Path

from jfr2020.store.check import check_store
from jfr2020.store.hdf5 import H5Store, StoreWriter
from tools.faults import NAMES, Plan, carry_out, content, leftovers, verify

STEPS = ('replace', 'fsync', 'unlink') # functions of os at which a writer kills itself


def writer(folder, log, plan, death): # runs in a child until it is killed
    if death: arm(log, *death)
    with StoreWriter(folder) as w:
        os.write(log, b'open\n')
        while True:
            name, version = plan.next()
            os.write(log, f'try {name} {version}\n'.encode())
            if plan.rng.random() < .2: w.set_lists(training=plan.sure())
            carry_out(w, name, version)
            plan.done(name, version)
            os.write(log, f'done {name} {version}\n'.encode())


def arm(log, step, count, before):
    "From now on the process ends itself at the `count`-th call of os.`step`"
    real, left = getattr(os, step), [count]
    def deadly(*a, **kw):
        left[0] -= 1
        target = '' if step == 'fsync' else 'index' if 'index' in str(a[-1]) else 'subject' # which file
        if left[0] == 0: os.write(log, f'at {"before" if before else "after"} {step} {target}\n'.encode())
        if left[0] == 0 and before: os.kill(os.getpid(), signal.SIGKILL)
        try: return real(*a, **kw)
        finally:
            if left[0] == 0: os.kill(os.getpid(), signal.SIGKILL)
    setattr(os, step, deadly)


def one_kill(folder, log, plan, death, moment):
    "Fork a writer, kill it, and return the lines that it wrote about what it did"
    os.ftruncate(log, 0)
    pid = os.fork()
    if pid == 0:
        try: writer(folder, log, plan, death)
        except BaseException as e: os.write(log, f'broke {type(e).__name__}: {str(e)[:200]}\n'.encode())
        finally: os._exit(1)
    if death:
        end = time.monotonic()+20
        while time.monotonic() < end and os.waitpid(pid, os.WNOHANG) == (0, 0): time.sleep(.002)
        if time.monotonic() < end: return os.pread(log, 1<<24, 0).decode().splitlines()
    time.sleep(moment)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return os.pread(log, 1<<24, 0).decode().splitlines()


def after(lines, plan): # what the log says -> subject -> versions it may have; commits; what was interrupted
    allowed, commits, doing, broke = {n: {v} | ({None} if n in plan.doubt else set()) for n,v in plan.now.items()}, 0, 'opening', None
    for line in lines:
        word, *rest = line.split(' ', 2)
        if word in ('try', 'done'):
            name, version = rest[0], None if rest[1] == 'None' else int(rest[1])
        if word == 'open': doing = 'between'
        elif word == 'try':
            doing = 'removing' if version is None else 'adding' if allowed[name] == {None} else 'replacing'
            allowed[name] = allowed[name] | {version}
        elif word == 'done': allowed[name], commits, doing = {version}, commits+1, 'between'
        elif word == 'at': doing = ' '.join(rest)
        elif word == 'broke': broke = line
    return allowed, commits, doing, broke


def main(kills=500, seed=0, every=25):
    "Returns rows of (what, number, wanted number) and what was wrong"
    rng, plan, wrong, where, commits, checked = random.Random(seed), Plan(seed), [], Counter(), 0, 0
    fd, path = tempfile.mkstemp()
    os.unlink(path)
    with tempfile.TemporaryDirectory() as d:
        folder = Path(d)/'store'
        for name in NAMES: content(name, 1) # warm
        with StoreWriter(folder) as w: w.add(NAMES[0], **content(NAMES[0], 1))
        plan.now[NAMES[0]] = 1
        for k in range(kills):
            death = (rng.choice(STEPS), rng.randint(1, 12), rng.random() < .5) if k % 2 else None
            os.lseek(fd, 0, os.SEEK_SET)
            lines = one_kill(folder, fd, plan, death, rng.uniform(0, .25))
            allowed, n, doing, broke = after(lines, plan)
            where[doing] += 1; commits += n
            if broke: wrong.append(f'kill {k}: the writer stopped by itself: {broke}')
            plan.now, bad = verify(folder, allowed)
            plan.doubt = {n for n,a in allowed.items() if None in a and plan.now[n] is not None} # a later writer may finish the removal
            checked += sum(v is not None for v in plan.now.values())
            plan.now = {n: None if isinstance(v, str) else v for n,v in plan.now.items()}
            plan.last += 1+sum(l.startswith('try') for l in lines); plan.rng.seed(f'{seed} {k}')
            wrong += [f'kill {k}, {doing}: {b}' for b in bad]
            if (k+1) % every == 0 or k == kills-1:
                with StoreWriter(folder): pass # sweeps
                wrong += [f'kill {k}: not swept: {p}' for p in leftovers(folder)] + [f'kill {k}: check says {f}' for f in check_store(folder)]
        H5Store(folder)
    os.close(fd)
    rows = [('kill -9 of a writer', kills, f'{commits} commits, {checked} subjects read again; ' + ', '.join(f'{n} {w}' for w,n in where.most_common()))]
    return rows, wrong
