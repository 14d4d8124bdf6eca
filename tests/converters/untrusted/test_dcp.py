"""Folders of torch.distributed.checkpoint: what they hold, where it lies, and what is refused."""

from __future__ import annotations

import io
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from converters.untrusted.dcp import read_dcp
from workbench.errors import CheckpointError
from workbench.spec.geometry import Box


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dcp") / "in"
    state = {
        "model": {"w": torch.arange(12.0).view(3, 4), "half": torch.ones(2, dtype=torch.bfloat16)},
        "optim": [torch.tensor(3.0)],
        "step": 7,
        "extra": io.BytesIO(b"abc"),
    }
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def write(folder: Path, metadata: Any, files: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / ".metadata").write_bytes(metadata if isinstance(metadata, bytes) else pickle.dumps(metadata))
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def stored(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def cut(tensor: torch.Tensor, boxes: list[Box], file: str = "__0_0.distcp") -> tuple[Metadata, dict[str, bytes]]:
    """The metadata of one tensor "w" cut into boxes, and the file that holds them."""
    chunks = [ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.size)) for box in boxes]
    data, places = b"", {}
    for box in boxes:
        part = stored(tensor[box.slices].clone())
        places[MetadataIndex("w", box.offset)] = _StorageInfo(file, len(data), len(part))
        data += part
    properties = TensorProperties(dtype=tensor.dtype)
    return Metadata({"w": TensorStorageMetadata(properties, tensor.shape, chunks)}, None, places), {file: data}


def test_tensors_and_objects_are_found_where_they_lie(saved: Path) -> None:
    folder = read_dcp(saved)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in folder.tensors.items()} == {
        "model.w": ((3, 4), "F32"),
        "model.half": ((2,), "BF16"),
        "optim.0": ((), "F32"),
    }
    (piece,) = folder.tensors["model.w"].pieces
    assert piece.box == Box.whole((3, 4))
    assert np.array_equal(piece.locate().read(Box((1, 1), (2, 2))), np.arange(12.0).reshape(3, 4)[1:, 1:3])
    assert folder.read_object("step") == 7
    assert folder.read_object("extra").data == b"abc"


def test_pieces_carry_their_boxes(tmp_path: Path) -> None:
    tensor = torch.arange(20, dtype=torch.int32).view(4, 5)
    boxes = [Box((0, 0), (1, 5)), Box((1, 0), (3, 2)), Box((1, 2), (3, 3))]
    found = read_dcp(write(tmp_path / "in", *cut(tensor, boxes))).tensors["w"]
    assert [piece.box for piece in found.pieces] == boxes
    for piece in found.pieces:
        read = piece.locate().read(Box.whole(piece.box.size))
        assert np.array_equal(read, tensor.numpy()[piece.box.slices])


def test_the_classes_of_megatron_and_cached_plans_are_understood(tmp_path: Path) -> None:
    metadata, files = cut(torch.arange(4.0), [Box((0,), (4,))])
    entry = metadata.state_dict_metadata["w"]
    assert isinstance(entry, TensorStorageMetadata)
    data = TensorWriteData(entry.chunks[0], entry.properties, entry.size)
    item = WriteItem(MetadataIndex("w", [0], 0), WriteItemType.SHARD, tensor_data=data)
    metadata.all_local_plans = [SavePlan([item]), SavePlan([])]  # type: ignore[attr-defined]
    data = pickle.dumps(metadata, 2).replace(
        b"ctorch.distributed.checkpoint.metadata\nMetadata\n",
        b"cmegatron.core.dist_checkpointing.strategies.torch\nMCoreMetadata\n",
    )
    assert b"MCoreMetadata" in data
    folder = read_dcp(write(tmp_path / "in", data, files))
    assert folder.tensors["w"].pieces[0].locate().read(Box.whole((4,))).tolist() == [0, 1, 2, 3]


def missing_place(metadata: Metadata) -> None:
    metadata.storage_data.clear()


def elsewhere(name: str) -> Callable[[Metadata], None]:
    def change(metadata: Metadata) -> None:
        for info in metadata.storage_data.values():
            info.relative_path = name

    return change


