"""Every logical tensor has one place in Megatron's tensors, these are filled by them, and ranks share them out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from converters.megatron.table import LOCAL, RENAMED, TE, Spelling, Table, make_table, spelling_of
from converters.rules import origins, pull
from workbench.errors import ConversionError
from workbench.spec.geometry import Box, coverage_fault
from workbench.spec.model import ModelConfig
from workbench.spec.schema import logical_tensors

SIZES = {
    "vocab_size": 90,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 4,
}
BIASES = {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "mlp_only_layers": (1,),
    "shared_expert_intermediate_size": 8,
    "shared_expert_gate": True,
    "scoring": "sigmoid",
    "e_score_correction_bias": True,
}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 6, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
MODELS: dict[str, dict[str, Any]] = {
    "grouped queries": {**SIZES, "qk_norm": "head"},
    "biases": {**SIZES, **BIASES, "norm": "layernorm", "position_embedding": "learned", "tie_word_embeddings": True},
    "no gate": {**SIZES, **BIASES, "gated_mlp": False, "hidden_act": "gelu"},
    "experts": {**SIZES, "moe": EXPERTS},
    "latents": {**SIZES, "num_key_value_heads": 8, "head_dim": 8, "latent": LATENT, "moe": EXPERTS},
    "queries without a latent": {
        **SIZES,
        "num_key_value_heads": 8,
        "head_dim": 8,
        "latent": {**LATENT, "q_lora_rank": None},
    },
}
SPELLINGS = [replace(s, experts=e) for s in (TE, LOCAL, RENAMED) for e in ("sequential", "grouped", "flat")]
every_model = pytest.mark.parametrize("name", MODELS)


def table(name: str, spelling: Spelling = TE) -> tuple[ModelConfig, Table]:
    model = ModelConfig.model_validate(MODELS[name])
    return model, make_table(model, spelling, padded_vocab=96)


@every_model
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_logical_tensors_fill_each_of_megatrons_once_but_for_padding(name: str, spelling: Spelling) -> None:
    model, found = table(name, spelling)
    filled: dict[str, list[Box]] = {key: [] for key in found.tensors}
    for key, tensor in logical_tensors(model, "F32").items():
        rule = found.rules[key]
        assert rule.foreign_shape(tensor.shape) == found.tensors[rule.foreign].shape
        filled[rule.foreign] += origins(rule.view, Box.whole(tensor.shape))
    for key, boxes in filled.items():
        shape = found.tensors[key].shape
        fault = coverage_fault((90, *shape[1:]) if shape[0] == 96 else shape, boxes)
        assert fault is None, (key, fault)


@every_model
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_ranks_of_any_degree_share_out_each_tensor(name: str, spelling: Spelling) -> None:
    _, found = table(name, spelling)
    for tensor in found.tensors.values():
        tp, ep = (1, 1) if tensor.dim is None else (2, 1), 2 if tensor.num_experts else 1
        for degree in {1, *tp[:1]}:
            pairs = [p for r in range(degree) for e in range(ep) for p in tensor.share(degree, r, ep, e)]
            assert coverage_fault(tensor.shape, [box for box, _ in pairs]) is None, tensor
            assert all(whole.size == local.size for whole, local in pairs)


@every_model
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_spelling_is_known_by_its_names(name: str, spelling: Spelling) -> None:
    model, found = table(name, spelling)
    again = make_table(model, spelling_of(found.tensors, model), padded_vocab=96)
    assert again.tensors.keys() == found.tensors.keys()


def test_rows_of_a_group_are_its_queries_its_key_and_its_value() -> None:
    model, found = table("grouped queries")
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((heads * 4, 16)) for heads in (8, 2, 2))
    fused = np.concatenate([x.reshape(2, -1, 16) for x in (q, k, v)], 1).reshape(-1, 16)
    for letter, expected in zip("qkv", (q, k, v), strict=True):
        rule = found.rules[f"layers.1.self_attn.{letter}_proj.weight"]
        read = pull(rule.view, Box.whole(expected.shape), lambda box: fused[box.slices])
        assert np.array_equal(read, expected)
    assert model.num_key_value_heads == 2


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_has_its_share_of_the_gate_and_below_it_that_of_what_is_gated(rank: int) -> None:
    _, found = table("grouped queries")
    pairs = found.tensors["decoder.layers.0.mlp.linear_fc1.weight"].share(2, rank)
    gate, up = Box((rank * 12, 0), (12, 16)), Box((24 + rank * 12, 0), (12, 16))
    assert pairs == [(gate, Box((0, 0), (12, 16))), (up, Box((12, 0), (12, 16)))]


def test_flat_experts_are_transposed_one_by_one() -> None:
    _, found = table("experts", replace(TE, experts="flat"))
    rng = np.random.default_rng(0)
    buffer = rng.standard_normal((4, 16, 16))  # experts, hidden, gate and up
    rule = found.rules["layers.0.mlp.experts.3.up_proj.weight"]
    read = pull(rule.view, Box.whole((8, 16)), lambda box: buffer[box.slices])
    assert np.array_equal(read, buffer[3, :, 8:].T)


def test_rotary_rows_of_latents_are_in_pairs() -> None:
    _, found = table("latents")
    rows = np.arange(64, dtype=np.float64)[:, None].repeat(6, 1)
    rule = found.rules["layers.0.self_attn.q_b_proj.weight"]
    read = pull(rule.view, Box.whole((64, 6)), lambda box: rows[box.slices])
    assert read[:8, 0].tolist() == [0, 1, 2, 3, 4, 6, 5, 7]


def test_what_has_no_place_is_named() -> None:
    model = ModelConfig.model_validate({**SIZES, "norm_placement": "sandwich"})
    with pytest.raises(ConversionError, match=r"layers\.\*\.pre_feedforward_layernorm\.weight"):
        make_table(model)


def test_a_width_that_cannot_be_cut_is_named_with_the_degree() -> None:
    _, found = table("grouped queries")
    with pytest.raises(ConversionError, match=r"linear_fc1.weight' of shape \[48, 16\] cannot be cut over tp=5"):
        found.tensors["decoder.layers.0.mlp.linear_fc1.weight"].share(5, 0)
