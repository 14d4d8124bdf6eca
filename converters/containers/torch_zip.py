"""Files for torch.load, laid out before their tensors are there: a zip archive of a pickle and raw storages.

The archive is as torch 2.13 writes it: members stored, their data on multiples of 64 bytes from its start, sizes and
checksum of each behind its data; 64-bit fields where a size or place needs them. No torch.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from converters.containers.pickle_writer import Call, Global, Persistent, dump
from converters.formats._files import Checksum
from workbench.spec.dtypes import ITEM_BYTES, TORCH_NAMES

_ALIGNMENT: Final = 64
_LIMIT: Final = 0xFFFFFFFF  # 32-bit fields that say this refer to 64-bit ones
_UTF8: Final = 0x0800
_SIZES_BEHIND: Final = 0x0008
_SERIALIZATION_ID: Final = b"0" * 40  # torch's is a hash that nothing reads
_STORAGE_NAMES: Final = {
    "F64": "Double",
    "F32": "Float",
    "F16": "Half",
    "BF16": "BFloat16",
    "I64": "Long",
    "I32": "Int",
    "I16": "Short",
    "I8": "Char",
    "U8": "Byte",
    "BOOL": "Bool",
}


@dataclass(frozen=True, eq=False)
class Storage:
    """Memory of `numel` elements that one or several tensors view. data: its bytes, when they are known beforehand."""

    dtype: str
    numel: int
    data: bytes | None = None

    @property
    def num_bytes(self) -> int:
        return self.numel * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in the tree that is saved: a view of a storage, row by row or `strides` elements apart."""

    storage: Storage
    shape: tuple[int, ...]
    offset: int = 0
    strides: tuple[int, ...] | None = None


def new_tensor(dtype: str, shape: tuple[int, ...], data: bytes | None = None) -> StoredTensor:
    """A tensor with a storage of its own; `data` are its bytes, if known."""
    return StoredTensor(Storage(dtype, math.prod(shape), data), shape)


def torch_dtype(dtype: str) -> Global:
    """A torch.dtype."""
    return Global("torch", TORCH_NAMES[dtype])


def torch_size(sizes: tuple[int, ...]) -> Call:
    """A torch.Size."""
    return Call(Global("torch", "Size"), (sizes,))


@dataclass(frozen=True)
class TorchFile:
    """An archive at `start` of a file: see `converters.formats._files.FileContent` for `known` and `checksums`.

    storages: the first byte of each storage, from the start of the file.
    """

    start: int
    num_bytes: int
    known: tuple[tuple[int, bytes], ...]
    checksums: tuple[Checksum, ...]
    storages: Mapping[Storage, int]


def lay_out_torch(value: Any, *, start: int = 0, root: str = "archive") -> TorchFile:
    """Where torch.save would put `value`: plain data, what `pickle_writer` can say, and `StoredTensor`s."""
    pickled, storages = _pickle(value)
    archive = _Archive(start, root)
    first = {"data.pkl": pickled, ".format_version": b"1", ".storage_alignment": b"64", "byteorder": b"little"}
    last = {"version": b"3\n", ".data/serialization_id": _SERIALIZATION_ID}
    for name, data in first.items():
        archive.add(name, data, len(data))
    places = {s: archive.add(f"data/{name}", s.data, s.num_bytes) for s, name in storages.items()}
    for name, data in last.items():
        archive.add(name, data, len(data))
    return archive.finish(places)


def _pickle(value: Any) -> tuple[bytes, dict[Storage, str]]:
    """The pickle of a tree, and the name of each storage in it."""
    names: dict[Storage, str] = {}

    def rebuilt(tensor: StoredTensor) -> Call:
        storage = tensor.storage
        name = names.setdefault(storage, str(len(names)))
        kind = Global("torch", f"{_STORAGE_NAMES[storage.dtype]}Storage")
        strides = tensor.strides or tuple(math.prod(tensor.shape[dim + 1 :]) for dim in range(len(tensor.shape)))
        place = Persistent(("storage", kind, name, "cpu", storage.numel))
        hooks = Call(Global("collections", "OrderedDict"), ())
        return Call(
            Global("torch._utils", "_rebuild_tensor_v2"), (place, tensor.offset, tensor.shape, strides, False, hooks)
        )

    return dump(value, {StoredTensor: rebuilt}), names


