"""The best of a run's evaluations: when it stops the run, and what is kept for it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pretrain.engine import RunResult, Trainer
from pretrain.judging import EvalTable, Standing
from tests.helpers.ranks import run_ranks
from tests.pretrain.models import Noise, mesh_of, tiny_config, tiny_model, tiny_subject
from workbench.checkpoint.manifest import read_manifest
from workbench.checkpoint.store import Store
from workbench.errors import CheckpointError, ConfigError
from workbench.spec.layout import ParallelLayout

RISING = [3.0, 1.0, 2.0, 2.0, 2.0, 0.5]


@given(st.lists(st.floats(allow_infinity=False, allow_nan=False), min_size=1), st.booleans())
def test_the_best_is_the_first_extreme_and_what_came_after_it_is_stale(values: list[float], lower: bool) -> None:
    asked = EvalTable(metric="valid/x", better="lower" if lower else "higher")
    standing = Standing("valid/x")
    for step, value in enumerate(values, start=1):
        standing = standing.after(step, {"valid/x": value}, asked, must=True)
    best = min(values) if lower else max(values)
    assert standing == Standing("valid/x", best, values.index(best) + 1, len(values) - 1 - values.index(best))
    assert Standing.of("valid/x", standing.facts()) == standing


def test_a_value_that_is_no_number_is_never_the_best() -> None:
    standing = Standing("valid/loss").after(1, {"valid/loss": math.nan}, EvalTable(), must=True)
    assert standing.value is None and standing.stale == 1


@pytest.mark.parametrize(("metric", "lower"), [("valid/loss", True), ("valid/accuracy", False), ("valid/rmse", True)])
def test_which_values_are_better_is_known_of_the_metric(metric: str, lower: bool) -> None:
    assert EvalTable(metric=metric).prefers_lower is lower
    assert EvalTable(metric=metric, better="higher").prefers_lower is False


class Scripted(Trainer):
    """A trainer whose evaluations give the losses of RISING, by step."""

    def evaluate(self) -> dict[str, float]:
        self._metrics = {"valid/loss": RISING[self.state.step - 1]}
        config = self.config
        self._evaluated_step = self.state.step
        self._standing = self._standing.after(self.state.step, self._metrics, config.eval, must=config.needs_best)
        return dict(self._metrics)


def train(folder: str, layout: dict[str, Any] | None = None, **tables: Any) -> RunResult:
    tables = {"eval": {"every": 1}, "checkpoint": {"every": 1}, **tables}
    mesh = mesh_of(ParallelLayout(**(layout or {})))
    return Scripted(tiny_config(folder, **tables), tiny_subject(tiny_model()), Noise(held_out=2), mesh).run()


def test_a_run_without_progress_stops_and_says_so(tmp_path: Path) -> None:
    result = train(str(tmp_path), eval={"every": 1, "patience": 2})
    assert (result.ended_by, result.step, result.interrupted) == ("patience", 4, False)
    assert result.best == {"metric": "valid/loss", "value": 1.0, "step": 2, "stale": 2}
    assert train(str(tmp_path), eval={"every": 1, "patience": 2}).step == 4
    assert train(str(tmp_path), eval={"every": 1, "patience": 4}).best["step"] == 6


@pytest.mark.parametrize("layout", [{}, {"tp": 2, "pp": 2}], ids=str)
def test_patience_outlives_a_stop(layout: dict[str, Any], tmp_path: Path) -> None:
    world = ParallelLayout(**layout).world_size
    parts = [run_ranks(world, train_for, str(tmp_path / "parts"), layout, steps) for steps in (3, 6)]
    whole = run_ranks(world, train_for, str(tmp_path / "whole"), layout, 6)
    assert {result.step for result in (*parts[1], *whole)} == {5}
    ends = [read_manifest(Store(tmp_path / name / "checkpoints").path(5)) for name in ("parts", "whole")]
    one, other = ({name: stored.fingerprint for name, stored in end.tensors.items()} for end in ends)
    states = [dict(end.training.scheduler, seconds=0) for end in ends if end.training is not None]
    assert one == other and states[0] == states[1]


def train_for(folder: str, layout: dict[str, Any], steps: int) -> RunResult:
    return train(folder, layout, run={"steps": steps}, eval={"every": 1, "patience": 3})


def test_the_best_checkpoint_is_saved_when_it_is_found_and_outlives_newer_ones(tmp_path: Path) -> None:
    train(str(tmp_path), run={"steps": 5}, checkpoint={"every": 5, "keep": 1, "keep_best": True})
    store = Store(tmp_path / "checkpoints")
    assert store.steps() == (2, 5) and store.best() == store.path(2)
    train(str(tmp_path), run={"steps": 6}, checkpoint={"keep": 1, "keep_best": True})
    assert store.steps() == (6,) and store.best() == store.path(6)


def test_a_best_checkpoint_that_was_not_kept_is_told_with_its_value(tmp_path: Path) -> None:
    store = Store(tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match="no checkpoint says which was the best"):
        store.best()
    train(str(tmp_path), run={"steps": 5}, checkpoint={"every": 1, "keep": 1})
    with pytest.raises(CheckpointError, match=r"step-00000002: was the best by valid/loss = 1, but was not kept"):
        store.best()


def test_what_cannot_be_judged_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"eval.patience=3 needs evaluations.*eval.every=0"):
        tiny_config(str(tmp_path), eval={"patience": 3})
    config = tiny_config(str(tmp_path), eval={"every": 1, "patience": 3})
    with pytest.raises(ConfigError, match="eval.metric='valid/loss' decides when to stop.*but nothing is evaluated"):
        Trainer(config, tiny_subject(tiny_model()), Noise(), mesh_of(ParallelLayout()))
    config = tiny_config(str(tmp_path), eval={"every": 1, "patience": 3, "metric": "valid/accuracy"})
    trainer = Trainer(config, tiny_subject(tiny_model()), Noise(held_out=2), mesh_of(ParallelLayout()))
    with pytest.raises(ConfigError, match="'valid/accuracy' is not measured; use one of valid/loss, valid/labels"):
        trainer.run()
