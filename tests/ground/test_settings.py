"Settings: read, checked, saved and read again; and fastai's schedules made from them"
import argparse
import io
import json
import math
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
from hypothesis import HealthCheck, given, settings as how, strategies as st

from jfr2020.ground.disk import value_hash
from jfr2020.ground.errors import ConfigError, JfrError, StoreError
from jfr2020.ground.settings import (MISSING, Between, Settings, config_options, find_setting, flat_settings, list_settings, read_settings,
                              save_settings, trace_settings, value_of)
from jfr2020.ct.config import CalciumConfig, DataSettings
from jfr2020.train.config import ScheduleSettings
from jfr2020.ground.volume_view import WINDOWS


@dataclass(frozen=True)
class Inner(Settings):
    "Inner part"
    on:bool = False # a flag, with a # in its comment
    k:Annotated[int, Between(-5, 5)] = 0 # a whole number
    x:float = .5 # a number
    name:str = 'a # b' # a text
    kind:Literal['one','two'] | None = None # a word
    sizes:tuple[int, ...] = () # some numbers
    pair:tuple[float, float] = (1., 2.) # two numbers
    more:dict = field(default_factory=dict) # free arguments


@dataclass(frozen=True)
class Deep(Settings):
    "Middle part"
    inner:Inner = Inner(k=3) # deeper
    k:int = 1 # its own k


@dataclass(frozen=True)
class Whole(Settings):
    "All"
    deep:Deep = Deep() # nested twice
    lr:float | Literal['find'] = .1 # a number or a word
    steps:int = None # a number or none


names = st.from_regex(r'[a-z_][a-z0-9_]{0,6}', fullmatch=True)
real = st.floats(allow_nan=False, allow_infinity=False)
plain = st.none() | st.booleans() | st.integers(-2**53, 2**53) | real | st.text(max_size=5)
inner = st.builds(Inner, on=st.booleans(), k=st.integers(-5, 5), x=real, kind=st.sampled_from(['one', 'two', None]),
                  name=st.text(max_size=8).filter(str.isprintable), sizes=st.lists(st.integers(-9, 9), max_size=4).map(tuple),
                  pair=st.tuples(real, real), more=st.dictionaries(names, plain | st.lists(plain, max_size=3).map(tuple), max_size=3))
whole = st.builds(Whole, deep=st.builds(Deep, inner=inner, k=st.integers(-99, 99)), lr=real | st.just('find'),
                  steps=st.none() | st.integers(-9, 9))


