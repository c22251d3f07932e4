"Side-by-side timing: every round runs every method once, in rotated order, after a warm-up; medians and minima are printed as ratios."
import gc, os, time
from statistics import median


def interleaved(
    methods:dict, # name -> function without arguments
    rounds:int=5, # how often each method runs
) -> dict: # name -> seconds of each round
    "Run all `methods` in every round, rotating the order, after one warm-up each"
    for f in methods.values(): f()
    names, times = list(methods), {n: [] for n in methods}
    for r in range(rounds):
        for n in names[r%len(names):] + names[:r%len(names)]:
            gc.collect()
            t = time.perf_counter(); methods[n](); times[n].append(time.perf_counter()-t)
    return times


def table(
    title:str, # what was measured, with sizes
    times:dict, # from `interleaved`
    base:str, # the method whose time is 1
    target:str='', # what the issue asks for
):
    "Print medians, minima and ratios to `base`"
    print(f'\n{title}  [load {os.getloadavg()[0]:.1f}, threads {os.environ.get("OMP_NUM_THREADS", "?")}]')
    mb, lb = median(times[base]), min(times[base])
    print(f'{"method":44}{"median ms":>11}{"min ms":>10}{"x median":>10}{"x min":>8}')
    for n,t in times.items(): print(f'{n:44}{median(t)*1e3:11.2f}{min(t)*1e3:10.2f}{median(t)/mb:10.2f}{min(t)/lb:8.2f}')
    if target: print(f'asked: {target}')
