"""A format whose results must pass a check before they appear under their name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.format import Destination, Format, OpenedCheckpoint, Progress, WriteRequest
from workbench.checkpoint.writer import partial_folder

if TYPE_CHECKING:
    import numpy as np

    from workbench.checkpoint.source import TensorSource
    from workbench.spec.geometry import Box, LogicalTensor

Check = Callable[[Path, "TensorSource"], None]
"""Gets the unfinished folder and it as a source; raises when it must not appear."""


class CheckedFormat:
    """`format`, with `check` run on every result before it is committed."""

    def __init__(self, format: Format, check: Check) -> None:
        self._format, self._check = format, check
        self.name = format.name

    def recognises(self, path: Path) -> bool:
        return self._format.recognises(path)

    def open(self, path: Path, *, family: str | None = None, vocab_size: int | None = None) -> OpenedCheckpoint:
        return self._format.open(path, family=family, vocab_size=vocab_size)

    def destination(self, request: WriteRequest) -> Destination:
        return _CheckedDestination(self._format.destination(request), self._check)


class _CheckedDestination:
    """A destination that is committed only when the check returns; otherwise the copier aborts it."""

    def __init__(self, inner: Destination, check: Check) -> None:
        self._inner, self._check = inner, check

    @property
    def path(self) -> Path:
        return self._inner.path

    @property
    def schema(self) -> Mapping[str, LogicalTensor]:
        return self._inner.schema

    @property
    def files(self) -> Mapping[str, int]:
        return self._inner.files

    def boxes(self, name: str) -> tuple[tuple[str, Box], ...]:
        return self._inner.boxes(name)

    def sweep(self, name: str) -> int:
        return self._inner.sweep(name)

    @property
    def in_order(self) -> bool:
        return self._inner.in_order

    def begin(self, *, resume: bool = False) -> None:
        self._inner.begin(resume=resume)

    def write(self, name: str, box: Box, array: np.ndarray) -> None:
        self._inner.write(name, box, array)

    def receipt(self, name: str, part: Box) -> Any:
        return self._inner.receipt(name, part)

    def restore(self, name: str, part: Box, receipt: Any) -> bool:
        return self._inner.restore(name, part, receipt)

    def check(self, progress: Progress) -> None:
        self._inner.check(progress)

    def reopen(self) -> TensorSource:
        return self._inner.reopen()

    def commit(self, fingerprints: Mapping[str, str]) -> Path:
        self._check(partial_folder(self.path), self._inner.reopen())
        return self._inner.commit(fingerprints)

    def abort(self, *, keep: bool = False) -> None:
        self._inner.abort(keep=keep)
