"""Experts in files: each by itself, as save_pretrained writes them, or stacked, as transformers has them in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from converters.family import family_named
from converters.formats.huggingface import FORMAT
from tests.helpers.hf_models import make_model, save_model
from workbench.errors import ConversionError
from workbench.spec.geometry import Box
from workbench.spec.model import ModelConfig

CASES = ("mixtral, untied, grouped", "qwen2_moe, untied, some layers dense", "qwen3_moe, untied, wide heads")


@pytest.mark.parametrize("case", CASES)
def test_stacked_experts_are_read_as_those_that_lie_apart(tmp_path: Path, case: str) -> None:
    apart = FORMAT.open(save_model(case, tmp_path / "apart"))
    stacked = save_model(case, tmp_path / "stacked")
    tensors = {name: value.contiguous() for name, value in make_model(case).state_dict().items()}
    assert any(name.endswith("experts.gate_up_proj") for name in tensors)
    save_file(tensors, stacked / "model.safetensors", {"format": "pt"})
    found = FORMAT.open(stacked)
    assert found.source.schema == apart.source.schema
    for name, tensor in apart.source.schema.items():
        box = Box.whole(tensor.shape)
        assert (found.source.read(name, box) == apart.source.read(name, box)).all(), name


def test_a_missing_expert_is_refused_by_name(tmp_path: Path) -> None:
    folder = save_model(CASES[2], tmp_path / "in")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.experts.5.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConversionError, match=r"model\.layers\.\*\.mlp\.experts\.\*\.up_proj\.weight' is missing"):
        FORMAT.open(folder)


@pytest.mark.parametrize(
    ("family", "moe", "words"),
    [
        ("qwen3_moe", None, "moe=None: this family has experts"),
        ("qwen3_moe", {"scoring": "sigmoid"}, "moe.scoring='sigmoid' has no place, only 'softmax'"),
        ("qwen2_moe", {"routed_scaling_factor": 2.0}, "moe.routed_scaling_factor=2.0 has no place, only 1.0"),
        ("mixtral", {"norm_topk_prob": False}, "moe.norm_topk_prob=False has no place, only True"),
        ("mixtral", {"moe_intermediate_size": 8}, "moe.moe_intermediate_size=8 is not intermediate_size=14336"),
    ],
)
def test_experts_that_a_family_cannot_say_are_refused(family: str, moe: dict[str, object] | None, words: str) -> None:
    plain = family_named(family).load_config({"hidden_size": 2048, "num_attention_heads": 16}).model_dump()
    model = ModelConfig.model_validate(plain | {"moe": None if moe is None else plain["moe"] | moe})
    with pytest.raises(ConversionError, match=words.replace("(", r"\(")):
        family_named(family).dump_config(model, "float32")


def test_what_only_training_reads_of_experts_is_left_out_and_named() -> None:
    family = family_named("qwen3_moe")
    plain = family.load_config({"hidden_size": 2048, "num_attention_heads": 16})
    assert family.left_out(plain) == {}
    moe = {"router_z_loss_coef": 0.5, "router_aux_loss_coef": 0.25}
    model = ModelConfig.model_validate(
        {**plain.model_dump(), "moe": plain.moe.model_dump() | moe, "embed_dropout": 0.1}
    )
    written = family.dump_config(model, "float32")
    assert "router_z_loss_coef" not in written and written["router_aux_loss_coef"] == 0.25
    assert family.left_out(model) == {"moe.router_z_loss_coef": 0.5, "embed_dropout": 0.1}


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_the_loss_that_balances_experts_applies_where_transformers_applies_it(name: str) -> None:
    family = family_named(name)
    given = {"hidden_size": 2048, "num_attention_heads": 16, "router_aux_loss_coef": 0.02}
    for switch, expected in ((None, 0.0), (False, 0.0), (True, 0.02)):
        words = given if switch is None else given | {"output_router_logits": switch}
        model = family.load_config(words)
        assert model.moe is not None and model.moe.router_aux_loss_coef == expected
        written = family.dump_config(model, "float32")
        assert written["output_router_logits"] is bool(switch)
        assert family.load_config(written) == model
        assert family.dump_config(model, "float32", words)["router_aux_loss_coef"] == 0.02


def test_a_bfloat16_folder_keeps_its_bits(tmp_path: Path) -> None:
    folder = save_model(CASES[0], tmp_path / "in", dtype=torch.bfloat16)
    opened = FORMAT.open(folder)
    name = "layers.1.mlp.experts.3.up_proj.weight"
    theirs = load_file(folder / "model.safetensors")["model.layers.1.block_sparse_moe.experts.3.w3.weight"]
    ours = opened.source.read(name, Box.whole(opened.source.schema[name].shape))
    assert (torch.from_numpy(ours.view("int16").copy()).view(torch.bfloat16) == theirs).all()
