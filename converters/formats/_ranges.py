"""Boxes of one tensor in a safetensors file, read without touching the rest of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from workbench.checkpoint.buffers import aligned_empty
from workbench.checkpoint.safetensors_io import FileEntry, RangedFile
from workbench.spec.dtypes import NUMPY_NAMES
from workbench.spec.geometry import Box


class TensorReader:
    """The tensors of some safetensors files, by (file, entry)."""

    def __init__(self, folder: Path, entries: Mapping[str, tuple[str, FileEntry]]) -> None:
        self._folder = folder
        self._entries = entries
        self._files = {file: RangedFile(folder / file) for file, _ in entries.values()}

    def read(self, name: str, box: Box) -> np.ndarray:
        """A fresh array of a box. A box in one piece is read as a range, others through a mapping that ends with it."""
        file, entry = self._entries[name]
        dtype = np.dtype(NUMPY_NAMES[entry.dtype])
        if (first := first_element(entry.shape, box)) is not None:
            array = aligned_empty(box.size, dtype)
            self._files[file].read_into(array, entry.start + first * dtype.itemsize)
            return array
        mapped = np.memmap(self._folder / file, dtype, "r", entry.start, entry.shape)
        return np.array(mapped[box.slices])

    def close(self) -> None:
        """Gives the files back."""
        for file in self._files.values():
            file.close()


def first_element(shape: tuple[int, ...], box: Box) -> int | None:
    """Index of the first element of a box in the flattened tensor if its elements follow one another, else None."""
    partial = [dim for dim in range(len(shape)) if box.size[dim] != shape[dim]]
    last = max(partial, default=0)
    if any(box.size[dim] != 1 for dim in range(last)):
        return None
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    return sum(offset * stride for offset, stride in zip(box.offset, strides, strict=True))
