"""Whole tensors of a native checkpoint from its safetensors files alone: by their headers, without the manifest."""

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
    """Every `name@offset` of every file of a folder, pasted together."""

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

    def whole(self, tensor: LogicalTensor) -> np.ndarray:
        """All elements of a tensor in storage dtype; VerificationError when the files hold more or fewer."""
        dtype = np.dtype(NUMPY_NAMES[tensor.dtype])
        array = np.zeros(tensor.shape, dtype)
        held = 0
        for path, start, offset, size in self._pieces.get(tensor.name, ()):
            found = np.fromfile(path, dtype, math.prod(size), offset=start)
            region = tuple(slice(at, at + length) for at, length in zip(offset, size, strict=True))
            if found.size != math.prod(size) or array[region].shape != tuple(size):
                raise VerificationError(
                    f"{path}: the piece of {tensor.name} at {list(offset)} of {size} is not all there"
                )
            array[region] = found.reshape(size)
            held += found.size
        if held != tensor.numel:
            raise VerificationError(
                f"{self._folder}: the files hold {held} elements of {tensor.name}, not {tensor.numel}"
            )
        return array


READER = NativeFiles
