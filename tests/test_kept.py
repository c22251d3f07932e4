"Files that version 0.1.0 wrote before the rooms stood in wings: they open, and say the same."
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

KEPT = Path(__file__).parent/'kept'


@pytest.mark.parametrize('name', ['unet3d', 'unet25d', 'scorenet', 'attentionnet'])
def test_a_model_gives_the_answer_it_gave(name):
    import torch
    import jfr2020.ct.score_nets  # noqa: F401 they register themselves
    from jfr2020.ct.preprocessing import Preprocessing
    from jfr2020.models.base import load_model, read_card
    *first, shape = json.loads((KEPT/'models'/'answers.json').read_text())[name]
    model = load_model(KEPT/'models'/name)
    x = torch.linspace(0, 1, 8*16*16).view(1, 1, 8, 16, 16)
    with torch.no_grad(): out = model(x, *([torch.tensor([[3., 1., 1.]])] if name == 'scorenet' else []))
    assert list(out.shape) == shape and np.allclose(out.flatten()[:4], first, atol=2e-6)
    assert model.preprocessing == Preprocessing('calcium', (3, 1, 1), 'heart', shape=(8, 16, 16))
    assert model.preprocessing.to_dict() == read_card(KEPT/'models'/name)['preprocessing'] # written again, the same file


def test_a_finished_run_is_read_scored_and_repeated():
    from jfr2020.ct.config import CalciumConfig
    from jfr2020.ground.settings import read_settings
    from jfr2020.models.base import load_model
    from jfr2020.train.runs import read_log_rows
    import jfr2020.models.nets  # noqa: F401
    cfg = read_settings(CalciumConfig, KEPT/'done'/'config.json')
    assert (cfg.data.patients, cfg.data.matrix, cfg.model.arguments['widths']) == (3, 64, (2, 4))
    rows = read_log_rows(KEPT/'done')
    assert rows and {'train_loss', 'valid_loss', 'MaskDice'} <= {*rows[-1]}
    assert load_model(KEPT/'done'/'model').n_parameters > 100


def test_a_stopped_run_goes_on_to_its_end(tmp_path):
    from jfr2020.ct.trainer import resume_run
    from jfr2020.models.base import load_model
    from jfr2020.train.runs import read_log_rows
    run = shutil.copytree(KEPT/'stopped', tmp_path/'run')
    before = read_log_rows(run)
    resume_run(run)
    after = read_log_rows(run)
    assert after[:len(before)] == before and max(r['epoch'] for r in after) == 3 > max(r['epoch'] for r in before)
    load_model(run/'model')


def test_a_store_is_whole_and_says_what_it_held(tmp_path):
    from jfr2020.store.check import check_store
    from jfr2020.store.hdf5 import H5Store
    store = shutil.copytree(KEPT/'store', tmp_path/'store')
    assert check_store(store) == []
    one, two = (H5Store(store)[name] for name in ('one', 'two'))
    assert (one.volumes, one.attrs()['score'], two.volumes, two.streamline_groups) == (('ct', 'mask'), 12.5, ('dwi',), ('bundle',))
    assert one.volume('ct').shape == one.volume('mask').shape and len(two.streamlines('bundle')) > 0


def test_a_pack_becomes_the_same_store(tmp_path):
    from jfr2020.store.hdf5 import H5Store
    from jfr2020.store.pack import import_store
    import_store(KEPT/'pack.hdf5', tmp_path/'again')
    again, old = H5Store(tmp_path/'again'), H5Store(shutil.copytree(KEPT/'store', tmp_path/'store'))
    assert list(again) == list(old)
    for name in old:
        for v in old[name].volumes: assert np.array_equal(again[name].volume(v).data, old[name].volume(v).data)


def test_scores_are_evaluated_and_keep_their_form():
    from jfr2020.agreement.tables import evaluate_scores
    from jfr2020.calcium.case import COLUMNS, SCHEMA
    from jfr2020.ground.notice import NOTICE
    assert (KEPT/'score'/'scores.csv').read_text().splitlines()[0] == ','.join(COLUMNS)
    whole = json.loads((KEPT/'score'/'scores.json').read_text())
    assert (whole['schema'], whole['intended_use']) == (SCHEMA, NOTICE['en'])
    assert [e['agatston'] for e in whole['series']] == [0., 8.1238]
    e = evaluate_scores(KEPT/'score'/'scores.csv', KEPT/'score'/'truth.csv', draws=50)
    assert e.measures['same_class'].value == 1 and abs(e.measures['mean_difference'].value) < 1e-3
