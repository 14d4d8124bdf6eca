"""Native checkpoints as tensor sources: any box of any logical tensor, read by ranges and checked on the way."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from os.path import isfile
from pathlib import Path
from typing import Final

import numpy as np
from xxhash import xxh3_64

from workbench.checkpoint.buffers import aligned_empty
from workbench.checkpoint.descriptors import Descriptors
from workbench.checkpoint.manifest import TOKENIZER, Manifest, StoredBox, read_manifest
from workbench.checkpoint.safetensors_io import RangedFile, read_header
from workbench.errors import CheckpointError
from workbench.spec.dtypes import ITEM_BYTES, NUMPY_NAMES
from workbench.spec.geometry import Box, LogicalTensor

_BLOCK_BYTES: Final = 4 << 20
_MIN_RUN_BYTES: Final = 8 << 10  # below this a system call costs more than reading what lies between the runs
_CHECK_BYTES: Final = 1 << 20  # stays in the second-level cache between reading and hashing


def box_key(tensor: LogicalTensor, box: Box) -> str:
    """The key of a box in its safetensors file: the logical name, with `@offsets` unless it is the whole tensor."""
    if box.size == tensor.shape:
        return tensor.name
    return tensor.name + offset_text(box.offset)


def offset_text(offset: tuple[int, ...]) -> str:
    """What follows the logical name in the key of a box that is not the whole tensor."""
    return f"@{','.join(map(str, offset))}"


class _StoredReader:
    """Reads sub-boxes of one stored box; bytes that pass in order from its start are checked against its checksum."""

    def __init__(self, tensor: LogicalTensor, stored: StoredBox, file: RangedFile) -> None:
        self.stored = stored
        self.verified = False
        self._tensor = tensor
        self._file = file
        self._item_bytes = ITEM_BYTES[tensor.dtype]
        self._numpy = np.dtype(NUMPY_NAMES[tensor.dtype])
        self._lock = threading.Lock()
        self._hasher = xxh3_64()
        self._hashed = 0

    def read(self, box: Box) -> np.ndarray:
        """The elements of a box, in coordinates of the whole tensor, that lies inside the stored one."""
        inside = box.relative_to(self.stored.box)
        array = aligned_empty(box.size, self._numpy)
        start, run_bytes = _run(self.stored.box.size, inside, self._item_bytes)
        if run_bytes == array.nbytes:
            self._read_range(array, start)
        elif run_bytes >= _MIN_RUN_BYTES:
            self._read_runs(array, inside, run_bytes)
        else:
            self._read_slabs(array, inside)
        return array

    def _read_range(self, array: np.ndarray, start: int) -> None:
        self._file.read_into(array, self.stored.start + start)
        self._hash(array, start)

    def _hash(self, array: np.ndarray, start: int) -> None:
        if self.verified:
            return
        with self._lock:
            if start == 0 and self._hashed:
                self._hasher, self._hashed = xxh3_64(), 0
            if start != self._hashed:
                return
            self._hasher.update(array.data if array.ndim else array.tobytes())
            self._hashed += array.nbytes
            if self._hashed == self.stored.num_bytes:
                self._compare(self._hasher.hexdigest())

    def _compare(self, found: str) -> None:
        stored = self.stored
        if found != stored.checksum:
            raise CheckpointError(
                f"{self._file.path}: tensor {self._tensor.name!r}, box at {list(stored.box.offset)}: "
                f"checksum {found}, but the manifest says {stored.checksum}; the file is damaged, use another copy"
            )
        self.verified = True

    def _read_runs(self, array: np.ndarray, inside: Box, run_bytes: int) -> None:
        """Reads each contiguous run by itself."""
        runs = array.reshape(-1).view(np.uint8).reshape(-1, run_bytes)
        strides = _strides(self.stored.box.size, self._item_bytes)
        depth = _depth(self.stored.box.size, inside)
        file = self._file

        def ranges() -> Iterator[tuple[np.ndarray, int]]:
            for row, index in enumerate(np.ndindex(*inside.size[:depth])):
                leading = [o + i for o, i in zip(inside.offset[:depth], index, strict=True)]
                offset = sum(map(math.prod, zip((*leading, *inside.offset[depth:]), strides, strict=True)))
                yield runs[row], self.stored.start + offset

        file.read_ranges(ranges())

    def _read_slabs(self, array: np.ndarray, inside: Box) -> None:
        """Reads whole rows of the stored box, a few at a time, and keeps the columns that are wanted."""
        row_shape = self.stored.box.size[1:]
        row_bytes = math.prod(row_shape) * self._item_bytes
        step = max(1, _BLOCK_BYTES // max(1, row_bytes))
        columns = inside.slices[1:]
        for row in range(0, inside.size[0], step):
            count = min(step, inside.size[0] - row)
            slab = aligned_empty((count, *row_shape), self._numpy)
            self._read_range(slab, (inside.offset[0] + row) * row_bytes)
            array[row : row + count] = slab[(slice(None), *columns)]

    def check(self, progress: Callable[[int], None]) -> None:
        """Verifies the checksum, unless the bytes have already been seen to agree."""
        if self.verified:
            return
        hasher, buffer = xxh3_64(), aligned_empty((_CHECK_BYTES,), "uint8")
        file = self._file
        for start in range(0, self.stored.num_bytes, _CHECK_BYTES):
            block = buffer[: min(_CHECK_BYTES, self.stored.num_bytes - start)]
            file.read_into(block, self.stored.start + start)
            hasher.update(block.data)
            progress(block.nbytes)
        self._compare(hasher.hexdigest())


def _strides(shape: tuple[int, ...], item_bytes: int) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) * item_bytes for dim in range(len(shape)))


def _depth(shape: tuple[int, ...], inside: Box) -> int:
    """Number of leading dimensions of a box that index its contiguous runs."""
    partial = [dim for dim in range(len(shape)) if inside.size[dim] != shape[dim]]
    return max(partial, default=0)


def _run(shape: tuple[int, ...], inside: Box, item_bytes: int) -> tuple[int, int]:
    """Byte offset of the first element of a box in an array of `shape`, and bytes of each of its contiguous runs."""
    depth = _depth(shape, inside)
    start = sum(map(math.prod, zip(inside.offset, _strides(shape, item_bytes), strict=True)))
    return start, math.prod(inside.size[depth:]) * item_bytes


class NativeSource:
    """A native checkpoint open for reading (`TensorSource`); reads are ranges of files, never mappings.

    Stored boxes whose bytes are read in order are checked against their checksum on the way, at no further I/O;
    `check` verifies whatever has not been checked so.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._descriptors = Descriptors(os.O_RDONLY)
        self._files = {name: RangedFile(folder / name, self._descriptors) for name in manifest.files}
        self._readers = {
            name: tuple(_StoredReader(stored.tensor, box, self._files[box.file]) for box in stored.boxes)
            for name, stored in manifest.tensors.items()
        }

    @cached_property
    def schema(self) -> Mapping[str, LogicalTensor]:
        """Every logical tensor by name."""
        return {name: stored.tensor for name, stored in self.manifest.tensors.items()}

    def chunks(self, name: str) -> tuple[Box, ...]:
        """The boxes in which the tensor is stored."""
        return tuple(reader.stored.box for reader in self._readers[name])

    def read(self, name: str, box: Box) -> np.ndarray:
        """The elements of `box` in storage dtype; CheckpointError when the bytes are missing or damaged."""
        tensor = self.manifest.tensors[name].tensor
        pieces = [(reader, reader.stored.box.intersect(box)) for reader in self._readers[name]]
        found = [(reader, common) for reader, common in pieces if common is not None]
        if len(found) == 1:
            return found[0][0].read(box)
        array = aligned_empty(box.size, NUMPY_NAMES[tensor.dtype])
        for reader, common in found:
            array[common.relative_to(box).slices] = reader.read(common)
        return array

    def check(self, progress: Callable[[int], None] = lambda _: None) -> None:
        """Verifies every stored box that has not been verified while it was read; CheckpointError names the first."""
        for readers in self._readers.values():
            for reader in readers:
                reader.check(progress)
        for name, said in self.manifest.tokenizer.items():
            path = self.folder / TOKENIZER / name
            found = xxh3_64(path.read_bytes()).hexdigest() if path.is_file() else "no such file"
            if found != said:
                raise CheckpointError(f"{path}: checksum {found}, but the manifest says {said}; use another copy")

    @property
    def unchecked_bytes(self) -> int:
        """Bytes that `check` would read."""
        return sum(r.stored.num_bytes for readers in self._readers.values() for r in readers if not r.verified)

    def close(self) -> None:
        """Closes the files."""
        self._descriptors.close()


