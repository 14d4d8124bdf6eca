"""What the parity matrix (tests/parity) leaves out of pipelines: chunks of a single stage, layers computed again in the
halves of a split backward, and stages of uneven depth; against one process, in float64."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from pretrain import pipeline
from pretrain.schedules import schedule_named
from tests.helpers.models import biased_model, gated_model
from tests.helpers.parity import Observed, assert_observed, train_three_steps
from tests.helpers.ranks import run_ranks
from workbench.models.build import StageOptions
from workbench.spec.layout import ParallelLayout
from workbench.spec.model import ModelConfig

pytestmark = pytest.mark.parity


def model_of(tied: bool, layers: int) -> ModelConfig:
    """Tied: gated with rotary positions; untied: biased with learned ones."""
    make = gated_model if tied else biased_model
    return make(tie_word_embeddings=tied, num_hidden_layers=layers)


@cache
def reference(tied: bool, layers: int) -> Observed:
    return train_three_steps(model_of(tied, layers), ParallelLayout(), "gpipe", 4)


def assert_same(
    schedule: str, *, tied: bool, layers: int = 4, options: StageOptions | None = None, **degrees: Any
) -> None:
    layout = ParallelLayout.model_validate({**degrees, "placement": schedule_named(schedule).placement})
    model = model_of(tied, layers)
    observed = run_ranks(layout.world_size, train_three_steps, model, layout, schedule, 1, False, options)
    assert_observed(observed, reference(tied, layers))


@pytest.mark.parametrize(("schedule", "vpp"), [("interleaved", 4), ("interleaved_zb", 2), ("zbv", 2), ("zb_h1", 1)])
def test_chunks_of_a_single_stage_equal_one_process(schedule: str, vpp: int) -> None:
    assert_same(schedule, tied=True, pp=1, vpp=vpp)
    assert_same(schedule, tied=True, pp=1, vpp=vpp, dp=2)


@pytest.mark.parametrize(("schedule", "vpp"), [("interleaved", 2), ("zb_h1", 1), ("zbv", 2)])
@pytest.mark.parametrize("shared", [{}, {"dp": 2, "shard": "zero3"}], ids=str)
def test_layers_that_are_computed_again_equal_one_process(schedule: str, vpp: int, shared: dict[str, Any]) -> None:
    options = StageOptions(recompute="full", loss_chunk_tokens=5)
    assert_same(schedule, tied=True, pp=2, vpp=vpp, options=options, **shared)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "interleaved_zb", "zb_h1", "zbv", "dualpipev"])
def test_receives_that_are_posted_when_they_are_needed_equal_one_process(schedule: str) -> None:
    """As on GPUs."""
    rule = schedule_named(schedule)
    vpp = 1 if not rule.faults(1) else 2
    layout = ParallelLayout(pp=4, vpp=vpp, placement=rule.placement)
    observed = run_ranks(4, train_posting_late, model_of(True, 8), layout, schedule)
    assert_observed(observed, reference(True, 8))


def train_posting_late(model: ModelConfig, layout: ParallelLayout, schedule: str) -> Observed:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "posts_ahead", lambda device: False)
        return train_three_steps(model, layout, schedule, 1)


def test_chunks_of_uneven_depth_equal_one_process() -> None:
    assert_same("zbv", tied=True, layers=8, pp=2, vpp=2, pp_layout=(1, 3, 2, 2))
