"""Tensors without a place are refused, unless a pattern of the user lets them go; what goes is written down."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from converters.format import OpenedCheckpoint
from converters.job import JobOptions, make_job
from converters.open import get_format, open_checkpoint
from tests.converters.formats.test_deepspeed_universal import save_universal
from tests.finetune.adapters import write_adapter, write_base
from tests.helpers.checkpoints import MemorySource, checkpoint_schema, random_arrays, read_all, tiny_model
from tests.helpers.hf_models import save_model
from tests.helpers.models import gated_model
from workbench.checkpoint.manifest import read_manifest
from workbench.cli.main import main
from workbench.errors import ConversionError
from workbench.spec.geometry import LogicalTensor
from workbench.spec.layout import ParallelLayout
from workbench.spec.lora import LoraSpec

EXTRA = {f"model.layers.{i}.self_attn.q_norm.weight": torch.ones(8) for i in range(4)}


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A Hugging Face folder with tensors that its family does not know."""
    folder = save_model("llama, tied, grouped, llama3 rope", tmp_path / "hf")
    file = folder / "model.safetensors"
    save_file({**load_file(file), **EXTRA, "spare": torch.ones(2)}, file, {"format": "pt"})
    return folder


def test_an_import_names_what_has_no_place_and_the_way_out(
    foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["import", str(foreign), str(tmp_path / "x"), "--verify", "crc"]) == 3
    said = capsys.readouterr().err
    assert "4 tensors 'model.layers.*.self_attn.q_norm.weight', tensor 'spare' have no place in family 'llama'" in said
    assert "--allow-drop REGEX" in said
    words = ["import", str(foreign), str(tmp_path / "x"), "--verify", "crc", "--allow-drop", ".*q_norm.*"]
    assert main(words) == 3
    assert "tensor 'spare' has no place" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_what_is_dropped_is_in_the_plan_the_result_and_the_lineage(
    foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["import", str(foreign), str(tmp_path / "x"), "--verify", "full"]
    words += ["--allow-drop", r".*\.q_norm\.weight", "--allow-drop", "spare"]
    assert main([*words, "--dry-run"]) == 0
    assert "drops model.layers.*.self_attn.q_norm.weight: allowed by " in capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert sorted(result["dropped"]) == sorted([*EXTRA, "spare"])
    why = {
        r"allowed by '.*\\.q_norm\\.weight'": ["model.layers.*.self_attn.q_norm.weight"],
        "allowed by 'spare'": ["spare"],
    }
    assert result["dropped_why"] == why
    assert read_manifest(tmp_path / "x").lineage[-1]["dropped"] == why


def test_a_pattern_that_allows_nothing_is_a_slip(
    foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drops = ["--allow-drop", ".*q_norm.*", "--allow-drop", "spare"]
    for pattern, message in (
        ("norm.weight", "matches no tensor without a place"),
        ("(", "is not a regular expression"),
    ):
        words = ["import", str(foreign), str(tmp_path / "x"), "--verify", "crc", *drops, "--allow-drop", pattern]
        assert main(words) == 2
        assert f"--allow-drop {pattern!r} {message}" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_native_tensor_that_the_model_does_not_know_is_kept_or_dropped_as_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model()
    schema = {**checkpoint_schema(model), "spare": LogicalTensor("spare", (3,), "F32")}
    source = MemorySource(schema, random_arrays(schema))
    opened = OpenedCheckpoint("native", tmp_path, source, model)
    options = JobOptions(ParallelLayout())
    make_job(opened, get_format("native"), tmp_path / "a", options, operation="test").run()
    assert main(["reshard", str(tmp_path / "a"), str(tmp_path / "b"), "--tp", "2"]) == 0
    assert np.array_equal(read_all(tmp_path / "b")["spare"], source.arrays["spare"])
    assert main(["reshard", str(tmp_path / "a"), str(tmp_path / "c"), "--allow-drop", "spare"]) == 0
    assert "spare" not in read_all(tmp_path / "c")
    capsys.readouterr()
    assert main(["export", str(tmp_path / "b"), str(tmp_path / "hf"), "--verify", "crc"]) == 3
    assert "tensor 'spare' has no place in a Hugging Face folder" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "b"), str(tmp_path / "hf"), "--verify", "full", "--allow-drop", "spare"]) == 0


def dcp_folder(foreign: Path, folder: Path) -> list[str]:
    """The folder's tensors saved by torch.distributed.checkpoint, with a moment of one that has no place."""
    moments = {"state": {"spare": {"exp_avg": torch.ones(2)}}}
    state = {"model": load_file(foreign / "model.safetensors"), "optimizer": moments}
    dcp.save(state, checkpoint_id=folder)
    return ["model.spare", *(f"model.{name}" for name in EXTRA), "optimizer.state.spare.exp_avg"]


def universal_folder(foreign: Path, folder: Path) -> list[str]:
    """The folder's tensors as DeepSpeed's universal checkpoints have them."""
    save_universal(foreign, folder, zero=1)
    return ["spare", *EXTRA]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("make", [dcp_folder, universal_folder])
def test_tensors_without_a_place_are_refused_or_dropped_in_other_formats_too(
    foreign: Path, tmp_path: Path, make: Callable[[Path, Path], list[str]]
) -> None:
    names = make(foreign, tmp_path / "in")
    shutil.copy(foreign / "config.json", tmp_path / "in")
    with pytest.raises(ConversionError, match=r"spare'.* have no place .*--allow-drop REGEX"):
        open_checkpoint(tmp_path / "in")
    opened = open_checkpoint(tmp_path / "in", allow_drop=[r".*spare.*", r".*q_norm.*"])
    assert sorted(opened.dropped) == sorted(names)


def test_tensors_of_an_adapter_without_a_place_are_refused_or_dropped_merged_or_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_base(tmp_path / "base", gated_model())
    adapter = write_adapter(tmp_path / "adapter", gated_model(), LoraSpec(r=2), base)
    assert main(["export", str(adapter), str(tmp_path / "peft"), "--to", "peft", "--verify", "full", "-q"]) == 0
    file, config = tmp_path / "peft" / "adapter_model.safetensors", tmp_path / "peft" / "adapter_config.json"
    spare = "base_model.model.spare.weight"
    save_file({**load_file(file), spare: torch.ones(2)}, file, {"format": "pt"})
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(base)}))
    for words in (["import"], ["merge"], ["merge", "--base", str(base)]):
        words = [*words, str(tmp_path / "peft"), str(tmp_path / "x"), "--verify", "full"]
        capsys.readouterr()
        assert main(words) == 3
        said = capsys.readouterr().err
        assert f"tensor '{spare}' has no place in family 'llama'; --allow-drop REGEX leaves out what it" in said
        assert main([*words, "--allow-drop", ".*spare.*"]) == 0
        dropped = read_manifest(tmp_path / "x").lineage[-1]["dropped"]
        assert dropped == {"allowed by '.*spare.*'": [spare]}
        shutil.rmtree(tmp_path / "x")
