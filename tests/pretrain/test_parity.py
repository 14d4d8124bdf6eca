"""Every layout trains the same model: loss, gradients, norms and weights against one process, in float64.

1e-10 relative: float64 keeps about 1e-16 a sum, three AdamW steps divide by small moments; a wrong collective is off by
far more.
"""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any

import pytest

from tests.helpers.models import biased_model, gated_model
from tests.helpers.parity import ADAMW, Observed, assert_observed, train_three_steps
from tests.helpers.ranks import run_ranks
from workbench.spec.execution import StageOptions
from workbench.spec.layout import ParallelLayout
from workbench.spec.model import ModelConfig

MODELS = {
    f"{kind}-{'tied' if tied else 'untied'}": make(tie_word_embeddings=tied)
    for (kind, make), tied in product({"gated": gated_model, "biased": biased_model}.items(), (True, False))
}
DEGREES = [(tp, pp, dp) for tp, pp, dp in product((1, 2, 4), (1, 2, 4), (1, 2)) if 1 < tp * pp * dp <= 8]
SHARDS = ("none", "zero1", "zero2", "zero3")
OFTEN = ("gated-tied", "biased-untied")
"""Models that `make test` trains at every layout; `make parity` trains the others as well."""


@cache
def _reference(name: str) -> Observed:
    return train_three_steps(MODELS[name], ParallelLayout(), "gpipe", 4)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in OFTEN else pytest.mark.exhaustive) for name in MODELS]
)
@pytest.mark.parametrize(("tp", "pp", "dp"), DEGREES)
def test_three_steps_at_any_layout_equal_one_process(name: str, tp: int, pp: int, dp: int) -> None:
    turn = DEGREES.index((tp, pp, dp)) + list(MODELS).index(name)
    layout = ParallelLayout(tp=tp, pp=pp, dp=dp, shard=SHARDS[turn % 4] if dp > 1 else "none")
    _assert_equal(
        name, MODELS[name], layout, ("gpipe", "1f1b")[turn % 2], micro_size=1 if dp == 2 else (1, 2)[turn % 2]
    )


@pytest.mark.parametrize("shard", ["zero1", "zero2", "zero3"])
@pytest.mark.parametrize("shard_size", [1, 2])
def test_copies_that_ranks_share_equal_one_process_over_several_microbatches(shard: str, shard_size: int) -> None:
    layout = ParallelLayout.model_validate({"dp": 4, "shard": shard, "shard_size": shard_size})
    arguments = (MODELS["biased-tied"], layout, "1f1b", 1, False, None, 8)
    observed = run_ranks(4, train_three_steps, *arguments)
    assert_observed(observed, train_three_steps(arguments[0], ParallelLayout(), "gpipe", 4, False, None, 8))


@pytest.mark.parametrize(
    ("name", "degrees"),
    [
        ("gated-tied", {"tp": 4}),  # KV heads with copies
        ("biased-untied", {"dp": 4, "shard": "zero1", "shard_size": 2}),
        ("gated-tied", {"pp": 2, "dp": 2, "shard": "zero3"}),
    ],
    ids=str,
)
def test_muon_orthogonalises_whole_matrices_at_every_layout(name: str, degrees: dict[str, int]) -> None:
    layout, optim = ParallelLayout(**degrees), ADAMW.model_copy(update={"name": "muon"})
    observed = run_ranks(layout.world_size, train_three_steps, MODELS[name], layout, "1f1b", 1, False, None, 4, optim)
    assert_observed(observed, train_three_steps(MODELS[name], ParallelLayout(), "gpipe", 4, False, None, 4, optim))


def test_uneven_stages_equal_one_process() -> None:
    layout = ParallelLayout(pp=2, tp=2, pp_layout=(3, 1))
    _assert_equal("gated-tied", MODELS["gated-tied"], layout, "1f1b", micro_size=2)


@pytest.mark.parametrize("make", [gated_model, biased_model])
@pytest.mark.parametrize("degrees", [{"tp": 4}, {"pp": 2, "dp": 2}])
def test_dropout_is_the_same_at_every_layout(make: type, degrees: dict[str, int]) -> None:
    model: ModelConfig = make(embed_dropout=0.1, attention_dropout=0.2, hidden_dropout=0.3)
    layout = ParallelLayout(**degrees)
    reference = train_three_steps(model, ParallelLayout(), "gpipe", 4)
    assert_observed(run_ranks(layout.world_size, train_three_steps, model, layout, "1f1b", 1), reference)


@pytest.mark.parametrize(
    ("degrees", "options"),
    [
        ({"cp": 2}, StageOptions(recompute="full", offload=True)),
        ({"pp": 2}, StageOptions(recompute="full", offload=True, loss_chunk_tokens=16)),
        ({"tp": 2, "dp": 2, "shard": "zero3"}, StageOptions(recompute="selective", offload=True)),
    ],
)
@pytest.mark.parametrize("name", ["gated-tied", "biased-untied"])
def test_saving_memory_changes_nothing_at_any_layout(name: str, degrees: dict[str, Any], options: StageOptions) -> None:
    layout = ParallelLayout.model_validate(degrees)
    observed = run_ranks(layout.world_size, train_three_steps, MODELS[name], layout, "1f1b", 1, False, options)
    assert_observed(observed, _reference(name))


def _assert_equal(name: str, model: ModelConfig, layout: ParallelLayout, schedule: str, micro_size: int) -> None:
    observed = run_ranks(layout.world_size, train_three_steps, model, layout, schedule, micro_size)
    assert_observed(observed, _reference(name))
