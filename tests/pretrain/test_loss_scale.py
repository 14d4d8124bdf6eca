"""fp16: the scale of the loss, the steps that are skipped, and what they leave untouched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config import PrecisionTable
from pretrain.engine import Trainer
from pretrain.loss_scale import LossScale
from tests.helpers.ranks import run_ranks
from tests.pretrain.models import Noise, mesh_of, tiny_config, tiny_model, tiny_subject
from tests.pretrain.test_trainer import Recorder, fingerprints
from workbench.checkpoint.manifest import read_manifest
from workbench.checkpoint.store import Store
from workbench.errors import WorkbenchError
from workbench.spec.layout import ParallelLayout

FP16 = {"compute": "fp16", "growth_interval": 2}


@given(st.lists(st.booleans(), max_size=40), st.integers(1, 5))
@settings(max_examples=50)
def test_the_scale_moves_as_torchs_grad_scaler_does(finite: list[bool], interval: int) -> None:
    ours = LossScale(PrecisionTable(compute="fp16", growth_interval=interval))
    theirs = torch.amp.GradScaler("cpu", growth_interval=interval)
    weight = torch.nn.Parameter(torch.zeros(1))
    rule = torch.optim.SGD([weight], lr=0.0)
    for good in finite:
        weight.grad = torch.full((1,), 1.0 if good else float("inf"))
        theirs.scale(torch.zeros(()))
        theirs.step(rule)
        theirs.update()
        if ours.value == 1 and not good:
            return
        assert ours.accepts(weight.grad.norm()) is good
        assert ours.value == theirs.get_scale()


def test_a_scale_below_one_is_refused_with_its_value_and_a_remedy() -> None:
    scale = LossScale(PrecisionTable(compute="fp16"))
    with pytest.raises(WorkbenchError, match=r"loss scale of 1, after 17 skipped steps.*optim\.lr.*'bf16'"):
        for _ in range(100):
            scale.accepts(torch.tensor(float("nan")))


def test_an_overflow_at_a_fixed_scale_is_refused_with_its_value() -> None:
    scale = LossScale(PrecisionTable(compute="fp16", loss_scale=512.0))
    assert all(scale.accepts(torch.tensor(1.0)) for _ in range(3))
    with pytest.raises(WorkbenchError, match=r"overflowed at precision.loss_scale=512.*'dynamic'"):
        scale.accepts(torch.tensor(float("inf")))


def train(
    folder: str, layout: dict[str, Any], scale: float | None, precision: dict[str, Any], **tables: Any
) -> dict[str, Any]:
    """A run that begins at the loss scale `scale`; its rows, its result, and whether skipped steps changed anything."""
    recorder = Recorder()
    config = tiny_config(folder, precision=precision, **tables)
    trainer = Trainer(config, tiny_subject(tiny_model()), Noise(), mesh_of(ParallelLayout(**layout)), watcher=recorder)
    if scale is not None and trainer.state.step == 0:
        assert trainer.loss_scale is not None
        trainer.loss_scale.value = scale
    untouched = []
    update = trainer.optimizer.update

    def watched(lr: float, loss_scale: Any) -> torch.Tensor:
        before = _held(trainer)
        norm = update(lr, loss_scale)
        untouched.append(all(torch.equal(a, b) for a, b in zip(before, _held(trainer), strict=True)))
        return norm

    trainer.optimizer.update = watched  # type: ignore[method-assign]
    result = trainer.run()
    return {"rows": recorder.rows, "result": result, "untouched": untouched, "updates": trainer.optimizer.step_count}


def _held(trainer: Trainer) -> list[torch.Tensor]:
    moments = [value for values in trainer.optimizer.moments().values() for value in values.values()]
    return [tensor.clone() for tensor in (*(p.data for p in trainer.built.parameters), *moments)]


LAYOUTS: list[dict[str, Any]] = [{}, {"tp": 2, "pp": 2}, {"dp": 2, "shard": "zero2"}, {"dp": 2}]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_step_that_overflows_is_skipped_on_all_ranks_and_changes_nothing(
    layout: dict[str, Any], tmp_path: Path
) -> None:
    arguments = (str(tmp_path), layout, 2.0**40, {"compute": "fp16"})
    world = ParallelLayout(**layout).world_size
    ranks = run_ranks(world, train_long, *arguments) if world > 1 else [train_long(*arguments)]
    rows = [row for row in ranks[0]["rows"] if "loss_scale" in row]
    skipped = [row["skipped_steps"] for row in rows][-1]
    assert 5 < skipped < 35
    for rank in ranks:
        assert rank["untouched"] == ranks[0]["untouched"]
        assert (rank["result"].skipped_steps, rank["updates"]) == (skipped, 40 - skipped)
    assert [("loss" in row, "grad_norm" in row) for row in rows] == [(not same,) * 2 for same in ranks[0]["untouched"]]
    assert sum(ranks[0]["untouched"]) == skipped
    assert rows[-1]["loss_scale"] == 2.0 ** (40 - skipped)
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0]


def train_long(*arguments: Any) -> dict[str, Any]:
    return train(*arguments, run={"steps": 40})


def test_fp16_trains_as_fp32_does(tmp_path: Path) -> None:
    half = train(str(tmp_path / "half"), {}, None, FP16)
    whole = train(str(tmp_path / "whole"), {}, None, {"compute": "fp32"})
    # fp16 keeps 11 bits. AdamW divides small gradients by as small moments, so later norms say less.
    assert half["rows"][0]["grad_norm"] == pytest.approx(whole["rows"][0]["grad_norm"], rel=2e-3)
    for row, expected in zip(half["rows"], whole["rows"], strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=2e-3)


def test_a_resumed_run_goes_on_with_scale_counters_and_bits(tmp_path: Path) -> None:
    arguments = ({}, 2.0**22, {"compute": "fp16", "growth_interval": 3})
    tables: dict[str, Any] = {"optim": {"schedule": "constant"}}
    whole = train(str(tmp_path / "whole"), *arguments, run={"steps": 20}, **tables)
    train(str(tmp_path / "parts"), *arguments, run={"steps": 13}, **tables)
    resumed = train(str(tmp_path / "parts"), *arguments, run={"steps": 20}, **tables)
    kept = ("step", "loss", "grad_norm", "loss_scale", "skipped_steps")
    rows, expected = ([{key: row.get(key) for key in kept} for row in run["rows"]] for run in (resumed, whole))
    assert rows == expected[13:]
    assert rows[0]["skipped_steps"] > 1
    assert fingerprints(tmp_path / "parts", 20) == fingerprints(tmp_path / "whole", 20)
    states = [read_manifest(Store(tmp_path / name / "checkpoints").path(20)).training for name in ("parts", "whole")]
    assert states[0] is not None and states[1] is not None
    assert states[0].optimizer == states[1].optimizer
    assert states[0].optimizer["loss_scale"]["skipped_steps"] == resumed["result"].skipped_steps
