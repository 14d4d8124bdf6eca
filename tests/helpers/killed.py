"""Conversions in processes of their own that are killed, and what they leave compared with undisturbed ones."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from converters import copy
from converters.plan import Sweep
from workbench.checkpoint.fingerprint import PartialFingerprint
from workbench.checkpoint.manifest import MANIFEST

ROOT = Path(__file__).parents[2]
ONE_BY_ONE = """
import os, sys
from converters import journal
from workbench.cli.main import main
add, left = journal.Journal.add, int(sys.argv[1])
def counted(self, *words):
    global left
    add(self, *words)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), 9)
journal.Journal.add = counted
sys.exit(main(sys.argv[2:]))
"""
"""`wb` that kills itself once so many units are in the journal."""


def kill_after(units: int, words: Sequence[str]) -> int:
    """Runs `wb` with `words` until it has noted `units` units; its exit code, -9 when it got there."""
    command = [sys.executable, "-c", ONE_BY_ONE, str(units), *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120).returncode


def copied_names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the tensors that are copied from now on, one entry a sweep."""
    found: list[str] = []
    run = copy._Copier.run

    def noted(copier: copy._Copier, sweep: Sweep, stop: threading.Event, *, fingerprint: bool) -> PartialFingerprint:
        found.append(sweep.name)
        return run(copier, sweep, stop, fingerprint=fingerprint)

    monkeypatch.setattr(copy._Copier, "run", noted)
    return found


class Forks:
    """Runs a conversion in forks of this process, which have everything imported, and kills them at random moments."""

    def __init__(self, words: Sequence[str], seed: int) -> None:
        self._words, self._random = list(words), random.Random(seed)

    def run(self, *, seconds: float | None = None) -> int:
        """Runs `wb`, killed after `seconds` if given; the status of the process as from `waitpid`."""
        from workbench.cli.main import main

        child = os.fork()
        if child == 0:
            os._exit(main(self._words))
        if seconds is not None:
            time.sleep(self._random.uniform(0, seconds))
            os.kill(child, signal.SIGKILL)
        return os.waitpid(child, 0)[1]


def same_folders(first: Path, second: Path) -> bool:
    """Whether two folders hold the same files with the same bytes; of a manifest, all but the time of its making."""
    files = [{str(f.relative_to(root)): f for f in root.rglob("*") if f.is_file()} for root in (first, second)]
    if files[0].keys() != files[1].keys():
        return False
    return all(_content(files[0][name]) == _content(files[1][name]) for name in files[0])


def _content(path: Path) -> object:
    if path.name != MANIFEST:
        return path.read_bytes()
    manifest = json.loads(path.read_bytes())
    manifest.pop("manifest_checksum")
    for parent in manifest["lineage"]:
        parent.pop("time")
    return manifest
