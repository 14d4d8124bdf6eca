"""The checkpoints of a run, and saves that die."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.checkpoints import random_native, random_source, read_all, tiny_model, write_native
from workbench.checkpoint.reader import open_native
from workbench.checkpoint.store import Store, resolve
from workbench.checkpoint.writer import partial_folder
from workbench.errors import CheckpointError
from workbench.spec.layout import ParallelLayout


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


def killed_save(store: Store, step: int, delay: float, source, model, layout) -> bool:
    """Starts a save in a child, kills the child after `delay` seconds; whether it was killed before its end."""
    child = os.fork()
    if child == 0:
        try:
            write_native(store.path(step), source, model, layout)
        finally:
            os._exit(0)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def test_a_save_killed_at_any_moment_leaves_the_old_checkpoint_and_no_half_of_a_new_one(tmp_path):
    model, layout = tiny_model(hidden_size=64, intermediate_size=128, vocab_size=503), ParallelLayout(tp=2, pp=2)
    store = Store(tmp_path)
    old, new = random_source(model, seed=1), random_source(model, seed=2)
    started = time.monotonic()
    write_native(store.path(1), old, model, layout)
    duration = time.monotonic() - started
    rng = random.Random(0)
    killed = complete = 0
    for _ in range(50):
        killed += killed_save(store, 2, rng.uniform(0, 1.3 * duration), new, model, layout)
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
    assert killed >= 10, "the moments were meant to fall inside the save"
    open_native(store.path(1)).check()
    found = read_all(store.path(1))
    assert all(np.array_equal(found[name], array) for name, array in old.arrays.items())
