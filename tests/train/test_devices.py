"Two real processes through `launch`: the curve of one, a killed process, refusals that are one line. Points, no volumes."
import io
import json
import os
import shutil
import sys
from contextlib import redirect_stderr
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

pytestmark = [pytest.mark.filterwarnings('ignore'),
              pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason='torch is without gloo here')]

os.environ['OMP_NUM_THREADS'] = '1'
torch.set_num_threads(1)

from tests.train import two_processes
from jfr2020.train.callbacks import BEST_CKPT, LAST_CKPT, PREVIOUS_CKPT, read_checkpoint
from jfr2020.train.devices import launch, share_positions, share_sizes
from jfr2020.ground.errors import ConfigError
from jfr2020.train.runlog import read_log

PROGRAM = Path(two_processes.__file__)


def start(what, folder, **kwargs):
    said = []
    return launch([sys.executable, PROGRAM, what, folder], 2, say=said.append, **kwargs), said


@pytest.fixture(scope='module')
def both(tmp_path_factory): # what the two processes saw, and their folder
    folder = tmp_path_factory.mktemp('two')
    assert start('everything', folder) == (0, [])
    return [json.loads((folder/f'rank-{r}.json').read_text()) for r in (0, 1)], folder


@pytest.fixture(scope='module')
def accidents(tmp_path_factory): # status, what was said, folder
    folder, heard = tmp_path_factory.mktemp('accidents'), io.StringIO()
    with redirect_stderr(heard): code, said = start('accidents', folder)
    return code, said, heard.getvalue().splitlines(), folder


def test_shares_are_the_batches_of_one():
    for n in range(40):
        for bs, many in ((1, 2), (2, 2), (3, 4), (5, 3)):
            for drop in (False, True):
                mine = [share_positions(n, bs, many, r, drop) for r in range(many)]
                assert len({-(-len(m)//bs) for m in mine}) == 1 # as many steps in each
                whole = n//(bs*many)*bs*many if drop else n
                got = []
                for k in range(-(-whole//(bs*many))):
                    sizes = share_sizes(k, whole, bs, many)
                    got += [i for m, s in zip(mine, sizes) for i in m[k*bs:k*bs+s]]
                    assert all(len(m[k*bs:(k+1)*bs]) == (s or sizes[0]) for m, s in zip(mine, sizes))
                assert got == list(range(whole)) # each once, in the order of one process


@pytest.mark.parametrize('name', two_processes.CURVES)
def test_equals_one_process_with_twice_the_batch(name, both):
    one, two = two_processes.CURVES[name](4), both[0][0][name]
    assert len(one['steps']) == len(two['steps']) > 0
    np.testing.assert_allclose(one['steps'], two['steps'], atol=2e-5)
    np.testing.assert_allclose(one['record'], two['record'], atol=2e-5)
    np.testing.assert_allclose(one['weights'], two['weights'], atol=2e-4)


def test_every_process_has_the_same_record_and_weights(both):
    first, second = both[0]
    for name in (*two_processes.CURVES, 'lines', 'lr_find', 'batchnorm'):
        assert first[name]['record'] == second[name]['record'], name # to the last bit: decisions hang on it
        assert first[name]['weights'] == second[name]['weights'], name
    assert first['lr_find']['lr'] == second['lr_find']['lr']


def test_validates_each_patient_once_whatever_its_shape(both):
    learn = two_processes.lines(1)
    with learn.no_bar(), learn.no_logging(): learn.fit(0)
    learn.model.load_state_dict(dict(zip(learn.model.state_dict(), _like(learn.model, both[0][0]['lines']['weights']))))
    with learn.no_bar(): loss, hits = learn.validate()
    assert both[0][0]['lines']['record'][-1][1:] == pytest.approx([loss, hits], abs=1e-6)


def _like(model, flat): # the tensors of a model out of one row
    flat = torch.tensor(flat, dtype=torch.float32)
    for v in model.state_dict().values():
        yield flat[:v.numel()].view(v.shape)
        flat = flat[v.numel():]


def test_chance_differs_between_processes_and_one_may_validate_alone(both):
    first, second = both[0]
    assert all(a != b for a, b in zip(first['drawn'], second['drawn']))
    assert len(first['alone']) == 2 and 'alone' not in second


def test_killed_processes_start_again_to_the_identical_run(both, accidents):
    _, said, _, folder = accidents
    assert [l.split(';')[0] for l in said[:2]] == ['process 1 was killed by signal 9', 'process 0 was killed by signal 9']
    never, again = both[1]/'never', folder/'killed'
    for name in (LAST_CKPT, BEST_CKPT): assert_same(read_checkpoint(never/name), read_checkpoint(again/name))
    a, b = (read_log(f).drop(columns='seconds') for f in (never, again))
    assert a.equals(b) and list(a['epoch']) == [0, 1, 2, 3]


def test_going_on_in_another_number_of_processes_is_said(both, tmp_path):
    run = tmp_path/'run'
    shutil.copytree(both[1]/'never', run)
    with pytest.warns(UserWarning, match='PROCESSES: the run had 2 processes, now 1'): two_processes.noisy(run)
    os.replace(run/PREVIOUS_CKPT, run/LAST_CKPT) # from inside an epoch, whose batches are others now
    with pytest.raises(ConfigError, match='in as many processes'): two_processes.noisy(run)


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor): assert torch.equal(a, b)
    elif isinstance(a, dict): assert list(a) == list(b); [assert_same(a[k], b[k]) for k in a]
    elif isinstance(a, list): assert len(a) == len(b); [assert_same(x, y) for x, y in zip(a, b)]
    else: assert a == b


def test_a_refusal_of_one_process_is_one_line(accidents):
    code, said, heard, _ = accidents
    lines = [*heard, *said[2:]]
    assert code == 1
    assert len(lines) == 1 and 'NOT_SHARED: batch' in lines[0], lines


BOTH = "import sys; sys.exit('CONFIG: these scans have no labels')"
BUG = "import os, time; 1/int(os.environ['RANK'] == '0'); time.sleep(60)"


@pytest.mark.parametrize('program,line', [(BOTH, 'CONFIG: these scans have no labels'), (BUG, 'ZeroDivisionError: division by zero')])
def test_an_error_is_said_once_and_not_tried_again(program, line, capfd):
    said = []
    code = launch([sys.executable, '-c', program], 2, say=said.append)
    lines = [*capfd.readouterr().err.splitlines(), *said]
    assert code == 1
    assert lines[-1].endswith(line) and sum(line in l for l in lines) == 1, lines
    assert sum('Traceback' in l for l in lines) == (program is BUG) and (program is BUG or len(lines) == 1), lines
