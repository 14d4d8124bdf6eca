"""The unfinished folder of a destination, and the right of one process to write it."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from workbench.checkpoint.writer import discard, partial_folder, prepare, write_faults
from workbench.errors import ConfigError


class Claim:
    """The unfinished folder of `final`, which is ours from `take` until `release` or `give_up`."""

    def __init__(self, final: Path) -> None:
        self._final, self.folder = final, partial_folder(final)
        self._descriptor: int | None = None

    def take(self, *, resume: bool = False) -> None:
        """Makes the folder, empty. What a dead process has left there is removed, or with `resume` taken over.

        ConfigError when `final` exists, or another process writes it now.
        """
        stale = _hold(self.folder) if self.folder.is_dir() else None
        if stale is not None and resume and not self._final.exists():
            self._descriptor = stale
            return
        try:
            with write_faults(self.folder):
                self._descriptor = _made(self._final)
        finally:
            if stale is not None:
                os.close(stale)

    def release(self) -> None:
        """Lets others have the folder, if it was ours."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def give_up(self, *, keep: bool = False) -> None:
        """Releases the folder and removes it, if it was ours and is not to be kept."""
        held = self._descriptor is not None
        self.release()
        if held and not keep:
            discard(self.folder)


def _made(final: Path) -> int:
    try:
        return _hold(prepare(final))
    except FileExistsError:
        raise _busy(partial_folder(final)) from None


def _hold(folder: Path) -> int:
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise _busy(folder) from None
    return descriptor


def _busy(partial: Path) -> ConfigError:
    return ConfigError(f"{partial} is being written by another process; wait for it, or name another one")
