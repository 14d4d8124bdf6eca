"""A fault planted in a family's rules, or in a feature, that no name and no shape gives away is seen in the logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from converters.family import family_named
from converters.formats.huggingface import FORMAT
from converters.logits import engine_logits, judge, probe_sequences
from converters.rules import TRANSPOSE, Merge, Operation, Permute, Rule, Split
from tests.helpers.hf_models import make_model, save_model
from workbench.errors import VerificationError
from workbench.models import attend, blockwise
from workbench.spec.model import ModelConfig

LAYER = "layers.{i}."
GEMMA, QWEN = "gemma3, tied, grouped, linear rope", "qwen3, tied, grouped, biased, sliding, llama3 rope"
OLMO = "olmo2, untied, a KV head per head"
INTERLEAVED: tuple[Operation, ...] = (Split(0, (4, 4, 2)), Permute((0, 2, 1, 3)), Merge(0, (4, 2, 4)))
SWAPS = [
    (GEMMA, "input_layernorm.weight", "post_attention_layernorm.weight"),
    (GEMMA, "pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight"),
    (GEMMA, "post_attention_layernorm.weight", "pre_feedforward_layernorm.weight"),
    (GEMMA, "self_attn.q_norm.weight", "self_attn.k_norm.weight"),
    (QWEN, "self_attn.q_norm.weight", "self_attn.k_norm.weight"),
    (QWEN, "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    (OLMO, "post_attention_layernorm.weight", "post_feedforward_layernorm.weight"),
    (OLMO, "self_attn.q_norm.weight", "self_attn.k_norm.weight"),
]
VIEWS = [
    (OLMO, "self_attn.q_proj.weight", (TRANSPOSE,)),
    (OLMO, "self_attn.o_proj.weight", (TRANSPOSE,)),
    (QWEN, "self_attn.o_proj.weight", (TRANSPOSE,)),
    (QWEN, "self_attn.q_proj.weight", INTERLEAVED),
    (OLMO, "self_attn.k_proj.weight", INTERLEAVED),
]


@pytest.mark.parametrize(("case", "one", "other"), SWAPS)
def test_two_tensors_of_equal_shape_swapped_by_the_rules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, one: str, other: str
) -> None:
    names = {LAYER + one: LAYER + other, LAYER + other: LAYER + one}
    _plant(monkeypatch, case, {wrong: (names[wrong], ()) for wrong in names})
    _assert_seen(case, tmp_path)


@pytest.mark.parametrize(("case", "name", "view"), VIEWS)
def test_a_projection_transposed_or_with_its_rotary_pairs_in_another_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, name: str, view: tuple[Operation, ...]
) -> None:
    _plant(monkeypatch, case, {LAYER + name: (LAYER + name, view)})
    _assert_seen(case, tmp_path)


@pytest.mark.parametrize("shift", [-1, 1])
@pytest.mark.parametrize("case", ["mistral, tied, grouped, sliding", "qwen2, tied, grouped, half sliding", GEMMA])
def test_a_window_that_begins_one_token_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, shift: int
) -> None:
    def visible(*args: Any) -> torch.Tensor:
        scoring = args[-1]
        return right(*args[:-1], replace(scoring, window=scoring.window and scoring.window + shift))

    right = attend.visible
    for module in (attend, blockwise):
        monkeypatch.setattr(module, "visible", visible)
    _assert_seen(case, tmp_path)


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("gpt_neox, parallel, a quarter turns", {"partial_rotary_factor": 0.5}),
        ("gpt_neox, parallel, a quarter turns", {"parallel_residual": False}),
        ("llama, rope by length", {"rope_scaling": None}),
        ("llama, yarn rope", {"rope_scaling": None}),
        ("phi3, grouped, tied, longrope", {"rope_scaling": None}),
        (GEMMA, {"rope_local_theta": 1000.0}),
        (GEMMA, {"rope_scaling": None}),
        (GEMMA, {"query_pre_attn_scalar": None}),
        (GEMMA, {"scale_embeddings": False}),
        (GEMMA, {"norm_unit_offset": False}),
        ("gemma2, tied, grouped, capped", {"attn_logit_softcapping": None}),
        ("gemma2, tied, grouped, capped", {"final_logit_softcapping": None}),
        ("gemma2, tied, grouped, capped", {"layer_types": None}),
    ],
    ids=str,
)
def test_a_feature_lost_on_the_way(tmp_path: Path, case: str, change: dict[str, Any]) -> None:
    _assert_seen(case, tmp_path, change)


@pytest.mark.parametrize("case", [GEMMA, QWEN, OLMO])
def test_without_a_fault_the_same_check_passes(tmp_path: Path, case: str) -> None:
    _judge(case, tmp_path, {})


def _plant(monkeypatch: pytest.MonkeyPatch, case: str, faults: Mapping[str, tuple[str, tuple[Operation, ...]]]) -> None:
    """Has the family read each logical tensor from another foreign one, or through another view."""
    name = {"gemma3": "gemma3_text"}.get(family := case.split(",")[0], family)
    right = family_named(name)

    def rules(model: ModelConfig) -> tuple[Rule, ...]:
        return tuple(
            Rule(rule.logical, f"model.{faults[rule.logical][0]}", faults[rule.logical][1])
            if rule.logical in faults
            else rule
            for rule in right.rules(model)
        )

    monkeypatch.setattr(f"converters.families.{name}.FAMILY", replace(right, rules=rules))


def _assert_seen(case: str, folder: Path, change: Mapping[str, Any] | None = None) -> None:
    with pytest.raises(VerificationError, match="logits differ from the source's by"):
        _judge(case, folder, change or {})


def _judge(case: str, folder: Path, change: Mapping[str, Any]) -> None:
    opened = FORMAT.open(save_model(case, folder))
    sequences = probe_sequences(opened.model)
    with torch.inference_mode():
        model = make_model(case)
        theirs: list[np.ndarray] = [model(torch.tensor([row])).logits[0].numpy() for row in sequences]
    ours = engine_logits(opened.model.model_copy(update=dict(change)), opened.source, sequences)
    judge(ours, theirs, sequences, folder)
