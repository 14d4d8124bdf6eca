"""Native checkpoints: what is written is read back at any box, and what is damaged is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from xxhash import xxh3_64_hexdigest

from tests.helpers.boxes import boxes_in
from tests.helpers.checkpoints import MemorySource, random_native, read_all, tiny_model
from workbench.checkpoint.manifest import read_manifest
from workbench.checkpoint.reader import open_native
from workbench.checkpoint.writer import prepare
from workbench.errors import CheckpointError, ConfigError
from workbench.spec.layout import ParallelLayout


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> tuple[Path, MemorySource]:
    path = tmp_path_factory.mktemp("native") / "step-00000100"
    return path, random_native(path, layout=ParallelLayout(tp=2, pp=2))


@pytest.fixture
def copy(stored, tmp_path) -> Path:
    return Path(shutil.copytree(stored[0], tmp_path / "step-00000100"))


def rewrite(path: Path, change) -> None:
    """Changes the manifest's JSON and gives it a valid checksum again."""
    raw = json.loads((path / "manifest.json").read_text())
    change(raw)
    raw["manifest_checksum"] = "0" * 16
    text = json.dumps(raw)
    (path / "manifest.json").write_text(text.replace("0" * 16, xxh3_64_hexdigest(text.encode()), 1))


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_box_of_any_tensor_reads_as_it_was_written(stored, data):
    path, source = stored
    opened = open_native(path)
    tensor = source.schema[data.draw(st.sampled_from(sorted(source.schema)))]
    box = data.draw(boxes_in(tensor.shape))
    found = opened.read(tensor.name, box)
    assert found.dtype == source.arrays[tensor.name].dtype
    assert np.array_equal(found, source.arrays[tensor.name][box.slices])


@pytest.mark.parametrize("min_run", [1, 1 << 30], ids=["run by run", "in slabs"])
def test_columns_read_alike_run_by_run_and_in_slabs(stored, monkeypatch, min_run):
    monkeypatch.setattr("workbench.checkpoint.reader._MIN_RUN_BYTES", min_run)
    monkeypatch.setattr("workbench.checkpoint.reader._BLOCK_BYTES", 100)
    path, source = stored
    opened = open_native(path)
    for name, tensor in source.schema.items():
        for chunk in opened.chunks(name):
            if len(tensor.shape) == 2 and chunk.size[1] > 4:
                box = type(chunk)((chunk.offset[0], chunk.offset[1] + 1), (chunk.size[0], 3))
                assert np.array_equal(opened.read(name, box), source.arrays[name][box.slices])


def test_the_files_are_plain_safetensors_of_boxes(stored):
    path, source = stored
    found = load_file(path / "optim-tp01-pp01.safetensors")
    name = "optim.exp_avg/layers.2.mlp.down_proj.weight"
    assert np.array_equal(found[f"{name}@0,12"], source.arrays[name][:, 12:])
    assert np.array_equal(
        load_file(path / "optim-tp00-pp01.safetensors")["optim.exp_avg/norm.weight"],
        source.arrays["optim.exp_avg/norm.weight"],
    )


def test_the_manifest_survives_writing_and_reading(stored):
    manifest = read_manifest(stored[0])
    assert manifest.training is not None and (manifest.training.step, manifest.training.seed) == (100, 7)
    assert manifest.layout == ParallelLayout(tp=2, pp=2)
    assert manifest.model == tiny_model()
    assert manifest.to_bytes() == (stored[0] / "manifest.json").read_bytes()


def test_reading_whole_boxes_in_order_verifies_their_checksums_on_the_way(stored):
    opened = open_native(stored[0])
    before = opened.unchecked_bytes
    name = "embed_tokens.weight"
    for chunk in opened.chunks(name):
        opened.read(name, chunk)
    assert before - opened.unchecked_bytes == opened.schema[name].numel * 2
    opened.check()
    assert opened.unchecked_bytes == 0


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)


def test_a_flipped_bit_is_found_by_file_tensor_and_both_checksums(copy):
    stored = read_manifest(copy).tensors["layers.3.mlp.up_proj.weight"].boxes[1]
    flip(copy / stored.file, stored.start + stored.num_bytes - 1)
    message = rf"{stored.file}: tensor 'layers.3.mlp.up_proj.weight', box at \[12, 0\]: checksum .*{stored.checksum}"
    with pytest.raises(CheckpointError, match=message):
        open_native(copy).check()
    with pytest.raises(CheckpointError, match=message):
        read_all(copy)


