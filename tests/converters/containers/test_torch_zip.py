"""Files laid out for torch.load: read by torch, by Python's zip module and by the reader for files of strangers."""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from converters.containers.pickle_writer import Call, Global, Instance, dump
from converters.containers.torch_zip import (
    Storage,
    StoredTensor,
    TorchFile,
    lay_out_torch,
    new_tensor,
    torch_dtype,
    torch_size,
)
from converters.formats._files import FileContent, Place, RangedWriter
from converters.untrusted.torch_file import read_torch
from workbench.checkpoint.descriptors import Descriptors
from workbench.spec.dtypes import NUMPY_NAMES, TORCH_NAMES
from workbench.spec.geometry import Box

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.lists(inner).map(tuple),
    max_leaves=20,
)


@given(value=PLAIN)
def test_plain_data_come_back_from_the_pickle_as_they_were(value: Any) -> None:
    assert pickle.loads(dump(value)) == value


def test_what_is_named_is_found_by_the_loader() -> None:
    value = [
        OrderedDict(a=1, b=[]),
        Namespace(x=1, y=Namespace(z=None)),
        Global("decimal", "Decimal"),
        Call(Global("fractions", "Fraction"), (1, 3)),
        Instance(Global("types", "SimpleNamespace"), {"k": "v"}),
        ["twice"] * 300,
    ]
    found = pickle.loads(dump(value))
    assert found[:2] == [OrderedDict(a=1, b=[]), Namespace(x=1, y=Namespace(z=None))]
    assert type(found[0]) is OrderedDict
    assert found[2].__name__ == "Decimal" and str(found[3]) == "1/3" and found[4].k == "v"
    assert found[5] == ["twice"] * 300 and dump(value).count(b"twice") == 1


def write(path: Path, laid: TorchFile, arrays: dict[Storage, np.ndarray]) -> Path:
    writer = RangedWriter(path, FileContent(laid.num_bytes, laid.known, laid.checksums), Descriptors(os.O_RDWR))
    writer.create()
    for storage, array in arrays.items():
        whole = Box.whole(array.shape)
        writer.write(Place(path.name, laid.storages[storage]), array.shape, whole, array)
    writer.seal()
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A file with tensors of every kind, and what they are."""
    tree: dict[str, Any] = {}
    arrays, expected = {}, {}
    for dtype, name in NUMPY_NAMES.items():
        tensor = tree[dtype] = new_tensor(dtype, (3, 4))
        values = np.arange(12).reshape(3, 4) % 2 if dtype == "BOOL" else np.arange(12).reshape(3, 4)
        arrays[tensor.storage] = values.astype(name)
        expected[dtype] = torch.from_numpy(arrays[tensor.storage]).view(getattr(torch, TORCH_NAMES[dtype]))
    shared = Storage("F32", 10)
    arrays[shared] = np.arange(10, dtype=np.float32)
    whole = torch.from_numpy(arrays[shared])
    tree |= {"view": StoredTensor(shared, (2, 3), 4), "turned": StoredTensor(shared, (3, 2), 4, (1, 3))}
    expected |= {"view": whole[4:].view(2, 3), "turned": whole[4:].view(2, 3).T}
    tree |= {"empty": new_tensor("F32", (0, 3)), "scalar": new_tensor("F32", (), struct.pack("<f", 1.5))}
    expected |= {"empty": torch.empty(0, 3), "scalar": torch.tensor(1.5)}
    tree |= {"type": torch_dtype("BF16"), "size": torch_size((1, 2)), "list": [1, "a", (True, None)]}
    return write(tmp_path_factory.mktemp("zip") / "x.pt", lay_out_torch(tree), arrays), expected


@pytest.mark.parametrize("options", [{"weights_only": True}, {"weights_only": False}, {"mmap": True}])
def test_torch_loads_what_was_laid_out(saved: tuple[Path, dict[str, torch.Tensor]], options: dict[str, Any]) -> None:
    path, expected = saved
    found = torch.load(path, **options)
    assert (found.pop("type"), found.pop("size"), found.pop("list")) == (
        torch.bfloat16,
        torch.Size([1, 2]),
        [1, "a", (True, None)],
    )
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].stride()) == (tensor.dtype, tensor.stride())
        assert torch.equal(found[name], tensor), name
    assert found["view"].untyped_storage().data_ptr() == found["turned"].untyped_storage().data_ptr()


def test_checksums_and_structure_satisfy_other_readers(saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, expected = saved
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    found = read_torch(path)
    assert found["BF16"].start % 64 == 0
    for name, tensor in expected.items():
        array = found[name].read(Box.whole(found[name].shape))
        assert np.array_equal(array, tensor.view(torch.uint16).numpy() if name == "BF16" else tensor.numpy()), name


def test_the_members_lie_where_torch_puts_them(saved: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    torch.save([torch.arange(5.0), torch.arange(70), torch.empty(0)], tmp_path / "archive.pt")
    theirs = members(tmp_path / "archive.pt")
    value = [new_tensor("F32", (5,)), new_tensor("I64", (70,)), new_tensor("F32", (0,)), ""]
    short = members(write(tmp_path / "short.pt", lay_out_torch(value), {}))
    value[3] = "x" * (theirs[0][2] - short[0][2])  # for a pickle as long as theirs
    assert members(write(tmp_path / "ours.pt", lay_out_torch(value), {})) == theirs
    assert (tmp_path / "ours.pt").stat().st_size == (tmp_path / "archive.pt").stat().st_size


def members(path: Path) -> list[tuple[Any, ...]]:
    with zipfile.ZipFile(path) as archive:
        return [(m.filename, m.header_offset, m.file_size, m.flag_bits, m.extra) for m in archive.infolist()]


def test_what_lies_beyond_4_gib_is_found(tmp_path: Path) -> None:
    size = (1 << 32) + 8
    laid = lay_out_torch([new_tensor("U8", (size,)), new_tensor("F32", (2,), struct.pack("<2f", 1, 2))])
    with (tmp_path / "large.pt").open("wb") as file:
        file.truncate(laid.num_bytes)  # sparse
        for start, data in laid.known:
            file.seek(start)
            file.write(data)
    large, last = torch.load(tmp_path / "large.pt", mmap=True)
    assert large.shape == (size,) and large[-1] == 0
    assert torch.equal(last, torch.tensor([1.0, 2.0]))
    with zipfile.ZipFile(tmp_path / "large.pt") as archive:
        found = {member.filename: member.file_size for member in archive.infolist()}
        assert archive.read("archive/data/1") == struct.pack("<2f", 1, 2)
        assert (found["archive/data/0"], found["archive/data/1"]) == (size, 8)
    assert read_torch(tmp_path / "large.pt")[1].read(Box((0,), (2,))).tolist() == [1, 2]
