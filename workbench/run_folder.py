"""The folder of a run: what was asked, what was resolved, on what machine, from what parents, and how it ended."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Any

from workbench.errors import ConfigError
from workbench.log import read_metrics

VERSIONED = (
    "workbench",
    "torch",
    "transformers",
    "safetensors",
    "tokenizers",
    "peft",
    "numpy",
    "pydantic",
    "transformer-engine",
    "megatron-core",
)


class Status(StrEnum):
    """How a run stands. The last three are marker files in its folder."""

    NEW = "new"
    UNFINISHED = "unfinished"
    DONE = "done"
    FAILED = "failed"
    INTERRUPTED = "interrupted"


MARKERS = {Status.DONE: "DONE", Status.FAILED: "FAILED", Status.INTERRUPTED: "INTERRUPTED"}


@dataclass(frozen=True)
class RunFolder:
    """The paths inside a run folder, and what is written at its start and its end. Only one rank writes."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def evaluations(self) -> Path:
        return self.path / "eval"

    @property
    def exists(self) -> bool:
        """Whether a run was ever started here."""
        return (self.path / "resolved.json").exists()

    def start(self, *, config_text: str, resolved: str, command: Sequence[str]) -> None:
        """Writes what was asked for; a resumed run appends its command and clears the marker of the earlier end."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise ConfigError(
                f"{self.path}: a file stands where the run folder should be; set run.dir to another"
            ) from None
        self.logs.mkdir(exist_ok=True)
        for marker in MARKERS.values():
            (self.path / marker).unlink(missing_ok=True)
        write_atomically(self.path / "config.toml", config_text)
        write_atomically(self.path / "environment.json", _json(environment()))
        now = datetime.now(UTC).isoformat(timespec="seconds")
        with (self.path / "command.txt").open("a", encoding="utf-8") as file:
            file.write(f"{now}  {shlex.join(command)}\n")
        write_atomically(self.path / "resolved.json", resolved)

    def resolved(self) -> dict[str, Any]:
        """The configuration in force when the run was last started."""
        try:
            return dict(json.loads((self.path / "resolved.json").read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise ConfigError(f"{self.path} is not a run folder: it has no resolved.json") from None

    def write_lineage(self, lineage: Mapping[str, Any]) -> None:
        """Records the parents of this run: checkpoints it started from, data it read, with their fingerprints."""
        write_atomically(self.path / "lineage.json", _json(lineage))

    def lineage(self) -> dict[str, Any]:
        path = self.path / "lineage.json"
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}

    def finish(self, status: Status, note: str = "") -> None:
        """Leaves the marker of how the run ended, with one line that says more."""
        for other, marker in MARKERS.items():
            if other is not status:
                (self.path / marker).unlink(missing_ok=True)
        write_atomically(self.path / MARKERS[status], note.strip() + "\n")

    def status(self) -> Status:
        for status, marker in MARKERS.items():
            if (self.path / marker).exists():
                return status
        return Status.UNFINISHED if self.exists else Status.NEW

    def note(self) -> str:
        """The line that was left with the marker."""
        status = self.status()
        return (self.path / MARKERS[status]).read_text(encoding="utf-8").strip() if status in MARKERS else ""

    def summary(self) -> dict[str, Any]:
        """Name, status, and the last value of each metric: what a list of runs shows."""
        last: dict[str, Any] = {}
        for row in read_metrics(self.metrics):
            last.update(row)
        return {"name": self.name, "path": str(self.path), "status": str(self.status()), "note": self.note(), **last}


def find_runs(root: Path) -> list[RunFolder]:
    """The run folders directly under `root`, or `root` itself, in the order in which they were last started."""
    if RunFolder(root).exists:
        return [RunFolder(root)]
    found = [RunFolder(path) for path in sorted(root.iterdir()) if path.is_dir()] if root.is_dir() else []
    runs = [run for run in found if run.exists]
    return sorted(runs, key=lambda run: ((run.path / "resolved.json").stat().st_mtime, run.name))


def environment() -> dict[str, Any]:
    """Versions and machine, for whoever must repeat the run."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "host": platform.node(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": memory_bytes(),
        "executable": sys.executable,
        "versions": versions(),
    }


def versions(names: Sequence[str] = VERSIONED) -> dict[str, str]:
    """The installed version of each package; those that are not installed are left out. Imports none of them."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def memory_bytes() -> int:
    """Main memory of the machine; 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def write_atomically(path: Path, text: str) -> None:
    """Writes a whole file or none: a reader sees the old text or the new one, never a part."""
    scratch = path.with_name(path.name + ".partial")
    with scratch.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, default=str) + "\n"
