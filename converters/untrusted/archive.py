"""The zip archives that torch.save writes: where each member lies, without unpacking anything. No torch.

Members are stored, never compressed: so nothing can grow on reading, and a tensor is a range of the file. An archive
may be a range of a larger file (a chunk of a `.distcp`). Nothing that it says is believed before it was checked against
the size of that range; members cannot overlap.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from workbench.errors import CheckpointError

_END: Final = struct.Struct("<4s4H2LH")  # end of central directory
_LOCATOR: Final = struct.Struct("<4sLQL")  # where the zip64 end of central directory is
_END64: Final = struct.Struct("<4sQ2H2L4Q")
_ENTRY: Final = struct.Struct("<4s6H3L5H2L")
_LOCAL: Final = struct.Struct("<4s5H3L2H")
_MAX_COMMENT: Final = 0xFFFF
_MAX_DIRECTORY_BYTES: Final = 1 << 28
_TAIL_BYTES: Final = 4096  # holds the directory of a chunk of a `.distcp`


@dataclass(frozen=True, slots=True)
class Member:
    """One stored file of an archive; `start` counts from the first byte of the file that holds the archive."""

    name: str
    start: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class _Entry:
    header: int
    num_bytes: int


class Archive:
    """The directory of an archive in a range of a file; CheckpointError when it is damaged."""

    def __init__(self, path: Path, *, offset: int = 0, length: int | None = None) -> None:
        self.path = path
        self._file = _Range(path, offset, length)
        try:
            self._directory, entries = self._read_directory()
        except BaseException:
            self._file.close()
            raise
        self._entries = entries
        headers = sorted(entry.header for entry in entries.values())
        self._next = dict(zip(headers, [*headers[1:], self._directory], strict=True))
        root = {name.split("/")[0] for name in entries}
        self.root = root.pop() if len(root) == 1 else ""

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __contains__(self, name: str) -> bool:
        return f"{self.root}/{name}" in self._entries

    def member(self, name: str) -> Member:
        """The member of this name below the archive's root folder; CheckpointError when there is none."""
        full = f"{self.root}/{name}"
        entry = self._entries.get(full)
        if entry is None:
            raise CheckpointError(f"{self.path}: its archive has no member {name!r}")
        header = self._file.read(entry.header, _LOCAL.size)
        signature, *_, name_bytes, extra_bytes = _LOCAL.unpack(header)
        start = entry.header + _LOCAL.size + name_bytes + extra_bytes
        found = self._file.read(entry.header + _LOCAL.size, name_bytes) if signature == b"PK\3\4" else b""
        if found != full.encode():
            raise CheckpointError(f"{self.path}: member {name!r} is not where the directory of its archive places it")
        if start + entry.num_bytes > self._next[entry.header]:
            raise CheckpointError(f"{self.path}: member {name!r} of {entry.num_bytes} bytes overlaps the one after it")
        return Member(name, self._file.offset + start, entry.num_bytes)

    def read(self, name: str, limit: int) -> bytes:
        """The bytes of a member of at most `limit` bytes."""
        member = self.member(name)
        if member.num_bytes > limit:
            raise CheckpointError(f"{self.path}: {name!r} has {member.num_bytes} bytes (at most {limit})")
        return self._file.read(member.start - self._file.offset, member.num_bytes)

    def _read_directory(self) -> tuple[int, dict[str, _Entry]]:
        start, num_bytes, count = self._find_directory()
        if num_bytes > _MAX_DIRECTORY_BYTES or start + num_bytes > self._file.length or count * _ENTRY.size > num_bytes:
            raise CheckpointError(
                f"{self.path}: its archive claims {count} members in a directory of {num_bytes} bytes at {start}, "
                f"in {self._file.length} bytes; it is damaged"
            )
        data = self._file.read(start, num_bytes)
        entries: dict[str, _Entry] = {}
        position = 0
        for _ in range(count):
            name, entry, position = self._entry(data, position, start)
            if name in entries:
                raise CheckpointError(f"{self.path}: its archive has two members {name!r}")
            entries[name] = entry
        if len({entry.header for entry in entries.values()}) != len(entries):
            raise CheckpointError(f"{self.path}: two members of its archive lie at one place")
        return start, entries

    def _find_directory(self) -> tuple[int, int, int]:
        """First byte, size and number of entries of the directory."""
        length = self._file.length
        for tail_bytes in (min(_TAIL_BYTES, length), min(_END.size + _MAX_COMMENT, length)):
            tail = self._file.read(length - tail_bytes, tail_bytes)
            at = tail.rfind(b"PK\5\6")
            if at >= 0 and at + _END.size <= tail_bytes:
                break
        else:
            raise CheckpointError(f"{self.path}: is no zip archive, or truncated: it has no directory at its end")
        end = length - tail_bytes + at
        _, disk, _, _, count, num_bytes, start, comment = _END.unpack_from(tail, at)
        if disk not in (0, 0xFFFF) or end + _END.size + comment != length:
            raise CheckpointError(f"{self.path}: its archive does not end with its directory; it is damaged")
        if 0xFFFFFFFF in (num_bytes, start) or count == 0xFFFF:
            return self._find_directory64(end)
        return start, num_bytes, count

    def _find_directory64(self, end: int) -> tuple[int, int, int]:
        signature, _, at, _ = _LOCATOR.unpack(self._file.read(end - _LOCATOR.size, _LOCATOR.size))
        if signature != b"PK\6\7":
            raise CheckpointError(f"{self.path}: its archive claims a zip64 directory and has none; it is damaged")
        signature, _, _, _, _, _, _, count, num_bytes, start = _END64.unpack(self._file.read(at, _END64.size))
        if signature != b"PK\6\6":
            raise CheckpointError(f"{self.path}: the zip64 directory of its archive is damaged")
        return start, num_bytes, count

    def _entry(self, data: bytes, position: int, directory: int) -> tuple[str, _Entry, int]:
        if position + _ENTRY.size > len(data):
            raise CheckpointError(f"{self.path}: the directory of its archive is truncated")
        fields = _ENTRY.unpack_from(data, position)
        signature, _, _, flags, method = fields[:5]
        packed, size, name_bytes, extra_bytes, comment_bytes = fields[8:13]
        header = fields[16]
        name_end = position + _ENTRY.size + name_bytes
        extra = data[name_end : name_end + extra_bytes]
        if signature != b"PK\1\2":
            raise CheckpointError(f"{self.path}: the directory of its archive is damaged")
        try:
            name = data[position + _ENTRY.size : name_end].decode()
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.path}: its archive has a member whose name is not UTF-8") from None
        if method != 0 or flags & 1:
            raise CheckpointError(
                f"{self.path}: member {name!r} is {'encrypted' if flags & 1 else 'compressed'}; "
                "torch.save stores members as they are, so another program made this file"
            )
        size, packed, header = self._wide(name, extra, (size, packed, header))
        if size != packed or header + _LOCAL.size + name_bytes + size > directory:
            raise CheckpointError(
                f"{self.path}: member {name!r} claims {size} bytes at {header}, {packed} stored, in an archive of "
                f"{directory} bytes; it is damaged"
            )
        return name, _Entry(header, size), name_end + extra_bytes + comment_bytes

    def _wide(self, name: str, extra: bytes, values: tuple[int, int, int]) -> list[int]:
        """Uncompressed size, compressed size and offset, those of 2^32 - 1 replaced by their zip64 extra field."""
        wanted = values.count(0xFFFFFFFF)
        position = 0
        while wanted and position + 4 <= len(extra):
            kind, num_bytes = struct.unpack_from("<2H", extra, position)
            if kind == 1 and num_bytes >= 8 * wanted and position + 4 + num_bytes <= len(extra):
                wide = iter(struct.unpack_from(f"<{wanted}Q", extra, position + 4))
                return [next(wide) if value == 0xFFFFFFFF else value for value in values]
            position += 4 + num_bytes
        if wanted:
            raise CheckpointError(f"{self.path}: member {name!r} lacks its zip64 sizes; it is damaged")
        return list(values)


@dataclass
class _Range:
    """Bytes `offset` to `offset + length` of a file, read by position."""

    path: Path
    offset: int
    length: int = field(init=False)
    _descriptor: int = field(init=False, default=-1)

    def __init__(self, path: Path, offset: int, length: int | None) -> None:
        self.path, self.offset, self._descriptor = path, offset, -1
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            size = os.fstat(self._descriptor).st_size
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
        self.length = size - offset if length is None else length
        if offset < 0 or self.length < 0 or offset + self.length > size:
            self.close()
            raise CheckpointError(f"{path}: {self.length} bytes at {offset} are asked of a file of {size} bytes")

    def read(self, start: int, count: int) -> bytes:
        if start < 0 or start + count > self.length:
            raise CheckpointError(f"{self.path}: is truncated: {count} bytes at {start} of {self.length} expected")
        try:
            data = os.pread(self._descriptor, count, self.offset + start)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror}") from error
        if len(data) != count:
            raise CheckpointError(f"{self.path}: ends while it is read; was it changed?")
        return data

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
