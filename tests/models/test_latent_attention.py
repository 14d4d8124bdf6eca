"""Latent attention: one process and many give the same numbers, in float64."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from tests.helpers.models import latent_model
from tests.helpers.parity import Observed, assert_observed, train_three_steps
from tests.helpers.ranks import run_ranks
from workbench.spec.execution import StageOptions
from workbench.spec.layout import ParallelLayout

MODELS = {
    "latents": latent_model(),
    "no query latent": latent_model(q_lora_rank=None, attention_bias=False, attention_output_bias=False),
    "dropout": latent_model(attention_dropout=0.2, hidden_dropout=0.1),
}
SP: dict[str, Any] = {"sequence_parallel": True}
RING: dict[str, Any] = {"context": "ring"}
VEE: dict[str, Any] = {"pp": 2, "vpp": 2, "placement": "vee"}
CASES: list[tuple[str, dict[str, Any], bool, str]] = [
    ("latents", {"tp": 2}, False, "none"),
    ("no query latent", {"tp": 2}, False, "none"),
    ("latents", {"tp": 2, **SP}, True, "full"),
    ("no query latent", {"tp": 2, **SP}, False, "selective"),
    ("latents", {"tp": 4}, False, "none"),
    ("latents", VEE, False, "none"),
    ("no query latent", {"tp": 2, **VEE, **SP}, True, "selective"),
    ("latents", {"cp": 2}, True, "selective"),
    ("latents", {"cp": 2, **RING}, True, "none"),
    ("no query latent", {"tp": 2, "cp": 2, **SP, **RING}, False, "full"),
    ("dropout", {"tp": 2, "cp": 2, **SP}, False, "none"),
    ("latents", {"dp": 2, "shard": "zero3"}, False, "none"),
    ("latents", {"tp": 2, "dp": 2, "shard": "zero3", **SP}, False, "none"),
]


@cache
def _reference(name: str, documents: bool) -> Observed:
    return train_three_steps(MODELS[name], ParallelLayout(), "gpipe", 4, documents)


@pytest.mark.parity
@pytest.mark.parametrize(("name", "degrees", "documents", "recompute"), CASES, ids=str)
def test_three_steps_with_latents_equal_one_process(
    name: str, degrees: dict[str, Any], documents: bool, recompute: Any
) -> None:
    layout = ParallelLayout(**degrees)
    schedule = "zbv" if layout.placement == "vee" else "1f1b"
    options = StageOptions(recompute=recompute)
    seen = run_ranks(layout.world_size, train_three_steps, MODELS[name], layout, schedule, 1, documents, options)
    assert_observed(seen, _reference(name, documents))
