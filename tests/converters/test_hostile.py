"""Folders made to exhaust memory, to wait for ever or to read what lies outside are refused at once, with the cause."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from converters.open import open_checkpoint
from tests.helpers.checkpoints import random_native
from tests.helpers.hf_models import save_model
from workbench.checkpoint.safetensors_io import read_header
from workbench.errors import CheckpointError, WorkbenchError

LLAMA = "llama, tied, grouped, llama3 rope"
pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    cases = {"llama": LLAMA, "gpt2": "gpt2", "gemma3": "gemma3, untied, biased, capped"}
    return {name: save_model(case, root / name) for name, case in cases.items()}


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("count", [1000, 10**9, 10**30])
@pytest.mark.parametrize(
    ("family", "key"), [("llama", "num_hidden_layers"), ("gpt2", "n_layer"), ("gemma3", "num_hidden_layers")]
)
def test_a_configuration_of_a_billion_layers_is_refused_before_they_are_listed(
    sources: Mapping[str, Path], tmp_path: Path, family: str, key: str, count: int
) -> None:
    shutil.copytree(sources[family], tmp_path / "in")
    edit(tmp_path / "in/config.json", **{key: count}, layer_types=None)
    with pytest.raises(WorkbenchError, match=r"num_hidden_layers|layer_types"):
        open_checkpoint(tmp_path / "in")


DEEP = b"[" * 1_000_000
WIDE = b"[" + b"[]," * 9_000_000 + b"0]"


def header(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(("text", "message"), [(DEEP, "nests too deep"), (WIDE, "9000001 lists and objects")])
def test_json_made_to_fill_stack_or_memory_is_refused(
    sources: Mapping[str, Path], tmp_path: Path, text: bytes, message: str
) -> None:
    shutil.copytree(sources["llama"], tmp_path / "in")
    for name, content in (
        ("config.json", text),
        ("model.safetensors.index.json", text),
        ("model.safetensors", header(text)),
    ):
        kept = (tmp_path / "in" / name).read_bytes() if (tmp_path / "in" / name).exists() else None
        (tmp_path / "in" / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"{name}.*{message}"):
            open_checkpoint(tmp_path / "in")
        if kept is None:
            (tmp_path / "in" / name).unlink()
        else:
            (tmp_path / "in" / name).write_bytes(kept)


@pytest.mark.parametrize(
    ("file", "message"), [("x" * 300, "missing"), ("\ud800", "surrogates not allowed"), ("a\0b", "not a file")]
)
def test_names_that_no_file_can_have_are_refused(
    sources: Mapping[str, Path], tmp_path: Path, file: str, message: str
) -> None:
    shutil.copytree(sources["llama"], tmp_path / "in")
    (tmp_path / "in/model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": file}}))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "in")


def test_adapters_that_are_each_others_base_are_refused(tmp_path: Path) -> None:
    for name, base in (("a", "b"), ("b", "a")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    with pytest.raises(CheckpointError, match="is an adapter itself"):
        open_checkpoint(tmp_path / "a")


@pytest.mark.parametrize("shape", [[2] * 65, [1 << 61] * 3, [0, 1 << 60], [1 << 59]])
def test_a_shape_that_no_array_has_is_refused_before_it_is_multiplied(tmp_path: Path, shape: list[int]) -> None:
    entry = {"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}
    (tmp_path / "x.safetensors").write_bytes(header(json.dumps(entry).encode()))
    with pytest.raises(CheckpointError, match=r"'x': shape .* is not a list of sizes"):
        read_header(tmp_path / "x.safetensors")


def test_links_out_of_the_folder_are_followed_only_in_a_download_cache(
    sources: Mapping[str, Path], tmp_path: Path
) -> None:
    snapshot = tmp_path / "models--x/snapshots/abc"
    shutil.copytree(sources["llama"], snapshot)
    (tmp_path / "models--x/blobs").mkdir()
    weights = snapshot / "model.safetensors"
    weights.rename(tmp_path / "models--x/blobs/0123")
    weights.symlink_to("../../blobs/0123")
    assert open_checkpoint(snapshot).source.schema
    plain = tmp_path / "plain"
    shutil.copytree(snapshot, plain, symlinks=True)
    (plain / "model.safetensors").unlink()
    (plain / "model.safetensors").symlink_to(tmp_path / "models--x/blobs/0123")
    with pytest.raises(CheckpointError, match=r"model.safetensors: is a link out of its folder, to .*0123"):
        open_checkpoint(plain)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(sources: Mapping[str, Path], tmp_path: Path, name: str) -> None:
    shutil.copytree(sources["llama"], tmp_path / "in")
    replace_by_pipe(tmp_path / "in" / name)
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "in")


@pytest.mark.parametrize("pattern", ["manifest.json", "model*.safetensors"])
def test_a_pipe_in_a_native_checkpoint_is_not_waited_for(tmp_path: Path, pattern: str) -> None:
    random_native(tmp_path / "in")
    replace_by_pipe(min((tmp_path / "in").glob(pattern)))
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "in")


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)
