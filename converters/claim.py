"""The unfinished folder of a destination, and the right of one process to write it."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from workbench.checkpoint.writer import partial_folder, prepare, write_faults
from workbench.errors import ConfigError


def claim(final: Path, *, resume: bool = False) -> int:
    """Makes an empty `.partial` folder for `final`: ours, for as long as the returned descriptor is open.

    What a dead process has left there is removed, or with `resume` taken over. ConfigError when `final` exists, or
    another process writes it now.
    """
    partial = partial_folder(final)
    stale = _hold(partial) if partial.is_dir() else None
    if stale is not None and resume and not final.exists():
        return stale
    try:
        with write_faults(partial):
            return _made(final)
    finally:
        if stale is not None:
            os.close(stale)


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
