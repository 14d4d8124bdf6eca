"""The safetensors container: headers read with suspicion, headers laid out, ranged reads. NumPy only, no torch.

Layout of a file: 8 bytes little-endian length of the header, the header (JSON), the data without holes. The header
comes from outside, so nothing in it is believed before its numbers have been checked against the size of the file.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from workbench.checkpoint.bounded_json import parse_json
from workbench.checkpoint.descriptors import Descriptors
from workbench.errors import CheckpointError
from workbench.spec.dtypes import ITEM_BYTES

if TYPE_CHECKING:
    import numpy as np

MAX_DIMS: Final = 64  # NumPy's own bound
MAX_ELEMENTS: Final = 1 << 59  # of which eight bytes each can still be addressed
MAX_HEADER_BYTES: Final = 100_000_000  # the bound that the safetensors library itself keeps
PAGE_BYTES: Final = 4096
# Element types that a file may hold although nothing here computes with them.
_FILE_ITEM_BYTES: Final = {**ITEM_BYTES, "U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8}


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One tensor in a safetensors file; `start` counts from the first byte of the file."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


@dataclass(frozen=True)
class FileHeader:
    """What a safetensors file holds."""

    entries: Mapping[str, FileEntry]
    metadata: Mapping[str, str]
    file_bytes: int


@dataclass(frozen=True)
class FileLayout:
    """A file to be written: its first bytes, where each entry will lie, and its whole size."""

    prefix: bytes
    entries: Mapping[str, FileEntry]
    file_bytes: int


def read_header(path: Path) -> FileHeader:
    """The entries of a safetensors file, proven to lie inside it without holes or overlaps.

    Raises CheckpointError naming the file and the entry at fault.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 8:
                raise CheckpointError(f"{path}: {size} bytes are too few for a safetensors file; it is truncated")
            (length,) = struct.unpack("<Q", file.read(8))
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path}: claims a header of {length} bytes (at most {MAX_HEADER_BYTES}); not a safetensors file"
                )
            if 8 + length > size:
                raise CheckpointError(f"{path}: header of {length} bytes, file of {size} bytes; it is truncated")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    return _parse_header(path, text, 8 + length, size)


def _parse_header(path: Path, text: bytes, data_start: int, size: int) -> FileHeader:
    try:
        raw = parse_json(text, object_pairs=_refuse_duplicates)
    except ValueError as error:
        raise CheckpointError(f"{path}: its safetensors header is not valid: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: its safetensors header is not an object; not a safetensors file")
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: its safetensors header has a __metadata__ that is not text by name")
    entries = [_entry(path, key, value, data_start) for key, value in raw.items()]
    position = data_start
    for entry in sorted(entries, key=lambda e: (e.start, e.num_bytes)):
        if entry.start != position:
            kind = "overlaps the one before it" if entry.start < position else "leaves a hole before it"
            raise CheckpointError(f"{path}: tensor {entry.key!r} at byte {entry.start} {kind} (expected {position})")
        position += entry.num_bytes
    if position != size:
        what = "it is truncated" if position > size else "there are stray bytes at its end"
        raise CheckpointError(f"{path}: {size} bytes, but its header describes {position}; {what}")
    return FileHeader({entry.key: entry for entry in entries}, metadata, size)


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _entry(path: Path, key: str, value: Any, data_start: int) -> FileEntry:
    def refuse(why: str) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {key!r}: {why}")

    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise refuse("its header entry lacks dtype, shape or data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _FILE_ITEM_BYTES:
        raise refuse(f"dtype {dtype!r} is not known")
    if not is_shape(shape):
        raise refuse(f"shape {str(shape)[:200]} is not a list of sizes")
    if not _is_range(offsets):
        raise refuse(f"data_offsets {str(offsets)[:200]} are not a range")
    start, end = offsets
    expected = math.prod(shape) * _FILE_ITEM_BYTES[dtype]
    if end - start != expected:
        raise refuse(f"{end - start} bytes do not make {dtype} of shape {shape} ({expected} bytes)")
    return FileEntry(key, dtype, tuple(shape), data_start + start, expected)


def _is_range(value: Any) -> bool:
    whole = isinstance(value, list) and len(value) == 2 and all(type(v) is int for v in value)
    return whole and 0 <= value[0] <= value[1] < 1 << 62


def is_shape(value: Any) -> bool:
    """Whether a JSON value is a shape that an array can have: few sizes, whose product, zeros aside, can be counted."""
    if not isinstance(value, list) or len(value) > MAX_DIMS or not all(type(v) is int and v >= 0 for v in value):
        return False
    return all(v < MAX_ELEMENTS for v in value) and math.prod(v for v in value if v) < MAX_ELEMENTS


def lay_out(tensors: Sequence[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str] | None = None) -> FileLayout:
    """Where (key, dtype, shape) tensors will lie in a file.

    Data begin on a page (the header ends in blanks), wider element types first, and what would spoil the alignment of
    others last: a copy to an address that is off by a few bytes runs at half the speed or less.
    """
    position = 0
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    relative: list[FileEntry] = []
    for key, dtype, shape in sorted(tensors, key=_placing):
        assert key not in header, key
        num_bytes = math.prod(shape) * ITEM_BYTES[dtype]
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + num_bytes]}
        relative.append(FileEntry(key, dtype, tuple(shape), position, num_bytes))
        position += num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % PAGE_BYTES)
    prefix = struct.pack("<Q", len(text)) + text
    start = len(prefix)
    entries = {e.key: FileEntry(e.key, e.dtype, e.shape, start + e.start, e.num_bytes) for e in relative}
    return FileLayout(prefix, entries, start + position)


