"What the tests share: where the checkout is, and the real series beside it when they are there."
import os
from pathlib import Path

import pytest

os.environ.setdefault('MPLBACKEND', 'agg')
ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent/'shared'/'data'


@pytest.fixture(scope='session')
def root(): return ROOT


@pytest.fixture(scope='session')
def shared_data():
    "Folder of real series; the test is skipped where it is absent"
    if not SHARED.is_dir(): pytest.skip('the real series (../shared/data) are not beside this checkout')
    return SHARED
