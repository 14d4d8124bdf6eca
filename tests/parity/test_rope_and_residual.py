"""Partly turned heads, scaled positions and parallel residuals at any layout equal one process, in float64."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from tests.helpers.models import biased_model, gated_model
from tests.helpers.parity import Observed, assert_observed, exhaustive, train_three_steps
from tests.helpers.ranks import run_ranks
from workbench.spec.execution import StageOptions
from workbench.spec.layout import ParallelLayout

# Rows have 12 tokens: beyond the 8 from which on these depend on the length of a sequence.
BY_LENGTH = {"rope_scaling": {"kind": "by_length", "factor": 2.0}, "max_position_embeddings": 8}
PER_DIMENSION = {
    "kind": "per_dimension",
    "factor": 2.0,
    "original_max_position_embeddings": 8,
    "short_factor": (1.0, 1.5),
    "long_factor": (2.0, 5.0),
}
MODELS = {
    "parallel": biased_model(position_embedding="rope", partial_rotary_factor=0.5, parallel_residual=True),
    "one norm, dropout": gated_model(
        parallel_residual=True, shared_norm=True, tie_word_embeddings=True, hidden_dropout=0.2, norm="layernorm"
    ),
    "by length": gated_model(**BY_LENGTH),
    "per dimension": gated_model(partial_rotary_factor=0.5, rope_scaling=PER_DIMENSION),
}
SP: dict[str, Any] = {"sequence_parallel": True}
CASES: list[Any] = [
    ("one norm, dropout", {"tp": 2, "cp": 2, **SP, "context": "ring"}, "1f1b", True),
    ("one norm, dropout", {"pp": 2, "vpp": 2, "placement": "vee"}, "zbv", False),
    ("by length", {"tp": 2, "pp": 2, **SP}, "1f1b", False),
    ("by length", {"cp": 2, "context": "ring"}, "1f1b", True),
    ("per dimension", {"tp": 2, "cp": 2}, "1f1b", True),
    *exhaustive(
        ("parallel", {"tp": 2, **SP}, "1f1b", True),
        ("parallel", {"tp": 2, "pp": 2}, "zb_h1", False),
        ("parallel", {"cp": 2, "dp": 2, "shard": "zero3"}, "1f1b", False),
        ("per dimension", {"dp": 2, "pp": 2}, "1f1b", True),
    ),
]


@cache
def _reference(name: str, documents: bool) -> Observed:
    return train_three_steps(MODELS[name], ParallelLayout(), "gpipe", 4, documents)


@pytest.mark.parametrize(("name", "degrees", "schedule", "documents"), CASES, ids=str)
def test_three_steps_equal_one_process(name: str, degrees: dict[str, Any], schedule: str, documents: bool) -> None:
    layout = ParallelLayout(**degrees)
    seen = run_ranks(layout.world_size, train_three_steps, MODELS[name], layout, schedule, 1, documents)
    assert_observed(seen, _reference(name, documents))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_layers_computed_again_and_a_loss_in_chunks_change_nothing(name: str, mode: Any) -> None:
    options = StageOptions(recompute=mode, loss_chunk_tokens=5)
    seen = train_three_steps(MODELS[name], ParallelLayout(), "gpipe", 4, True, options)
    assert_observed([seen], _reference(name, True))
