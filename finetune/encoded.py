"""Encoded examples in files that processes map into memory: encoded once and held once for all ranks. No torch.

A column of the examples is one array, NAME.npy, of all of them one after the other; NAME.ends.npy says where each ends,
if it has a length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import numpy as np

from finetune.task import Example, Prepared

VALUE = "value-"


class StoredExamples(Sequence[Example]):
    """The examples of a folder, read as they are asked for. Travels to other processes as its path."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        arrays = {path.name.removesuffix(".npy"): _mapped(path) for path in sorted(folder.glob("*.npy"))}
        self._ends = {name.removesuffix(".ends"): array for name, array in arrays.items() if name.endswith(".ends")}
        self._flat = {name: array for name, array in arrays.items() if not name.endswith(".ends")}

    def __reduce__(self) -> tuple[Any, ...]:
        return StoredExamples, (self._folder,)

    def __len__(self) -> int:
        return len(self._ends["input_ids"])

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        found = range(len(self))[index]
        return self._example(found) if isinstance(found, int) else [self._example(one) for one in found]

    def _example(self, index: int) -> Example:
        row = {name: self._row(name, index) for name in self._flat}
        place = row.pop("place").tobytes().decode("utf-8")
        values = {name.removeprefix(VALUE): row.pop(name) for name in [*row] if name.startswith(VALUE)}
        return Example(**row, place=place, values=values)

    def _row(self, name: str, index: int) -> Any:
        if name not in self._ends:
            return self._flat[name][index]
        ends = self._ends[name]
        return self._flat[name][ends[index - 1] if index else 0 : ends[index]]


def stored(prepared: Prepared, folder: Path) -> Prepared:
    """The data with its examples in files of `folder`, which is to be empty and to stay."""
    held_out = {name: _store(examples, folder / f"held-out-{name}") for name, examples in prepared.held_out.items()}
    return replace(prepared, train=_store(prepared.train, folder / "train"), held_out=held_out)


def _store(examples: Sequence[Example], folder: Path) -> StoredExamples:
    folder.mkdir()
    for name, rows in _columns(examples):
        if rows[0].ndim:
            np.save(folder / f"{name}.ends.npy", np.cumsum([len(row) for row in rows]))
        np.save(folder / f"{name}.npy", np.concatenate([np.atleast_1d(row) for row in rows]))
    return StoredExamples(folder)


def _columns(examples: Sequence[Example]) -> Iterator[tuple[str, list[np.ndarray]]]:
    first = examples[0]
    for name in ("input_ids", "labels", "segments", "documents"):
        if getattr(first, name) is not None:
            yield name, [getattr(example, name) for example in examples]
    yield "place", [np.frombuffer(example.place.encode("utf-8"), np.uint8) for example in examples]
    for name in first.values:
        yield f"{VALUE}{name}", [np.asarray(example.values[name]) for example in examples]


def _mapped(path: Path) -> np.ndarray:
    array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return array.view(np.ndarray)