class _Archive:
    """A zip archive being laid out. Places in it count from its own start, as zip readers want it."""

    def __init__(self, start: int, root: str) -> None:
        self._start, self._root = start, root
        self._end = 0
        self._known: list[tuple[int, bytes]] = []
        self._directory: list[bytes] = []
        self._open: list[tuple[int, int, int, int]] = []  # of what is not known: first byte, size, place behind, entry

    def add(self, name: str, data: bytes | None, num_bytes: int) -> int:
        """A member, of `data` or of bytes that will be written; its first byte in the file."""
        title = f"{self._root}/{name}".encode()
        wide = [value for value in (num_bytes, num_bytes, self._end) if value >= _LIMIT]
        extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
        flags = _UTF8 | (_SIZES_BEHIND if num_bytes else 0)
        crc = zlib.crc32(data) if data is not None else 0
        size, header = min(num_bytes, _LIMIT), min(self._end, _LIMIT)
        padding = -(self._end + 34 + len(title) + len(extra)) % _ALIGNMENT
        filler = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        lengths = (len(title), len(extra) + len(filler))
        local = struct.pack("<4s5H3I2H", b"PK\3\4", 0, flags, 0, 0, 0, 0, 0, 0, *lengths) + title + extra + filler
        first = self._put(local) + len(local)
        self._end += num_bytes
        behind = self._end
        if num_bytes:
            self._put(struct.pack("<4sI2Q" if wide else "<4s3I", b"PK\7\x08", crc, num_bytes, num_bytes))
        if data is not None:
            self._known.append((self._start + first, data))
        elif num_bytes:
            self._open.append((first, num_bytes, behind, len(self._directory)))
        entry = (b"PK\1\2", 0, 0, flags, 0, 0, 0, crc, size, size, len(title), len(extra), 0, 0, 0, 0, header)
        self._directory.append(struct.pack("<4s6H3I5H2I", *entry) + title + extra)
        return self._start + first

    def finish(self, places: Mapping[Storage, int]) -> TorchFile:
        """The archive with its directory."""
        start, count = self._end, len(self._directory)
        entries = [self._put(entry) for entry in self._directory]
        size, end = self._end - start, self._end
        self._put(struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 0x031E, 45, 0, 0, count, count, size, start))
        self._put(struct.pack("<4sIQI", b"PK\6\7", 0, end, 1))
        narrow = (min(count, 0xFFFF), min(count, 0xFFFF), min(size, _LIMIT), min(start, _LIMIT))
        self._put(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, *narrow, 0))
        checksums = tuple(
            Checksum(self._start + first, num_bytes, (self._start + behind + 4, self._start + entries[index] + 16))
            for first, num_bytes, behind, index in self._open
        )
        return TorchFile(self._start, self._end, _joined(self._known), checksums, places)

    def _put(self, data: bytes) -> int:
        """Appends what is known; its place in the archive."""
        self._known.append((self._start + self._end, data))
        self._end += len(data)
        return self._end - len(data)


def _joined(known: list[tuple[int, bytes]]) -> tuple[tuple[int, bytes], ...]:
    """The same bytes in fewer pieces, in order."""
    pieces: list[tuple[int, list[bytes]]] = []
    end = -1
    for start, data in sorted(known):
        if start != end:
            pieces.append((start, []))
        pieces[-1][1].append(data)
        end = start + len(data)
    return tuple((start, b"".join(parts)) for start, parts in pieces)
