"""Files of known size whose bytes arrive by ranges, from any thread, in any order."""

from __future__ import annotations

import bisect
import math
import os
import threading
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from converters.formats._ranges import first_element
from workbench.checkpoint.buffers import aligned_empty
from workbench.checkpoint.descriptors import Descriptors
from workbench.checkpoint.writer import write_faults
from workbench.spec.geometry import Box

_READ_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Checksum:
    """The CRC-32 of `num_bytes` from `start` on, to be stored (little-endian) at each of `places`."""

    start: int
    num_bytes: int
    places: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FileContent:
    """What is known of a file before its tensors: its size, (start, bytes) of what lies around them, and checksums.

    What nobody writes stays zero. checksums: of ranges that do not overlap.
    """

    num_bytes: int
    known: tuple[tuple[int, bytes], ...] = ()
    checksums: tuple[Checksum, ...] = ()


def whole_file(data: bytes) -> FileContent:
    """A file that is known completely."""
    return FileContent(len(data), ((0, data),))


@dataclass(frozen=True, slots=True)
class Place:
    """Where the elements of a piece lie: in `file`, from byte `start` on, row by row or `strides` elements apart."""

    file: str
    start: int
    strides: tuple[int, ...] | None = None


class _RunningChecksum:
    """The CRC-32 of a range, of which a part from its start has been seen to pass in order."""

    def __init__(self, checksum: Checksum) -> None:
        self.checksum = checksum
        self.value = 0
        self.position = checksum.start
        self.lock = threading.Lock()

    def written(self, start: int, data: memoryview) -> None:
        """Takes bytes in when they are the next ones."""
        with self.lock:
            if start == self.position:
                self.value = zlib.crc32(data, self.value)
                self.position += len(data)


class RangedWriter:
    """One file being written, of full size from the start."""

    def __init__(self, path: Path, content: FileContent, descriptors: Descriptors) -> None:
        self.path = path
        self._descriptors = descriptors
        self._content = content
        self._sums = [_RunningChecksum(c) for c in sorted(content.checksums, key=lambda c: c.start)]
        self._starts = [running.checksum.start for running in self._sums]
        self._allocated: set[Place] = set()

    def create(self, *, resume: bool = False) -> None:
        """Makes the file at its full size, with all that is known of it; with `resume` it may be there already."""
        with write_faults(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self.path, os.O_WRONLY | os.O_CREAT | (0 if resume else os.O_EXCL) | os.O_CLOEXEC, 0o644))
            os.truncate(self.path, self._content.num_bytes)
            for start, data in self._content.known:
                self._put(memoryview(data), start)

    def write(self, place: Place, shape: Sequence[int], box: Box, array: np.ndarray) -> None:
        """Stores `array` as a box of the piece of `shape` that lies at `place`."""
        if not array.size:
            return
        with write_faults(self.path):
            if (first := _first(place, shape, box)) is None:
                self._map(place, shape, array.dtype, writable=True)[box.slices] = array
                return
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            start = place.start + first * array.itemsize
            self._put(data, start)
            index = bisect.bisect_right(self._starts, start) - 1
            if index >= 0:
                self._sums[index].written(start, data)

    def read(self, place: Place, shape: Sequence[int], box: Box, dtype: np.dtype) -> np.ndarray:
        """What the file holds now in a box of the piece of `shape` that lies at `place`."""
        with write_faults(self.path):
            first = _first(place, shape, box)
            if first is None:
                return np.array(self._map(place, shape, dtype)[box.slices])
            array = aligned_empty(box.size, dtype)
            self._get(array.reshape(-1).view(np.uint8).data, place.start + first * dtype.itemsize)
            return array

    def seal(self) -> None:
        """Stores every checksum; nothing may be written afterwards. Bytes that came out of order are read again."""
        block = memoryview(bytearray(_READ_BYTES if self._sums else 0))
        with write_faults(self.path):
            for running in self._sums:
                end = running.checksum.start + running.checksum.num_bytes
                for start in range(running.position, end, _READ_BYTES):
                    data = block[: min(_READ_BYTES, end - start)]
                    self._get(data, start)
                    running.value = zlib.crc32(data, running.value)
                running.position = end
                for place in running.checksum.places:
                    self._put(memoryview(running.value.to_bytes(4, "little")), place)

    def sync(self) -> None:
        """Returns when the bytes are on the disk."""
        with write_faults(self.path), self._descriptors.use(self.path) as descriptor:
            os.fsync(descriptor)

    def _put(self, data: memoryview, start: int) -> None:
        assert start + len(data) <= self._content.num_bytes, f"{self.path}: byte {start + len(data)} is past its end"
        done = 0
        with self._descriptors.use(self.path) as descriptor:
            while done < len(data):
                done += os.pwrite(descriptor, data[done:], start + done)

    def _get(self, data: memoryview, start: int) -> None:
        done = 0
        with self._descriptors.use(self.path) as descriptor:
            while done < len(data):
                count = os.preadv(descriptor, [data[done:]], start + done)
                assert count > 0, f"{self.path} has become shorter"
                done += count

    def _map(self, place: Place, shape: Sequence[int], dtype: np.dtype, *, writable: bool = False) -> np.ndarray:
        """A mapping of a piece. One to write gets its blocks first: a full disk is an error, not a signal."""
        strides = place.strides or tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
        extent = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if writable and place not in self._allocated:
            with self._descriptors.use(self.path) as descriptor:
                os.posix_fallocate(descriptor, place.start, extent * dtype.itemsize)
            self._allocated.add(place)
        flat = np.memmap(self.path, dtype, "r+" if writable else "r", place.start, (extent,))
        return np.lib.stride_tricks.as_strided(flat, shape, [stride * dtype.itemsize for stride in strides])


def _first(place: Place, shape: Sequence[int], box: Box) -> int | None:
    """Index of the first element of a box whose elements follow one another at `place`, else None."""
    return first_element(tuple(shape), box) if place.strides is None else None
