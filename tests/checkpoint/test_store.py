"""The checkpoints of a run, and saves that die."""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.checkpoints import MemorySource, random_native, random_source, read_all, tiny_model, write_native
from workbench.checkpoint.reader import open_native
from workbench.checkpoint.store import Store, resolve
from workbench.checkpoint.writer import partial_folder
from workbench.errors import CheckpointError
from workbench.spec.layout import ParallelLayout
from workbench.spec.model import ModelConfig


def save(store: Store, step: int, seed: int = 0) -> Path:
    random_native(store.path(step), tiny_model(num_hidden_layers=1), seed=seed, optimizer=False)
    return store.path(step)


def test_the_latest_is_the_highest_complete_step(tmp_path):
    store = Store(tmp_path / "checkpoints")
    assert store.latest() is None and store.steps() == ()
    for step in (20, 100, 9):
        save(store, step)
    store.partial(200).mkdir()
    store.path(300).mkdir()
    assert store.steps() == (9, 20, 100)
    assert store.latest() == tmp_path / "checkpoints" / "step-00000100"


def test_retention_keeps_the_newest_and_cleaning_removes_what_died(tmp_path):
    store = Store(tmp_path)
    for step in (1, 2, 3, 4):
        save(store, step)
    assert store.retain(2) == (store.path(1), store.path(2))
    store.partial(5).mkdir()
    (tmp_path / "step-00000001.removed").mkdir()
    (tmp_path / "notes.partial").mkdir()
    assert sorted(folder.name for folder in store.clean()) == ["step-00000001.removed", "step-00000005.partial"]
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["notes.partial", "step-00000003", "step-00000004"]


def test_a_run_folder_means_its_latest_checkpoint(tmp_path):
    latest = save(Store(tmp_path / "run" / "checkpoints"), 7)
    assert resolve(tmp_path / "run") == latest
    assert resolve(tmp_path / "run" / "checkpoints") == latest
    assert resolve(latest) == latest
    assert resolve(tmp_path / "elsewhere") == tmp_path / "elsewhere"


def test_a_run_that_has_only_an_unfinished_checkpoint_says_so(tmp_path):
    Store(tmp_path / "checkpoints").partial(7).mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"no finished checkpoint, only step-00000007\.partial"):
        resolve(tmp_path)
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        resolve(tmp_path / "empty")


class Counted:
    """Counts the calls of functions, in Python and in C, and kills the process at the `fatal`-th.

    Moments are counted in calls and not in seconds: on a busy machine one save takes many times as long as the next.
    """

    def __init__(self, fatal: int = 0) -> None:
        self.calls, self._fatal = 0, fatal

    def __call__(self, *_: object) -> None:
        self.calls += 1
        if self.calls == self._fatal:
            os.kill(os.getpid(), signal.SIGKILL)


def counted_save(path: Path, source: MemorySource, model: ModelConfig, fatal: int = 0) -> int:
    """Saves; the calls that it took, at the `fatal`-th of which the process is killed."""
    counted = Counted(fatal)
    sys.setprofile(counted)
    try:
        write_native(path, source, model, ParallelLayout(tp=2, pp=2))
    finally:
        sys.setprofile(None)
    return counted.calls


def killed_save(path: Path, source: MemorySource, model: ModelConfig, fatal: int) -> bool:
    """Saves in a child that is killed at its `fatal`-th call; whether it was killed before its end."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            counted_save(path, source, model, fatal)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL)
    return status != 0


def test_a_save_killed_at_any_moment_leaves_the_old_checkpoint_and_no_half_of_a_new_one(tmp_path):
    model = tiny_model(hidden_size=64, intermediate_size=128, vocab_size=503)
    store = Store(tmp_path)
    old, new = random_source(model, seed=1), random_source(model, seed=2)
    counted_save(tmp_path / "first", old, model)  # calls more, to import
    calls = counted_save(store.path(1), old, model)
    rng = random.Random(0)
    killed = complete = 0
    for _ in range(40):
        killed += killed_save(store.path(2), new, model, rng.randint(1, calls * 5 // 4))
        if store.steps() == (1, 2):
            complete += 1
            open_native(store.path(2)).check()
            found = read_all(store.path(2))
            assert all(np.array_equal(found[name], array) for name, array in new.arrays.items())
            assert not partial_folder(store.path(2)).exists()
            store.path(2).rename(tmp_path / f"kept-{complete}")
        else:
            assert store.steps() == (1,)
            with pytest.raises(CheckpointError):
                open_native(store.path(2))
        assert store.latest() in (store.path(1), store.path(2))
    assert killed >= 24 and complete >= 4, "most moments were meant to fall inside the save"
    open_native(store.path(1)).check()
    found = read_all(store.path(1))
    assert all(np.array_equal(found[name], array) for name, array in old.arrays.items())
