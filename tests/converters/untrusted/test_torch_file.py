"""Tensors that torch.save stored are found where they lie, and damaged archives are refused."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from converters.untrusted.archive import Archive
from converters.untrusted.torch_file import StridedTensor, read_torch
from workbench.errors import CheckpointError
from workbench.spec.dtypes import TORCH_NAMES
from workbench.spec.geometry import Box


def values(found: StridedTensor) -> np.ndarray:
    return found.read(Box.whole(found.shape))


def numbers(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("dtype", sorted(TORCH_NAMES))
def test_every_type_reads_as_the_same_numbers(tmp_path: Path, dtype: str, zipped: bool) -> None:
    tensor = torch.arange(12).view(3, 4).to(getattr(torch, TORCH_NAMES[dtype]))
    torch.save({"x": tensor}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    found = read_torch(tmp_path / "x.pt")["x"]
    assert (found.dtype, found.shape) == (dtype, (3, 4))
    assert np.array_equal(values(found), numbers(tensor))


@given(st.data())
@pytest.mark.parametrize("zipped", [True, False])
def test_views_of_a_shared_storage_are_read_by_offset_and_stride(
    tmp_path_factory: pytest.TempPathFactory, zipped: bool, data: st.DataObject
) -> None:
    base = torch.arange(60, dtype=torch.float32)
    view = base.as_strided(
        (data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))),
        data.draw(st.sampled_from([(4, 1), (1, 3), (10, 2), (7, 7)])),
        data.draw(st.integers(0, 20)),
    )
    path = tmp_path_factory.mktemp("views") / "x.pt"
    torch.save([base, view, view.T, torch.nn.Parameter(base[5:])], path, _use_new_zipfile_serialization=zipped)
    for found, expected in zip(read_torch(path), (base, view, view.T, base[5:]), strict=True):
        assert np.array_equal(values(found), expected.numpy())


def test_types_that_are_not_computed_with_are_found_and_not_read(tmp_path: Path) -> None:
    torch.save([torch.zeros(2, dtype=torch.complex64), torch.zeros(2).to(torch.float8_e4m3fn)], tmp_path / "x.pt")
    complex_, eighth = read_torch(tmp_path / "x.pt")
    assert (complex_.dtype, eighth.dtype) == ("torch.complex64", "torch.float8_e4m3fn")
    with pytest.raises(CheckpointError, match=r"x.pt: holds a tensor of type torch.complex64"):
        values(complex_)


@pytest.mark.parametrize(
    ("tensor", "name"),
    [
        (lambda: torch.eye(2).to_sparse(), "torch._utils._rebuild_sparse_tensor"),
        (lambda: torch.empty(2, device="meta"), "torch._utils._rebuild_meta_tensor_no_storage"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "torch._utils._rebuild_qtensor"),
    ],
)
def test_tensors_of_other_kinds_are_refused_by_name(tmp_path: Path, tensor: Callable[[], Any], name: str) -> None:
    torch.save(tensor(), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=name):
        read_torch(tmp_path / "x.pt")


def test_an_archive_inside_a_file_is_read_at_its_offset(tmp_path: Path) -> None:
    parts = []
    for value in (torch.arange(3.0), torch.arange(5.0)):
        buffer = io.BytesIO()
        torch.save(value, buffer)
        parts.append(buffer.getvalue())
    path = tmp_path / "__0_0.distcp"
    path.write_bytes(b"".join(parts))
    found = read_torch(path, offset=len(parts[0]), length=len(parts[1]))
    assert np.array_equal(values(found), np.arange(5, dtype=np.float32))
    with pytest.raises(CheckpointError, match="distcp: 9999 bytes at 3 are asked of a file"):
        read_torch(path, offset=3, length=9999)


def test_a_directory_of_64_bits_is_understood(tmp_path: Path) -> None:
    path = tmp_path / "big.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {"x/data.pkl": b"\x80\x02N.", "x/data/0": b"12345678"}.items():
            with archive.open(zipfile.ZipInfo(name), "w", force_zip64=True) as member:
                member.write(data)
    data = path.read_bytes()
    end = data.rindex(b"PK\5\6")
    *_, count, num_bytes, start, _ = struct.unpack_from("<4s4H2LH", data, end)
    wide = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, num_bytes, start)
    wide += struct.pack("<4sLQL", b"PK\6\7", 0, end, 1)
    wide += struct.pack("<4s4H2LH", b"PK\5\6", 0xFFFF, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    path.write_bytes(data[:end] + wide)
    with Archive(path) as archive:
        member = archive.member("data/0")
        assert path.read_bytes()[member.start :][:8] == b"12345678" and member.num_bytes == 8
    assert read_torch(path) is None


@pytest.mark.exhaustive
def test_a_storage_beyond_four_gigabytes_is_found(tmp_path: Path) -> None:
    tensor = torch.zeros((1 << 32) + 8, dtype=torch.uint8)
    tensor[-1] = 7
    torch.save([tensor, torch.arange(4.0)], tmp_path / "x.pt")
    large, small = read_torch(tmp_path / "x.pt")
    assert large.read(Box((1 << 32,), (8,))).tolist() == [0] * 7 + [7]
    assert values(small).tolist() == [0, 1, 2, 3]


def zipped(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def test_a_compressed_member_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = zipped(tmp_path / "bomb.pt", {"x/data.pkl": b"\0" * 50_000_000}, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    with pytest.raises(CheckpointError, match=r"bomb.pt: member 'x/data.pkl' is compressed"):
        read_torch(path)


def patch(path: Path, signature: bytes, at: int, value: bytes, *, which: int = 0) -> None:
    data = bytearray(path.read_bytes())
    start = -1
    for _ in range(which + 1):
        start = data.index(signature, start + 1)
    data[start + at : start + at + len(value)] = value
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a size of terabytes": (lambda p: patch(p, b"PK\1\2", 20, b"\xfe\xff\xff\xff" * 2), "claims 4294967294 bytes"),
    "sizes that differ": (lambda p: patch(p, b"PK\1\2", 20, b"\x01\0\0\0"), "it is damaged"),
    "an encrypted member": (lambda p: patch(p, b"PK\1\2", 8, b"\x01"), "is encrypted"),
    "a directory elsewhere": (lambda p: patch(p, b"PK\5\6", 16, b"\xf0\xff\xff\xff"), "its archive claims 2 members"),
    "a count of members": (lambda p: patch(p, b"PK\5\6", 10, b"\xf0\xff"), "its archive claims 65520 members"),
    "a name that differs": (lambda p: patch(p, b"PK\3\4", 30, b"y"), "not where the directory of its archive places"),
    "no local header": (lambda p: patch(p, b"PK\3\4", 0, b"xx"), "not where the directory"),
    "extra that reaches over": (lambda p: patch(p, b"PK\3\4", 28, b"\xff\0"), "overlaps the one after it"),
    "two members at one place": (lambda p: patch(p, b"PK\1\2", 42, b"\0\0\0\0", which=1), "at one place"),
    "one name twice": (lambda p: patch(p, b"PK\1\2", 46, b"x/data.pkl", which=1), "two members 'x/data.pkl'"),
    "a tail": (lambda p: p.write_bytes(p.read_bytes() + b"x"), "does not end with its directory"),
    "a cut": (lambda p: p.write_bytes(p.read_bytes()[:-30]), "no zip archive, or truncated"),
    "nothing": (lambda p: p.write_bytes(b""), "no zip archive, or truncated"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_archive_is_refused_by_file_and_cause(tmp_path: Path, kind: str) -> None:
    path = zipped(tmp_path / "x.pt", {"x/data.pkl": b"\x80\x02N.", "x/data/ab0": b"12345678"})
    assert read_torch(path) is None
    damage, message = DAMAGE[kind]
    damage(path)
    with pytest.raises(CheckpointError, match=rf"x\.pt: .*{message}"):
        read_torch(path)


TENSOR = (
    "ctorch._utils\n_rebuild_tensor_v2\n((Vstorage\nctorch\n{storage}\nV0\nVcpu\nI{count}\ntQ"
    "I{offset}\n({shape}t({stride}tI00\n}}tR."
)
LIES: dict[str, tuple[dict[str, Any], str]] = {
    "more elements than bytes": ({"count": 100}, "storage '0' of 100 elements of F32 in 16 bytes"),
    "a shape of terabytes": ({"shape": "I1099511627776\n"}, "shape .* of a storage of 4 elements"),
    "a shape of terabytes without a stride": ({"shape": "I1099511627776\n", "stride": "I0\n"}, "of 4 elements"),
    "an offset beyond": ({"offset": 3}, "at 3 of a storage of 4 elements"),
    "a negative offset": ({"offset": -1}, "not a size"),
    "a negative stride": ({"stride": "I-1\n"}, "not a size"),
    "a stride that leaves it": ({"stride": "I4\n"}, "of a storage of 4 elements"),
    "a stride too many": ({"stride": "I1\nI1\n"}, r"shape \[2\] with strides \[1, 1\]"),
    "no storage class": ({"storage": "float32"}, "a storage of no known class"),
}


@pytest.mark.parametrize("kind", ["the truth", *LIES])
def test_a_tensor_that_does_not_fit_its_storage_is_refused(tmp_path: Path, kind: str) -> None:
    fields = {"storage": "FloatStorage", "count": 4, "offset": 1, "shape": "I2\n", "stride": "I2\n"}
    lie, message = LIES.get(kind, ({}, ""))
    data = np.arange(4, dtype=np.float32).tobytes()
    path = zipped(tmp_path / "x.pt", {"x/data.pkl": TENSOR.format(**fields | lie).encode(), "x/data/0": data})
    if not lie:
        assert values(read_torch(path)).tolist() == [1, 3]
        return
    with pytest.raises(CheckpointError, match=rf"x\.pt: .*{message}"):
        read_torch(path)


def test_a_big_endian_file_is_refused(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.pt", {"x/data.pkl": b"N.", "x/byteorder": b"big"})
    with pytest.raises(CheckpointError, match="big-endian"):
        read_torch(path)


def test_a_file_before_the_zip_format_that_is_cut_is_refused(tmp_path: Path) -> None:
    torch.save({"x": torch.arange(4.0)}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    data = (tmp_path / "x.pt").read_bytes()
    for size in range(0, len(data), 7):
        (tmp_path / "x.pt").write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=r"x\.pt"):
            read_torch(tmp_path / "x.pt")
