"""Mixtures of experts train like one process however experts, their widths, tokens and layers are spread."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from tests.helpers.models import grouped_model, sparse_model
from tests.helpers.parity import Observed, assert_observed, train_three_steps
from tests.helpers.ranks import run_ranks
from workbench.spec.execution import StageOptions
from workbench.spec.layout import ParallelLayout

MODELS = {"softmax": sparse_model(), "grouped": grouped_model()}
OPTIONS = {
    "plain": StageOptions(),
    "full": StageOptions(recompute="full"),
    "selective": StageOptions(recompute="selective", loss_chunk_tokens=5),
}


@cache
def reference(model: str, documents: bool = False) -> Observed:
    return train_three_steps(MODELS[model], ParallelLayout(), "gpipe", 1, documents)


@pytest.mark.parametrize(
    ("model", "layout", "schedule", "options"),
    [
        ("softmax", {"tp": 2}, "gpipe", "plain"),
        ("grouped", {"tp": 2, "sequence_parallel": True}, "gpipe", "full"),
        ("softmax", {"tp": 2, "sequence_parallel": True, "etp": 1}, "gpipe", "selective"),
        ("softmax", {"dp": 2, "ep": 2}, "gpipe", "plain"),
        ("grouped", {"cp": 2, "ep": 2}, "gpipe", "full"),
        ("grouped", {"pp": 2}, "zb_h1", "plain"),
        ("softmax", {"dp": 2, "ep": 2, "pp": 2}, "1f1b", "full"),
        ("grouped", {"dp": 4, "ep": 2, "shard": "zero3"}, "gpipe", "plain"),
        ("softmax", {"dp": 4, "ep": 2, "shard": "zero1"}, "gpipe", "selective"),
        ("softmax", {"dp": 4, "ep": 2}, "gpipe", "plain"),
        ("grouped", {"dp": 2, "cp": 2, "ep": 4, "shard": "zero2"}, "gpipe", "plain"),
        ("grouped", {"tp": 2, "cp": 2, "ep": 2}, "gpipe", "plain"),
        ("softmax", {"tp": 2, "dp": 2, "ep": 2, "sequence_parallel": True, "etp": 1}, "gpipe", "plain"),
        ("grouped", {"tp": 2, "pp": 2, "dp": 2, "ep": 2, "sequence_parallel": True}, "zb_h1", "selective"),
    ],
    ids=str,
)
def test_experts_spread_over_ranks_train_like_one_process(
    model: str, layout: dict[str, Any], schedule: str, options: str
) -> None:
    cut = ParallelLayout(**layout)
    seen = run_ranks(cut.world_size, train_three_steps, MODELS[model], cut, schedule, 1, False, OPTIONS[options])
    assert_observed(seen, reference(model))