def compressed(metadata: Metadata) -> None:
    for info in metadata.storage_data.values():
        info.transform_descriptors = ["zstd"]


def other_dtype(metadata: Metadata) -> None:
    metadata.state_dict_metadata["w"].properties.dtype = torch.float16  # type: ignore[union-attr]


def beyond(metadata: Metadata) -> None:
    next(iter(metadata.storage_data.values())).length = 1 << 50


def uncovered(metadata: Metadata) -> None:
    metadata.state_dict_metadata["w"].chunks.pop()  # type: ignore[union-attr]


def backwards(metadata: Metadata) -> None:
    next(iter(metadata.storage_data.values())).offset = -1


def no_tensor(metadata: Metadata) -> None:
    metadata.state_dict_metadata["w"] = 3  # type: ignore[assignment]


def no_bytes(metadata: Metadata) -> None:
    metadata.state_dict_metadata["b"] = BytesStorageMetadata()


FAULTS: dict[str, tuple[Callable[[Metadata], None], str]] = {
    "no place": (missing_place, r"'w' at \(0,\) has no place in any file"),
    "a path upwards": (elsewhere("../secret"), r"names '../secret', which is not a file of this folder"),
    "an absolute path": (elsewhere("/etc/passwd"), "names '/etc/passwd'"),
    "a file that is missing": (elsewhere("other"), "other: cannot be read, named in .metadata"),
    "a stream transform": (compressed, "'w' is compressed"),
    "a range beyond the file": (beyond, "it is truncated"),
    "a negative place": (backwards, r"\.metadata: has a shape or strides with an entry that is not a size"),
    "a chunk missing": (uncovered, "'w': boxes hold 2 of 4 elements"),
    "an entry of another kind": (no_tensor, "is not the metadata of a checkpoint"),
    "an object without a place": (no_bytes, "'b' at None has no place"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_metadata_that_lies_is_refused(tmp_path: Path, kind: str) -> None:
    metadata, files = cut(torch.arange(4.0), [Box((0,), (2,)), Box((2,), (2,))])
    change, message = FAULTS[kind]
    change(metadata)
    with pytest.raises(CheckpointError, match=message):
        read_dcp(write(tmp_path / "in", metadata, files))


def test_a_chunk_that_is_not_what_the_metadata_says_is_refused(tmp_path: Path) -> None:
    metadata, files = cut(torch.arange(4.0), [Box((0,), (4,))])
    other_dtype(metadata)
    piece = read_dcp(write(tmp_path / "in", metadata, files)).tensors["w"].pieces[0]
    with pytest.raises(CheckpointError, match=r"holds F32 \[4\] at byte 0, where .metadata says F16 \[4\]"):
        piece.locate()


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    metadata, files = cut(torch.arange(4.0), [Box((0,), (4,))])
    folder = write(tmp_path / "in", metadata, files)
    (folder / "__0_0.distcp").rename(tmp_path / "secret")
    (folder / "__0_0.distcp").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"__0_0.distcp: is a link out of its folder, to .*secret"):
        read_dcp(folder)


@pytest.mark.exhaustive
def test_a_hundred_thousand_chunks_are_read_in_seconds(tmp_path: Path) -> None:
    tensors, places = {}, {}
    properties = TensorProperties(dtype=torch.bfloat16)
    for i in range(100):
        name, offsets = f"decoder.layers.mlp.linear_fc{i}.weight", [(row // 10, row % 10 * 8, 0) for row in range(1000)]
        chunks = [ChunkStorageMetadata(torch.Size(o), torch.Size((1, 8, 64))) for o in offsets]
        tensors[name] = TensorStorageMetadata(properties, torch.Size((100, 80, 64)), chunks)
        places |= {MetadataIndex(name, o, row): _StorageInfo("__0_0.distcp", row, 1) for row, o in enumerate(offsets)}
    folder = write(tmp_path / "in", Metadata(tensors, None, places), {"__0_0.distcp": bytes(2000)})
    start = time.process_time()
    assert sum(len(tensor.pieces) for tensor in read_dcp(folder).tensors.values()) == 100_000
    assert time.process_time() - start < 15