@how(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(whole)
def test_saved_settings_read_again_are_equal(tmp_path, s):
    path = save_settings(s, tmp_path/'config.json')
    assert read_settings(Whole, path) == s
    assert json.loads(path.read_text())['hash'] == value_hash(s)


def toml(d, before=''): # of plain values, enough for this test
    said = {k: v for k,v in d.items() if v is not None}
    lines = [f'{k} = {json.dumps(v, ensure_ascii=False)}' for k,v in said.items() if not isinstance(v, dict)]
    tables = [f'[{before}{k}]\n{toml(v, before+k+".")}' for k,v in said.items() if isinstance(v, dict)]
    return '\n'.join(lines + tables)


@pytest.mark.skipif(sys.version_info < (3, 11), reason='TOML needs Python 3.11')
@how(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(whole.filter(lambda s: None not in s.deep.inner.more.values() and not any(isinstance(v, tuple) for v in s.deep.inner.more.values())))
def test_toml_says_the_same_as_json(tmp_path, s):
    (tmp_path/'c.toml').write_text(toml(s.as_dict()), 'utf-8')
    (tmp_path/'c.json').write_text(json.dumps(s.as_dict()), 'utf-8')
    assert read_settings(Whole, tmp_path/'c.toml') == read_settings(Whole, tmp_path/'c.json') == s


def words_of(s): # how somebody would write it on the command line
    out = []
    for k,v in flat_settings(s).items():
        if isinstance(v, tuple): out.append(f'--{k}=' + ','.join(map(repr, v)))
        else: out.append(f'--{k}=' + ('none' if v is None else v if isinstance(v, str) else json.dumps(v)))
    return out


@how(max_examples=60, deadline=None)
@given(whole)
def test_every_value_can_be_said_in_words(s):
    assert read_settings(Whole, words=words_of(s)) == s
    apart = [w for word in words_of(s) for w in (word.split('=', 1) if word[-1] != '=' else [word])]
    if s.deep.inner.name: assert read_settings(Whole, words=apart) == s or s.deep.inner.name.startswith('--')
    parser = argparse.ArgumentParser(allow_abbrev=False)
    config_options(parser, Whole)
    assert read_settings(Whole, words=parser.parse_args(words_of(s)).words) == s


@how(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(['--lr', '--k', '--deep.k', '--on', '--sizes', '--more', '3', '-1', 'none', 'true', '{}', '', '=', '--'])
                | st.text(max_size=6), max_size=6))
def test_any_words_are_settings_or_a_refusal(words):
    try: assert isinstance(read_settings(Whole, words=words), Whole)
    except ConfigError as e: assert len(str(e)) < 600


@how(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.recursive(plain, lambda o: st.lists(o, max_size=3) | st.dictionaries(st.sampled_from(['deep', 'inner', 'k', 'lr', 'x', 'on', 'sizes',
                    'pair', 'more', 'schema', 'settings']) | st.text(max_size=4), o, max_size=4), max_leaves=8))
def test_any_json_is_settings_or_a_refusal(tmp_path, value):
    (tmp_path/'c.json').write_text(json.dumps(value))
    try: assert isinstance(read_settings(Whole, tmp_path/'c.json'), Whole)
    except ConfigError as e: assert len(str(e)) < 600


@pytest.mark.parametrize('text,said', [
    ('{"lr": NaN}', 'lr: a number or one of find needed'), ('{"lr": 1e999}', 'lr: a number'), ('{"lr": true}', 'lr: a number'),
    ('{"steps": 1.0}', 'steps: a whole number or none needed'), ('{"steps": '+'9'*5000+'}', 'c.json'),
    ('{"steps": '+'9'*30+'}', 'steps: a whole number'), ('{"deep": {"inner": {"on": 1}}}', 'deep.inner.on: true or false needed, found 1'),
    ('{"deep": {"inner": {"k": 6}}}', 'from -5 to 5 needed, found 6'), ('{"deep": {"inner": {"kind": "tow"}}}', "did you mean 'two'?"),
    ('{"deep": {"inner": {"name": "a\\nb"}}}', 'a text on one line needed'), ('{"deep": {"iner": {}}}', "did you mean 'inner'?"),
    ('{"deep": {"inner": {"more": {"a": {"b": 1}}}}}', 'names with plain values needed'), ('['*100000, 'cannot be read as JSON'),
    ('[1]', 'names with values needed, found list'), ('', 'cannot be read as JSON'), ('{"lr": 1} 2', 'cannot be read as JSON'),
    ('{"deep": {"inner": {"pair": [1]}}}', '2 values, each a number, needed'), ('{"schema": "other/1"}', 'of Whole needed'),
    ('{"deep": null}', 'deep: names with values needed')])
def test_a_bad_file_is_refused_with_its_place(tmp_path, text, said):
    (tmp_path/'c.json').write_text(text)
    with pytest.raises(ConfigError) as e: read_settings(Whole, tmp_path/'c.json')
    assert said in str(e.value) and 'c.json' in str(e.value) and str(tmp_path) not in str(e.value)


def test_odd_files_are_refused(tmp_path):
    def refused(path, said):
        with pytest.raises(ConfigError, match=said): read_settings(Whole, path)
    (tmp_path/'big.json').write_text(' '*(1<<20)+'{}'); refused(tmp_path/'big.json', 'at most 1048576 bytes')
    (tmp_path/'latin.json').write_bytes(b'{"a": "\xe9"}'); refused(tmp_path/'latin.json', 'UTF-8')
    (tmp_path/'folder.json').mkdir(); refused(tmp_path/'folder.json', 'is no file')
    os.mkfifo(tmp_path/'pipe.json'); refused(tmp_path/'pipe.json', 'is no file') # and does not wait for a writer
    (tmp_path/'run.py').write_text('lr = 1'); refused(tmp_path/'run.py', '.json or .toml')


def test_later_sources_win_and_say_so(tmp_path):
    (tmp_path/'run.json').write_text('{"lr": 0.2, "deep": {"k": 7}}')
    steps = trace_settings(Whole, tmp_path/'run.json', ['--lr', '.3', '--lr=find'])
    assert steps['lr'] == [('default', .1), ('run.json', .2), ('command line', .3), ('command line', 'find')]
    assert steps['deep.k'][-1] == ('run.json', 7) and steps['deep.inner.k'] == [('default', 3)]
    assert read_settings(Whole, tmp_path/'run.json', ['--lr=find']) == Whole(Deep(k=7), 'find')


def test_a_short_name_must_be_the_only_one():
    assert find_setting(Whole, 'x', '--x').name == 'deep.inner.x'
    with pytest.raises(ConfigError, match='may mean deep.inner.k or deep.k'): read_settings(Whole, words=['--k', '3'])
    assert read_settings(Whole, words=['--deep.k', '3']).deep.k == 3


def test_comments_are_the_help():
    about = {s.name: s.about for s in list_settings(Whole)}
    assert about['deep.inner.on'] == 'a flag, with a # in its comment' and about['deep.inner.name'] == 'a text'
    parser = argparse.ArgumentParser()
    config_options(parser, Whole)
    said = ' '.join(parser.format_help().split())
    for text in ('a word; one of one, two or none (default: none)', '--lr V', '--deep.k V', 'two numbers', '(default: 1.0 2.0)', 'Inner part'):
        assert text in said


def test_settings_cannot_be_changed_nor_made_wrong():
    with pytest.raises(AttributeError): Whole().lr = 3
    with pytest.raises(ConfigError, match='Inner: k'): Inner(k=9)
    with pytest.raises(ConfigError, match='deep.inner.x'): Whole().changed(x='much')
    assert Whole().changed(x=1) == Whole(Deep(Inner(k=3, x=1.)))
    given = dict(a=[1, 2])
    s = Inner(more=given); given['a'] = 3
    assert s.more == dict(a=(1, 2))


def test_a_killed_or_refused_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = save_settings(Whole(), tmp_path/'config.json')
    was = path.read_bytes()
    monkeypatch.setattr(os, 'replace', lambda *a: (_ for _ in ()).throw(OSError(28, 'No space left on device')))
    with pytest.raises(StoreError, match='free some space'): save_settings(Whole(lr=1.), path)
    assert path.read_bytes() == was and [p.name for p in tmp_path.iterdir()] == ['config.json']


def test_an_edited_saved_file_is_refused(tmp_path):
    path = save_settings(Whole(), tmp_path/'config.json')
    path.write_text(path.read_text().replace('"lr": 0.1', '"lr": 0.2'))
    with pytest.raises(ConfigError) as e: read_settings(Whole, path)
    assert e.value.code == 'CHANGED'
    (tmp_path/'own.json').write_text(json.dumps(json.loads(path.read_text())['settings']))
    assert read_settings(Whole, tmp_path/'own.json').lr == .2


def test_python_3_10_says_what_toml_needs(tmp_path, monkeypatch):
    (tmp_path/'run.toml').write_text('lr = 1')
    monkeypatch.setitem(sys.modules, 'tomllib', None)
    with pytest.raises(ConfigError, match='TOML needs Python 3.11'): read_settings(Whole, tmp_path/'run.toml')


def test_the_calcium_config_is_sound(tmp_path):
    every = list_settings(CalciumConfig)
    ends = [s.name.split('.')[-1] for s in every]
    assert len({*ends}) == len(ends) and all(s.about for s in every) and all(s.default is not MISSING for s in every)
    cfg = CalciumConfig()
    assert read_settings(CalciumConfig, save_settings(cfg, tmp_path/'config.json')) == cfg
    for s in every: assert value_of(s.kind, s.default, s.name) == s.default
    for w in WINDOWS: assert DataSettings(grey=w).grey == w
    import jfr2020.ct.losses  # noqa: F401 it enters the losses of calcium
    from jfr2020.models.losses import LOSSES # names that stand in two places must agree
    from jfr2020.ct.preprocessing import CUTS
    words = lambda name: next(s.kind for s in every if s.name == name)
    for name in LOSSES: assert value_of(words('model.loss'), name, 'loss') == name
    for name in CUTS: assert value_of(words('data.cut'), name, 'cut') == name


def test_help_answers_quickly_and_without_torch():
    code = ('import argparse, sys, time; t = time.perf_counter(); from jfr2020.ground.settings import *; from jfr2020.ct.config import *; '
            'p = argparse.ArgumentParser(); config_options(p, CalciumConfig); h = p.format_help(); '
            'print(time.process_time(), "torch" in sys.modules, "fastai" in sys.modules, h.count("(default:"))')
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()
    assert float(out[0]) < 1 and out[1:3] == ['False', 'False'] and int(out[3]) == len(list_settings(CalciumConfig))


# ---- fastai's schedules

@how(max_examples=80, deadline=None)
@given(st.builds(ScheduleSettings, schedule=st.sampled_from(['constant', 'one_cycle', 'cosine', 'restarts', 'multistep', 'delayed']),
                 warmup=st.floats(.001, .999), delay=st.floats(.001, .999), cycles=st.integers(1, 100), cycle_mult=st.floats(1, 10),
                 milestones=st.sets(st.floats(0, 1), max_size=5).map(lambda m: tuple(sorted(m)))),
       st.floats(1e-8, 10), st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_a_rate_is_never_negative_nor_above_its_top(schedule, lr, at):
    from jfr2020.train.optimisers import schedule_of
    f = schedule_of(schedule, lr)['lr']
    for p in (*at, 0., 1.): assert -1e-6*lr <= f(p) <= lr*(1+1e-6) and math.isfinite(f(p))


def learner(folder, seed=0, **kwargs):
    import random
    import numpy as np
    import torch
    from fastai.basics import DataLoader, DataLoaders, Learner
    import torch.nn.functional as F
    random.seed(seed); np.random.seed(seed); torch.manual_seed(seed)
    x = torch.randn(32, 3)
    data = [(a, a.sum()[None]) for a in x]
    dls = DataLoaders(DataLoader(data, bs=4, shuffle=True), DataLoader(data[:8], bs=4), device='cpu')
    net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(.2), torch.nn.Linear(8, 1))
    return Learner(dls, net, F.mse_loss, path=folder, **kwargs)


def quiet(learn):
    for cb in [cb for cb in learn.cbs if type(cb).__name__ == 'ProgressCallback']: learn.remove_cb(cb)
    learn.logger = lambda *a: None
    return learn


def weights(learn): return {k: v.clone() for k,v in learn.model.state_dict().items()}


def same(a, b): return all((a[k] == b[k]).all() for k in a)


@pytest.mark.parametrize('name', ['one_cycle', 'restarts', 'multistep', 'plateau'])
@pytest.mark.parametrize('optimiser', ['adamw', 'ranger'])
def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path, name, optimiser):
    from fastai.basics import Callback
    from jfr2020.train.callbacks import ResumeState, SaveState
    from jfr2020.train.optimisers import fit_config, make_opt_func
    class Stop(Callback):
        def after_batch(self):
            if self.training and self.epoch == 3: raise KeyboardInterrupt
    cfg = CalciumConfig().changed(schedule=name, optimiser=optimiser, max_epochs=6, lr=.05, wait=1, drop=2., cycles=2)
    make = lambda where: quiet(learner(tmp_path, opt_func=make_opt_func(cfg.opt)))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        calm = fit_config(make('a'), cfg)
        with pytest.raises(KeyboardInterrupt): fit_config(make('b'), cfg, [SaveState(tmp_path/'run'), Stop()])
        again = fit_config(make('c'), cfg, [SaveState(tmp_path/'run'), ResumeState(tmp_path/'run', must=True)])
    assert calm.recorder.lrs == again.recorder.lrs
    assert same(weights(calm), weights(again))


