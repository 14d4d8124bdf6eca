"""Files of known size, filled by ranges; folders of them."""

from __future__ import annotations

import errno
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.format import WriteRequest, no_progress
from converters.formats._files import Checksum, FileContent, Place, RangedWriter, whole_file
from converters.formats._folder import FolderContents, FolderDestination, WrittenPiece, WrittenTensor
from converters.rules import Rule, Slice
from tests.helpers.checkpoints import tiny_model
from workbench.checkpoint.descriptors import Descriptors
from workbench.errors import ConfigError, ResourceError, VerificationError
from workbench.spec.geometry import Box, LogicalTensor

VALUES = np.arange(24, dtype=np.float32).reshape(6, 4) + 1
# 6 logical rows of 8: cut by columns between two files, and once more stored whole.
HALVES = tuple(WrittenPiece(Box((0, 2 * half), (8, 2)), (Place(f"rank{half}/x.bin", 16),)) for half in (0, 1))
TENSORS = {
    "padded": WrittenTensor("F32", (8, 4), HALVES, padding=8),
    "head": WrittenTensor(
        "F32", (6, 4), (WrittenPiece(Box.whole((6, 4)), (Place("head", 0), Place("head", 96, (1, 6)))),)
    ),
}
FILES = {
    "rank0/x.bin": FileContent(88, ((0, b"prefix"), (84, b"tail")), (Checksum(16, 64, (8, 80)),)),
    "rank1/x.bin": FileContent(80),
    "head": FileContent(192),
    "notes.txt": whole_file(b"hello"),
}
RULES = {"x": (Rule("x", "padded", (Slice(0, 0, 6, 8),)), Rule("x", "head"))}


def destination(path: Path, *, read_back: bool = True, **changes: object) -> FolderDestination:
    request = WriteRequest(path, {"x": LogicalTensor("x", (6, 4), "F32")}, tiny_model(), read_back=read_back)
    contents = FolderContents(**{"files": FILES, "tensors": TENSORS, "rules": RULES, **changes})  # type: ignore[arg-type]
    return FolderDestination(request, contents, lambda partial: pytest.fail(f"{partial} is not to be opened"))


def fill(target: FolderDestination) -> None:
    target.begin()
    for row in (0, 3):
        target.write("x", Box((row, 0), (3, 4)), VALUES[row : row + 3])


def test_a_logical_box_goes_to_every_place_where_it_lies(tmp_path: Path) -> None:
    target = destination(tmp_path / "out", copies={"card.md": tmp_path / "card"})
    (tmp_path / "card").write_text("card")
    fill(target)
    seen: list[int] = []
    target.check(seen.append)
    assert sum(seen) == 96
    target.commit({})
    found = {str(file.relative_to(tmp_path / "out")): file.read_bytes() for file in (tmp_path / "out").glob("**/*.*")}
    assert found["notes.txt"] == b"hello" and found["card.md"] == b"card"
    padded = np.zeros((8, 4), np.float32)
    padded[:6] = VALUES
    payload = padded[:, :2].tobytes()
    checksum = zlib.crc32(payload).to_bytes(4, "little")
    assert found["rank0/x.bin"] == b"prefix\0\0" + checksum + bytes(4) + payload + checksum + b"tail"
    assert found["rank1/x.bin"] == bytes(16) + padded[:, 2:].tobytes()
    assert (tmp_path / "out/head").read_bytes() == VALUES.tobytes() + VALUES.T.tobytes()
    assert {file: (tmp_path / "out" / file).stat().st_size for file in target.files} == target.files


@pytest.mark.parametrize(("file", "byte"), [("rank0/x.bin", 16), ("rank1/x.bin", 50), ("head", 0), ("head", 191)])
def test_without_reading_back_at_once_a_byte_that_changes_in_any_copy_is_found_by_the_check(
    tmp_path: Path, file: str, byte: int
) -> None:
    target = destination(tmp_path / "out", read_back=False)
    fill(target)
    with (tmp_path / "out.partial" / file).open("r+b") as damaged:
        damaged.seek(byte)
        damaged.write(b"\xee")
    with pytest.raises(VerificationError, match=r"out.partial: 'x' at \[[03], 0\] reads back other than written"):
        target.check(no_progress)
    target.abort()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", [16, 0])  # of rank0/x.bin; of head
def test_a_disk_that_stores_something_else_is_found_by_the_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, bytes(len(data)) if at == place else data, at))
    with pytest.raises(VerificationError, match=r"out.partial: 'x' at \[0, 0\] reads back other than written"):
        fill(destination(tmp_path / "out"))


def test_two_writers_of_one_destination_do_not_disturb_each_other(tmp_path: Path) -> None:
    first, second = destination(tmp_path / "out"), destination(tmp_path / "out")
    first.begin()
    with pytest.raises(ConfigError, match=r"out\.partial is being written by another process"):
        second.begin()
    second.abort()
    assert (tmp_path / "out.partial/head").is_file()
    first.abort()
    fill(second)
    second.commit({})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("call", ["pwrite", "posix_fallocate"])  # in order; through a mapping
def test_a_full_disk_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = destination(tmp_path / "out")
    target.begin()
    monkeypatch.setattr(os, call, full)
    with pytest.raises(ResourceError, match="(x.bin|head): no space left on the device"):
        target.write("x", Box((0, 0), (3, 4)), VALUES[:3])
    target.abort()
    assert list(tmp_path.iterdir()) == []


def test_contents_that_leave_an_element_without_a_place_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="the pieces of padded: boxes hold 16 of 32"):
        destination(tmp_path / "out", tensors=TENSORS | {"padded": WrittenTensor("F32", (8, 4), HALVES[:1], 8)})
    with pytest.raises(AssertionError, match="the rules do not fill padded: boxes hold 24 of 32"):
        destination(tmp_path / "out", tensors=TENSORS | {"padded": WrittenTensor("F32", (8, 4), HALVES)})


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(6)), width=st.sampled_from([1, 4]))
def test_a_checksum_holds_in_whatever_order_the_bytes_arrive(tmp_path_factory, order: list[int], width: int) -> None:
    path = tmp_path_factory.mktemp("file") / "x"
    content = FileContent(132, checksums=(Checksum(4, 96, (100,)), Checksum(104, 24, (128,))))
    writer = RangedWriter(path, content, Descriptors(os.O_RDWR))
    writer.create()
    for row in order:
        for column in range(0, 4, width):
            box = Box((row, column), (1, width))
            writer.write(Place("x", 4), (6, 4), box, VALUES[box.slices])
        writer.write(Place("x", 104), (6,), Box((row,), (1,)), VALUES[row, :1])
    writer.seal()
    data = path.read_bytes()
    assert data[4:100] == VALUES.tobytes()
    assert data[100:104] == zlib.crc32(VALUES.tobytes()).to_bytes(4, "little")
    assert data[128:] == zlib.crc32(VALUES[:, 0].tobytes()).to_bytes(4, "little")
