"""Tensors of a native checkpoint from its safetensors files alone: by their headers, without the manifest."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import numpy as np

from workbench.checkpoint.source import TensorSource
from workbench.errors import VerificationError
from workbench.spec.dtypes import NUMPY_NAMES
from workbench.spec.geometry import LogicalTensor


class NativeFiles:
    """Every `name@offset` of every file of a folder."""

    def __init__(self, folder: Path, _: TensorSource) -> None:
        self._folder = folder
        self._pieces: dict[str, list[tuple[Path, int, tuple[int, ...], list[int]]]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(length))
            for key, entry in header.items():
                if key == "__metadata__":
                    continue
                name, _, corner = key.partition("@")
                offset = tuple(map(int, corner.split(","))) if corner else (0,) * len(entry["shape"])
                start = 8 + length + entry["data_offsets"][0]
                self._pieces.setdefault(name, []).append((path, start, offset, entry["shape"]))

    def read(self, tensor: LogicalTensor, rows: slice) -> np.ndarray:
        """These rows of a tensor in storage dtype (all of a scalar); VerificationError when they are not all there."""
        dtype = np.dtype(NUMPY_NAMES[tensor.dtype])
        array = np.zeros((rows.stop - rows.start, *tensor.shape[1:]), dtype) if tensor.shape else np.zeros((), dtype)
        held = 0
        for path, start, offset, size in self._pieces.get(tensor.name, ()):
            first, last = (max(rows.start, offset[0]), min(rows.stop, offset[0] + size[0])) if size else (0, 1)
            if first >= last:
                continue
            row = math.prod(size[1:])
            skipped = (first - offset[0]) * row * dtype.itemsize if size else 0
            found = np.fromfile(path, dtype, (last - first) * row, offset=start + skipped)
            others = tuple(slice(at, at + length) for at, length in zip(offset[1:], size[1:], strict=True))
            region = (slice(first - rows.start, last - rows.start), *others) if size else ()
            if found.size != (last - first) * row or array[region].size != found.size:
                raise VerificationError(
                    f"{path}: the piece of {tensor.name} at {list(offset)} of {size} is not all there"
                )
            array[region] = found.reshape(array[region].shape)
            held += found.size
        if held != array.size:
            raise VerificationError(
                f"{self._folder}: the files hold {held} elements of rows {rows.start} to {rows.stop} of {tensor.name}, "
                f"not {array.size}"
            )
        return array


READER = NativeFiles