@pytest.mark.parametrize('optimiser', ['sgd', 'adamw', 'radam', 'ranger', 'larc', 'lamb'])
def test_looking_for_a_rate_changes_nothing_else(tmp_path, optimiser):
    from jfr2020.train.optimisers import find_lr, fit_config, make_opt_func
    cfg = CalciumConfig().changed(lr='find', max_epochs=2, optimiser=optimiser)
    looked = quiet(learner(tmp_path, opt_func=make_opt_func(cfg.opt)))
    found = find_lr(looked, cfg)
    fit_config(looked, found)
    told = fit_config(quiet(learner(tmp_path, opt_func=make_opt_func(cfg.opt))), found)
    assert found.opt.lr != 'find' and found.changed(lr='find') == cfg
    assert same(weights(looked), weights(told))


def test_a_lowered_rate_is_not_told_on_stdout(tmp_path, capsys):
    from jfr2020.train.optimisers import fit_config, make_opt_func
    cfg = CalciumConfig().changed(schedule='plateau', max_epochs=4, lr=1e-9, wait=1)
    learn = quiet(learner(tmp_path, opt_func=make_opt_func(cfg.opt)))
    fit_config(learn, cfg.changed(lr=1e-10, weight_decay=0., momentum=0., seed=1)) # too low: it does not get better
    out = capsys.readouterr()
    assert out.out == '' and 'reducing lr' in out.err
    assert isinstance(ConfigError('x'), JfrError) and io # the kinds a caller catches