def open_native(folder: Path) -> NativeSource:
    """A finished native checkpoint, after its manifest has been compared with the headers of its files."""
    manifest = read_manifest(folder)
    _compare_files(folder, manifest)
    return NativeSource(folder, manifest)


def _compare_files(folder: Path, manifest: Manifest) -> None:
    """Raises CheckpointError listing every file that is missing or of another size, or one entry that disagrees."""
    faults = []
    for name, size in manifest.files.items():
        path = folder / name
        found = path.stat().st_size if isfile(path) else None
        if found is None:
            faults.append(f"{name} is missing")
        elif found != size:
            faults.append(f"{name} has {found} bytes, not {size}" + ("; it is truncated" if found < size else ""))
    if faults:
        raise CheckpointError(f"{folder}: " + "; ".join(faults) + "; copy the checkpoint again")
    headers = {name: read_header(folder / name) for name in manifest.files}
    for name, stored in manifest.tensors.items():
        for box in stored.boxes:
            entry = headers[box.file].entries.get(box_key(stored.tensor, box.box))
            expected = (stored.tensor.dtype, box.box.size, box.start)
            if entry is None or (entry.dtype, entry.shape, entry.start) != expected:
                found_text = "no such tensor" if entry is None else f"{entry.dtype} {entry.shape} at {entry.start}"
                raise CheckpointError(
                    f"{folder / box.file}: tensor {name!r}, box at {list(box.box.offset)}: the manifest says "
                    f"{expected[0]} {expected[1]} at {expected[2]}, the file has {found_text}; the files are mixed up"
                )
