"The short form of `python -m tools.faults`: a store under kill -9, on a full disk, read while written, with single bits turned."
import errno
import os
import subprocess
import sys

import numpy as np
import pytest

from jfr2020.ground.errors import StoreError
from jfr2020.store.check import check_store
from jfr2020.store.hdf5 import H5Store, StoreWriter, write_lists
from tools.faults import NAMES, WrongValue, content, flips, full, kills, read_part, read_version, soak


def verdict(rows, wrong): # the whole text when something is wrong
    assert not wrong, '\n'.join([str(rows), *wrong[:5]])
    return rows[0]


def test_forty_kills_lose_no_committed_subject():
    what, n, text = verdict(*kills.main(40, every=10))
    assert n == 40 and 'replac' in text and 'index' in text


def test_a_full_disk_is_said_and_loses_nothing():
    row = verdict(*full.main(6))
    if 'SKIPPED' in row[2]: pytest.skip(row[2])
    assert row[1] == 6


def test_readers_beside_a_writer_see_no_wrong_value():
    what, reads, text = verdict(*soak.main(4))
    assert reads > 0 and 'BUSY' in text


def test_every_turned_bit_is_found():
    assert verdict(*flips.main(60))[1] == 60


def test_the_command_ends_with_1_when_a_goal_is_missed():
    code = 'import runpy, sys; from tools.faults import flips; flips.said = lambda folder: None; sys.argv = ["faults", "--kills", "0", ' \
           '"--sizes", "0", "--seconds", "0", "--flips", "2"]; runpy.run_module("tools.faults", run_name="__main__")'
    p = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert p.returncode == 1 and 'not found' in p.stderr, p.stderr


def test_the_harness_itself_sees_a_wrong_value_and_a_mixed_subject(tmp_path):
    name, one, two = NAMES[0], content(NAMES[0], 1), content(NAMES[0], 2)
    mixed = dict(one, streamlines=two['streamlines'])
    bad = one['volumes']['ct'].data.copy(); bad[3, 4, 5] += 1
    changed = dict(one, volumes=dict(one['volumes'], ct=one['volumes']['ct'].like(bad)))
    with StoreWriter(tmp_path) as w:
        for k, c in enumerate((mixed, changed, one)): w.add(NAMES[k], **c)
    store = H5Store(tmp_path)
    with pytest.raises(WrongValue, match='mixes'): read_version(store[name], name)
    with pytest.raises(WrongValue, match='not version 1'): read_part(store[NAMES[1]], name, 'ct')
    assert read_version(store[NAMES[2]], name) == 1 and not np.array_equal(bad, one['volumes']['ct'].data)


def test_a_kill_between_the_lists_and_the_index_is_mended_by_the_next_writer(tmp_path):
    with StoreWriter(tmp_path) as w: w.add(NAMES[0], **content(NAMES[0], 1))
    write_lists(tmp_path, dict(training=[NAMES[0]], validation=[], testing=[]))
    with StoreWriter(tmp_path): pass
    assert check_store(tmp_path) == [] and H5Store(tmp_path).lists['training'] == (NAMES[0],)


def test_no_refused_write_reaches_hdf5(tmp_path, monkeypatch):
    real, left = os.write, [0]
    def scarce(fd, b): # room for so many bytes, then no more
        if len(b) > left[0]: raise OSError(errno.ENOSPC, 'No space left on device')
        left[0] -= len(b)
        return real(fd, b)
    with StoreWriter(tmp_path) as w:
        w.add(NAMES[0], **content(NAMES[0], 1))
        monkeypatch.setattr(os, 'write', scarce)
        for room in (0, 100, 5_000, 40_000, 70_000):
            left[0] = room
            with pytest.raises(StoreError, match='No space left') as e: w.add(NAMES[1], **content(NAMES[1], 2))
            assert e.value.code == 'DISK'
        monkeypatch.undo()
        w.add(NAMES[1], **content(NAMES[1], 3))
    store = H5Store(tmp_path)
    assert [read_version(store[n], n) for n in NAMES[:2]] == [1, 3] and check_store(tmp_path) == []
