"""Folders laid out for torch.distributed.checkpoint, read by it and by the reader for files of strangers."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from converters.containers.dcp import GlobalTensor, lay_out_dcp
from converters.formats._files import RangedWriter
from converters.untrusted.dcp import read_dcp
from workbench.checkpoint.descriptors import Descriptors
from workbench.spec.geometry import Box

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
QUARTERS = tuple((Box((row, column), (2, 3)), f"__{row // 2}_0.distcp") for row in (0, 2) for column in (0, 3))
TENSORS = {
    "model.cut.by.dots": GlobalTensor("BF16", (4, 6), QUARTERS),
    "model.empty": GlobalTensor("F32", (0, 3), ((Box.whole((0, 3)), "__0_0.distcp"),)),
    "step": GlobalTensor("F32", (), ((Box((), ()), "__1_0.distcp"),), data=struct.pack("<f", 7)),
}
OBJECTS = {"groups.lr": ("__0_0.distcp", 0.5), "groups.betas": ("__1_0.distcp", (0.9, [True, None, "x"]))}
PATHS = {name: tuple(name.split(".", 1)) for name in (*TENSORS, *OBJECTS)}
BITS = np.arange(24, dtype=np.uint16).reshape(4, 6) + 0x3F80


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dcp")
    laid = lay_out_dcp(TENSORS, OBJECTS, planner_data=PATHS)
    descriptors = Descriptors(os.O_RDWR)
    writers = {file: RangedWriter(path / file, content, descriptors) for file, content in laid.files.items()}
    for writer in writers.values():
        writer.create()
    assert laid.tensors.keys() == {"model.cut.by.dots", "model.empty"}
    for piece in laid.tensors["model.cut.by.dots"].pieces:
        (place,) = piece.places
        writers[place.file].write(place, piece.box.size, Box.whole(piece.box.size), BITS[piece.box.slices])
    for writer in writers.values():
        writer.seal()
    return path


def expected() -> dict[str, Any]:
    whole = torch.from_numpy(BITS).view(torch.bfloat16)
    return {
        "model": {"cut.by.dots": whole, "empty": torch.empty(0, 3)},
        "step": torch.tensor(7.0),
        "groups": {"lr": 0.5, "betas": (0.9, [True, None, "x"])},
    }


def test_torch_loads_it_into_a_state_dictionary(folder: Path) -> None:
    state = {
        "model": {"cut.by.dots": torch.zeros(4, 6, dtype=torch.bfloat16), "empty": torch.empty(0, 3)},
        "step": torch.tensor(0.0),
        "groups": {"lr": None, "betas": None},
    }
    dcp.load(state, checkpoint_id=folder)
    wanted = expected()
    assert torch.equal(state["model"].pop("cut.by.dots"), wanted["model"].pop("cut.by.dots"))
    assert torch.equal(state["model"].pop("empty"), wanted["model"].pop("empty"))
    assert state == wanted


def test_torch_rebuilds_the_nested_state_dictionary(folder: Path, tmp_path: Path) -> None:
    dcp_to_torch_save(folder, tmp_path / "x.pt")
    found = torch.load(tmp_path / "x.pt")
    assert found.keys() == {"model", "step", "groups"} and found["groups"] == expected()["groups"]
    assert torch.equal(found["model"]["cut.by.dots"], expected()["model"]["cut.by.dots"])


def test_the_metadata_are_those_that_torch_would_write(folder: Path, tmp_path: Path) -> None:
    dcp.save(expected(), checkpoint_id=tmp_path / "theirs", no_dist=True)
    ours, theirs = (dcp.FileSystemReader(path).read_metadata() for path in (folder, tmp_path / "theirs"))
    assert (ours.planner_data, ours.version) == (theirs.planner_data, theirs.version)
    assert ours.state_dict_metadata.keys() == theirs.state_dict_metadata.keys()
    for name, entry in theirs.state_dict_metadata.items():
        found = ours.state_dict_metadata[name]
        assert type(found) is type(entry)
        if isinstance(found, TensorStorageMetadata) and isinstance(entry, TensorStorageMetadata):
            assert (found.properties, found.size) == (entry.properties, entry.size)
            assert name == "model.cut.by.dots" or found.chunks == entry.chunks


def test_the_reader_for_files_of_strangers_reads_it(folder: Path) -> None:
    found = read_dcp(folder)
    assert {name: found.read_object(name) for name in found.objects} == {
        "groups.lr": 0.5,
        "groups.betas": (0.9, [True, None, "x"]),
    }
    for piece in found.tensors["model.cut.by.dots"].pieces:
        place = piece.locate()
        assert place.start % 64 == 0
        assert np.array_equal(place.read(Box.whole(place.shape)), BITS[piece.box.slices])
    assert found.tensors["step"].pieces[0].locate().read(Box((), ())) == 7


def test_large_chunks_begin_on_a_page() -> None:
    whole = Box.whole((1 << 16,))
    large = {name: GlobalTensor("U8", whole.size, ((whole, "__0_0.distcp"),)) for name in "ab"}
    laid = lay_out_dcp(large, {"object": ("__0_0.distcp", "text")})
    places = [tensor.pieces[0].places[0].start for tensor in laid.tensors.values()]
    assert [place % 4096 for place in places] == [0, 0] and places[1] - places[0] < (1 << 16) + 2 * 4096
