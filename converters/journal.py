"""What an interrupted copy had done, so that the next process need not do it again.

The journal lies in the unfinished folder: a line that says of which plan and source it is, then one for each sweep that
has been written. Its lines are hints and not promises, so nothing is synced for them: whoever goes on reads back what
each line speaks of and compares it with the line's checksums. After a kill all lines hold; after a loss of power those
whose data had not reached the disk do not, and their sweeps are copied again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xxhash import xxh3_128

from converters.format import OpenedCheckpoint
from converters.plan import Plan
from workbench.checkpoint.fingerprint import PartialFingerprint
from workbench.checkpoint.writer import JOURNAL, partial_folder, write_faults
from workbench.errors import CheckpointError, ConfigError


@dataclass(frozen=True, slots=True)
class Done:
    """A sweep that has been written: its part of the fingerprint and the destination's receipt for it."""

    part: PartialFingerprint
    receipt: Any


class Journal:
    """The journal of one copy."""

    def __init__(
        self, destination: Path, plan: Plan, source: Mapping[str, tuple[int, int]], edits: Sequence[str] = ()
    ) -> None:
        self._partial = partial_folder(destination)
        self._identity = {"plan": plan_digest(plan), "source": _digest(f"{name} {at}" for name, at in source.items())}
        self._identity["edit"] = _digest(edits)
        self._descriptor = -1
        self.done: Mapping[int, Done] = {}
        """The sweeps of the plan, by index, that an earlier process has written."""

    def read(self) -> None:
        """Fills `done`; it stays empty when there is no journal. ConfigError when that is of another plan or source."""
        try:
            lines = (self._partial / JOURNAL).read_bytes().split(b"\n")[:-1]  # what a kill has cut short does not count
        except FileNotFoundError:
            return
        if not lines:
            return
        found = json.loads(lines[0])
        for kind, now in self._identity.items():
            if found[kind] != now:
                raise ConfigError(
                    f"{self._partial}: was begun with another {kind} (digest {found[kind]}, now {now}); give the same "
                    "arguments as then, or leave --resume out to start again"
                )
        entries = (json.loads(line) for line in lines[1:])
        self.done = {index: Done(PartialFingerprint(tuple(sums)), receipt) for index, sums, receipt in entries}

    def open(self) -> None:
        """Makes the journal, or goes on at its end."""
        path = self._partial / JOURNAL
        with write_faults(path):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            size = os.fstat(self._descriptor).st_size
            whole = os.pread(self._descriptor, size, 0).rfind(b"\n") + 1
            os.truncate(self._descriptor, whole)
            if not whole:
                self._append(self._identity)

    def add(self, index: int, done: Done) -> None:
        """Notes that a sweep has been written; from any thread."""
        with write_faults(self._partial / JOURNAL):
            self._append([index, done.part.sums, done.receipt])

    def _append(self, value: object) -> None:
        os.write(self._descriptor, json.dumps(value).encode() + b"\n")

    def close(self) -> None:
        """Closes the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def plan_digest(plan: Plan) -> str:
    """The same for plans that cut the same tensors in the same way for the same files."""
    tensors = (f"{t.name} {t.dtype} {t.shape}" for t in plan.tensors.values())
    sweeps = (f"{s.name} {s.dim} {s.start} {s.stop}" for s in plan.sweeps)
    files = (f"{name} {size}" for name, size in plan.files.items())
    return _digest((*tensors, *sweeps, *files))


def _digest(lines: Any) -> str:
    hasher = xxh3_128()
    for line in lines:
        hasher.update(f"{line}\n".encode())
    return hasher.hexdigest()


def source_files(opened: OpenedCheckpoint, destination: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change (nanoseconds) of every file of a checkpoint and of those that it is made of, by path."""
    ours = {destination.absolute(), partial_folder(destination).absolute()}
    found: dict[str, tuple[int, int]] = {}
    for path in (opened.path, *opened.others):
        for folder, inside, names in os.walk(path.absolute()):
            inside[:] = sorted(name for name in inside if Path(folder, name) not in ours)
            for name in sorted(names):
                state = os.stat(Path(folder, name))
                found[str(Path(folder, name))] = (state.st_size, state.st_mtime_ns)
    return found


def refuse_changes(before: Mapping[str, tuple[int, int]], after: Mapping[str, tuple[int, int]]) -> None:
    """CheckpointError when files are not what they were when the copy began."""
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            raise CheckpointError(
                f"{name}: changed while it was being read ({_state_text(before.get(name))} at first, "
                f"{_state_text(after.get(name))} now); wait until nothing writes there and start again"
            )


def _state_text(state: tuple[int, int] | None) -> str:
    return "no such file" if state is None else f"{state[0]} bytes of time {state[1] / 1e9:.6f}"
