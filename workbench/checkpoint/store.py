"""The `checkpoints/` folder of a run: names, the latest, retention, and what dead saves have left. No torch."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from workbench.checkpoint.manifest import MANIFEST, is_native, read_manifest
from workbench.checkpoint.writer import partial_folder
from workbench.errors import CheckpointError

CHECKPOINTS: Final = "checkpoints"
_STEP = re.compile(r"step-(\d{8,})")
_REMOVED: Final = ".removed"


@dataclass(frozen=True)
class Store:
    """The checkpoints of a run, one folder a step; a folder without a manifest does not exist."""

    root: Path

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step lies, or will lie."""
        return self.root / f"step-{step:08d}"

    def steps(self) -> tuple[int, ...]:
        """Steps that have a complete checkpoint, ascending."""
        if not self.root.is_dir():
            return ()
        found = ((_STEP.fullmatch(folder.name), folder) for folder in self.root.iterdir())
        return tuple(sorted(int(match[1]) for match, folder in found if match and (folder / MANIFEST).is_file()))

    def latest(self) -> Path | None:
        """The complete checkpoint of the highest step."""
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    def clean(self) -> tuple[Path, ...]:
        """Removes what interrupted saves and removals have left, and returns it. Only while nothing else is saving."""
        if not self.root.is_dir():
            return ()
        stale = [f for f in self.root.iterdir() if f.name.endswith((".partial", _REMOVED)) and _is_step(f)]
        for folder in stale:
            shutil.rmtree(folder)
        return tuple(stale)

    def best(self) -> Path:
        """The checkpoint of the best evaluation, as the newest one knows it; CheckpointError when there is none."""
        latest = self.latest()
        training = None if latest is None else read_manifest(latest).training
        best = {} if training is None else training.scheduler.get("best", {})
        if not best:
            raise CheckpointError(f"{self.root}: no checkpoint says which was the best; the run evaluated nothing")
        path = self.path(best["step"])
        if not (path / MANIFEST).is_file():
            raise CheckpointError(
                f"{path}: was the best by {best['metric']} = {best['value']:.6g}, but was not kept; train with "
                "checkpoint.keep_best = true"
            )
        return path

    def retain(self, keep: int, *, besides: int = 0) -> tuple[Path, ...]:
        """Removes all but the newest `keep` checkpoints and that of step `besides`, and returns those removed; a crash
        leaves no half of one."""
        assert keep > 0
        removed = [self.path(step) for step in self.steps()[:-keep] if step != besides]
        for folder in removed:
            grave = folder.with_name(folder.name + _REMOVED)
            folder.rename(grave)
            shutil.rmtree(grave)
        return tuple(removed)

    def partial(self, step: int) -> Path:
        """Where the checkpoint of a step is being written."""
        return partial_folder(self.path(step))


def _is_step(folder: Path) -> bool:
    return _STEP.fullmatch(folder.name.split(".")[0]) is not None


def resolve(path: Path) -> Path:
    """The checkpoint folder that `path` means: itself, or the latest of a run folder or of its `checkpoints/`.

    A path that is neither is returned as it is: other formats look at it next.
    """
    for root in (path / CHECKPOINTS, path):
        if not root.is_dir() or is_native(root):
            continue
        latest = Store(root).latest()
        if latest is not None:
            return latest
        unfinished = sorted(f.name for f in root.iterdir() if f.name.endswith(".partial") and _is_step(f))
        if unfinished:
            raise CheckpointError(
                f"{root}: no finished checkpoint, only {', '.join(unfinished)} of an interrupted save"
            )
        if root.name == CHECKPOINTS:
            raise CheckpointError(f"{root}: holds no checkpoint; has the run saved one yet?")
    return path
