"""DeepSpeed universal checkpoints, laid out as ds_to_universal.py of DeepSpeed lays them out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from converters.formats.deepspeed_universal import FORMAT
from converters.formats.huggingface import FORMAT as HUGGING_FACE
from converters.open import open_checkpoint
from tests.helpers.hf_models import save_model
from workbench.errors import CheckpointError, ConversionError
from workbench.spec.geometry import Box

CASES = ("llama, tied, grouped, llama3 rope", "gpt2, untied, own width, exact gelu")


def save_universal(source: Path, folder: Path, *, zero: int, step: int = 7) -> dict[str, dict[str, torch.Tensor]]:
    """The parameters of a Hugging Face folder, with moments of their own; what was stored, by state and parameter."""
    weights = load_file(source / "model.safetensors")
    torch.manual_seed(0)
    stored = {"fp32": weights, **{kind: {n: torch.rand(w.shape) for n, w in weights.items()} for kind in MOMENTS}}
    for state, tensors in stored.items():
        for name, tensor in tensors.items():
            part = folder / "zero" / name
            part.mkdir(parents=True, exist_ok=True)
            torch.save(tensor.flatten() if zero == 3 else {"cat_dim": 0, "param": tensor}, part / f"{state}.pt")
            if zero < 3:
                torch.save(torch.tensor(float(step)) if zero == 2 else step, part / "step.pt")
    states: dict[str, Any] = {
        "module": {},
        "param_shapes": [{name: tensor.shape for name, tensor in weights.items()}],
        "global_steps": step + 1,
        "global_samples": 96,
        "ds_config": {"zero_optimization": {"stage": zero}},
    }
    torch.save(states, folder / ("zero_pp_rank_0_" * (zero == 3) + "mp_rank_00_model_states.pt"))
    torch.save({"param_groups": [{"lr": 1e-3}]}, folder / "zero/optimizer_state.pt")
    shutil.copy(source / "config.json", folder)
    return stored


MOMENTS = ("exp_avg", "exp_avg_sq")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_weights_and_moments_are_those_that_were_stored(tmp_path: Path, case: str, zero: int) -> None:
    reference = save_model(case, tmp_path / "hf")
    stored = save_universal(reference, tmp_path / "in", zero=zero)
    opened = open_checkpoint(tmp_path / "in")
    assert opened.format == "deepspeed_universal"
    expected = HUGGING_FACE.open(reference).source
    assert {name for name in opened.source.schema if not name.startswith("optim.")} == set(expected.schema)
    for name, tensor in expected.schema.items():
        whole = Box.whole(tensor.shape)
        assert np.array_equal(opened.source.read(name, whole), expected.read(name, whole)), name
    for kind in MOMENTS:
        read = opened.source.read(f"optim.{kind}/norm.weight", Box.whole(opened.source.schema["norm.weight"].shape))
        norm = "model.norm.weight" if "model.norm.weight" in stored[kind] else "transformer.ln_f.weight"
        assert np.array_equal(read, stored[kind][norm].numpy())
    assert opened.training is not None
    assert (opened.training.step, opened.training.samples) == (8, 96)
    assert opened.training.optimizer["step"] == (8 if zero == 3 else 7)


def test_moments_go_through_the_same_views_as_their_weights(tmp_path: Path) -> None:
    reference = save_model(CASES[1], tmp_path / "hf")
    stored = save_universal(reference, tmp_path / "in", zero=2)
    source = FORMAT.open(tmp_path / "in").source
    fused = stored["exp_avg"]["transformer.h.0.attn.c_attn.weight"].numpy()
    shape = source.schema["layers.0.self_attn.k_proj.weight"].shape
    found = source.read("optim.exp_avg/layers.0.self_attn.k_proj.weight", Box.whole(shape))
    assert np.array_equal(found, fused[:, shape[0] : 2 * shape[0]].T)


def test_without_a_configuration_the_remedy_is_told(tmp_path: Path) -> None:
    save_universal(save_model(CASES[0], tmp_path / "hf"), tmp_path / "run/in", zero=1)
    (tmp_path / "run/in/config.json").rename(tmp_path / "run/config.json")
    assert FORMAT.open(tmp_path / "run/in").family == "llama"
    (tmp_path / "run/config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config.json, in it or beside it.*copy the model's"):
        FORMAT.open(tmp_path / "run/in")


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("exp_avg.pt", None, r"model.norm.weight: its exp_avg.pt is missing"),
        ("fp32.pt", None, r"'model.norm.weight' is missing"),
        ("fp32.pt", {"param": torch.zeros(3)}, r"'model.norm.weight' has shape \[3\], the configuration says"),
        ("fp32.pt", {"param": 3}, r"norm.weight/fp32.pt: holds int, not the numbers of a parameter"),
        ("fp32.pt", torch.zeros(3), r"fp32.pt: holds \[3\] numbers without a shape, and the model states give \["),
        ("step.pt", 9, r"its parameters are at different steps \(7 to 9\)"),
        ("step.pt", "soon", r"step.pt: holds soon, not a step"),
        ("step.pt", torch.tensor(torch.inf), r"step.pt: holds inf, not a step"),
    ],
)
def test_what_is_missing_or_contradicts_is_named(tmp_path: Path, name: str, damage: Any, message: str) -> None:
    save_universal(save_model(CASES[0], tmp_path / "hf"), tmp_path / "in", zero=2)
    path = tmp_path / "in/zero/model.norm.weight" / name
    path.unlink()
    if damage is not None:
        torch.save(damage, path)
    with pytest.raises((CheckpointError, ConversionError), match=message):
        FORMAT.open(tmp_path / "in")


def test_weights_alone_have_no_training_state(tmp_path: Path) -> None:
    save_universal(save_model(CASES[0], tmp_path / "hf"), tmp_path / "in", zero=2)
    for path in tmp_path.glob("in/zero/*/exp_avg*.pt"):
        path.unlink()
    assert FORMAT.open(tmp_path / "in").training is None
    config = json.loads((tmp_path / "in/config.json").read_text())
    assert FORMAT.open(tmp_path / "in").lineage[0]["config"] == config