def _placing(tensor: tuple[str, str, Sequence[int]]) -> tuple[int, bool, bool]:
    item_bytes = ITEM_BYTES[tensor[1]]
    num_bytes = math.prod(tensor[2]) * item_bytes
    return -item_bytes, num_bytes % PAGE_BYTES != 0, num_bytes % 64 != 0


def file_bytes(tensors: Iterable[tuple[int, str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None) -> int:
    """`lay_out(...).file_bytes` without making the header, for (bytes of the key as JSON text, dtype, shape)."""
    known = [(_header_entry(dtype, shape), key_bytes) for key_bytes, dtype, shape in tensors]
    known.sort(key=lambda entry: entry[0][0])
    position, length = 0, 8 + len(json.dumps({"__metadata__": metadata} if metadata else {}, separators=(",", ":")))
    for (_, num_bytes, text_bytes), key_bytes in known:
        length += key_bytes + text_bytes + len(str(position)) + len(str(position + num_bytes))
        position += num_bytes
    length -= bool(known and not metadata)  # no comma before the first entry
    return length + -length % PAGE_BYTES + position


@lru_cache(maxsize=4096)
def _header_entry(dtype: str, shape: tuple[int, ...]) -> tuple[tuple[int, bool, bool], int, int]:
    """Where a tensor is placed, its bytes, and those of its header entry without key and offsets."""
    text = json.dumps({"dtype": dtype, "shape": shape, "data_offsets": []}, separators=(",", ":"))
    return _placing(("", dtype, shape)), math.prod(shape) * ITEM_BYTES[dtype], len(text) + len(":,,")


class RangedFile:
    """A file that is read by ranges, from any thread; through `descriptors` when it is one of many."""

    def __init__(self, path: Path, descriptors: Descriptors | None = None) -> None:
        self.path = path
        self._descriptors = descriptors or Descriptors(os.O_RDONLY)

    def read_into(self, array: np.ndarray, start: int) -> None:
        """Fills a contiguous array with the bytes from `start` on; CheckpointError when the file ends before."""
        self.read_ranges([(array, start)])

    def read_ranges(self, ranges: Iterable[tuple[np.ndarray, int]]) -> None:
        """`read_into` for many arrays."""
        try:
            with self._descriptors.use(self.path) as descriptor:
                for array, start in ranges:
                    self._read(descriptor, array, start)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror}") from error

    def _read(self, descriptor: int, array: np.ndarray, start: int) -> None:
        if not array.nbytes:
            return
        view = array.data.cast("B")
        done = 0
        while done < len(view):
            count = os.preadv(descriptor, [view[done:]], start + done)
            if count == 0:
                raise CheckpointError(
                    f"{self.path}: ends at byte {start + done} of {start + len(view)}; it is truncated"
                )
            done += count

    def close(self) -> None:
        """Gives the descriptor back."""
        self._descriptors.close()
