"""Files are synced while more is being written, and no failure of a sync is lost."""

from __future__ import annotations

import threading

import pytest

from workbench.checkpoint import early_sync
from workbench.errors import CheckpointError


class File:
    def __init__(self) -> None:
        self.syncs = 0
        self.synced = threading.Event()

    def sync(self) -> None:
        self.syncs += 1
        self.synced.set()


class Broken(File):
    def sync(self) -> None:
        super().sync()
        raise CheckpointError("x: cannot be written: Input/output error")


def test_a_file_is_synced_in_the_background_once_much_has_been_written(monkeypatch):
    monkeypatch.setattr(early_sync, "_FLUSH_BYTES", 100)
    syncing, much, little = early_sync.EarlySync(), File(), File()
    syncing.written(little, 99)
    syncing.written(much, 60)
    syncing.written(much, 60)
    assert much.synced.wait(10)
    syncing.finish()
    assert (much.syncs, little.syncs) == (1, 0)


def test_a_failed_sync_is_raised_at_the_end_and_forgotten_when_the_checkpoint_is_given_up(monkeypatch):
    monkeypatch.setattr(early_sync, "_FLUSH_BYTES", 1)
    for given_up in (False, True):
        syncing, file = early_sync.EarlySync(), Broken()
        syncing.written(file, 1)
        assert file.synced.wait(10)
        if given_up:
            syncing.cancel()
            assert file.syncs == 1
        else:
            with pytest.raises(CheckpointError, match="Input/output error"):
                syncing.finish()