def test_a_flipped_bit_in_the_manifest_is_found(copy):
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text.replace('"rope_theta": 10000.0', '"rope_theta": 10001.0'))
    with pytest.raises(CheckpointError, match=r"manifest\.json: manifest_checksum is .* the manifest is damaged"):
        open_native(copy)


def test_a_truncated_and_a_missing_file_are_listed_together(copy):
    first, second = copy / "model-tp00-pp00.safetensors", copy / "optim-tp01-pp00.safetensors"
    size = first.stat().st_size
    first.write_bytes(first.read_bytes()[:-10])
    second.unlink()
    with pytest.raises(CheckpointError) as caught:
        open_native(copy)
    assert f"model-tp00-pp00.safetensors has {size - 10} bytes, not {size}; it is truncated" in str(caught.value)
    assert "optim-tp01-pp00.safetensors is missing" in str(caught.value)


def test_a_file_of_another_checkpoint_is_noticed(copy):
    path = copy / "model-tp00-pp00.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"BF16"', b'"F16" '))
    with pytest.raises(CheckpointError, match=r"tensor 'embed_tokens.weight'.* says BF16 .*has F16 .*mixed up"):
        open_native(copy)


def test_an_unfinished_checkpoint_does_not_exist_and_says_why(tmp_path):
    partial = prepare(tmp_path / "step-00000200")
    for path in (partial, tmp_path / "step-00000200"):
        with pytest.raises(CheckpointError, match=r"step-00000200.*unfinished.*save was interrupted"):
            open_native(path)


def test_a_folder_whose_writer_died_before_the_rename_is_unfinished(copy):
    partial = copy.rename(copy.with_name("step-00000300.partial"))
    with pytest.raises(CheckpointError, match=r"step-00000300\.partial: an unfinished checkpoint"):
        open_native(partial)


def test_a_missing_a_foreign_and_a_newer_checkpoint_each_say_so(copy, tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere: no such checkpoint"):
        open_native(tmp_path / "nowhere")
    rewrite(copy, lambda raw: raw.update(version=3))
    with pytest.raises(CheckpointError, match=r"format version 3, but this program reads up to version 2; update"):
        open_native(copy)
    rewrite(copy, lambda raw: raw.update(format="someone-else"))
    with pytest.raises(CheckpointError, match=r"format 'someone-else' is not 'workbench-checkpoint'"):
        open_native(copy)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"empty: has no manifest\.json"):
        open_native(tmp_path / "empty")


def test_a_checkpoint_of_version_1_is_read_without_its_fingerprints_which_were_others(copy):
    before = open_native(copy).manifest
    rewrite(copy, lambda raw: raw.update(version=1))
    old = open_native(copy).manifest
    assert {stored.fingerprint for stored in old.tensors.values()} == {""}
    assert {name: stored.boxes for name, stored in old.tensors.items()} == {
        name: stored.boxes for name, stored in before.tensors.items()
    }


HOSTILE = {
    "a path that climbs out": (lambda raw: raw["files"].update({"../../etc/passwd": 10}), "leaves the folder"),
    "an absolute path": (lambda raw: raw["files"].update({"/etc/passwd": 10}), "leaves the folder"),
    "a box too many": (
        lambda raw: raw["tensors"]["norm.weight"]["boxes"].append(raw["tensors"]["norm.weight"]["boxes"][0]),
        "'norm.weight': boxes at .* overlap",
    ),
    "bytes after the end": (
        lambda raw: raw["tensors"]["norm.weight"]["boxes"][0].__setitem__(3, 1 << 40),
        "'norm.weight': ends after the",
    ),
    "a negative offset": (
        lambda raw: raw["tensors"]["norm.weight"]["boxes"][0].__setitem__(3, -5),
        "-5 is not a size",
    ),
    "an unknown file": (
        lambda raw: raw["tensors"]["norm.weight"]["boxes"][0].__setitem__(2, "x.safetensors"),
        "not among the files",
    ),
    "no tensors": (lambda raw: raw.pop("tensors"), "'tensors' is missing"),
    "a seed that is no whole number": (lambda raw: raw["training"].update(seed=float("inf")), "seed inf is not"),
    "a model field that is wrong": (lambda raw: raw["model"].update(hidden_size=-1), "hidden_size"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_manifest_is_refused(copy, kind):
    change, message = HOSTILE[kind]
    rewrite(copy, change)
    with pytest.raises(CheckpointError, match=message):
        open_native(copy)


def test_a_destination_that_exists_is_refused_and_left_alone(copy):
    with pytest.raises(ConfigError, match=r"step-00000100 exists already"):
        prepare(copy)
    open_native(copy).check()
