"""A run that was stopped and resumed is the run that was never stopped."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.engine import Trainer
from pretrain.schedules import schedule_named
from tests.helpers.ranks import run_ranks
from tests.pretrain.models import Noise, mesh_of, tiny_config, tiny_model, tiny_subject
from workbench.checkpoint.manifest import read_manifest
from workbench.checkpoint.store import Store
from workbench.cli.main import main
from workbench.errors import CheckpointError, ConfigError, WorkbenchError
from workbench.spec.layout import ParallelLayout

MODEL = {"hidden_dropout": 0.1}


class Recorder:
    """Remembers rows, and may do something after a step."""

    def __init__(self, after: dict[int, Any] | None = None) -> None:
        self.rows: list[dict[str, Any]] = []
        self._after = after or {}

    def started(self, facts: Any) -> None: ...
    def saved(self, checkpoint: Path) -> None: ...

    def stepped(self, done: int, total: int | None) -> None:
        if done in self._after:
            self._after[done]()

    def measured(self, row: Any) -> None:
        self.rows.append(dict(row))

    def losses(self) -> list[tuple[int, float]]:
        return [(row["step"], row["loss"]) for row in self.rows if "loss" in row]


class Killed(Exception):
    """Stands for a process that dies without a word."""


def die() -> None:
    raise Killed


def train(folder: str, layout: dict[str, Any], *, die_after: int = 0, **tables: Any) -> dict[str, Any]:
    """One run on this rank: what it recorded, its result, and the samples it asked for."""
    recorder, objective = Recorder(), Noise(held_out=6)
    config = tiny_config(folder, **tables)
    layout = {"placement": schedule_named(config.parallel.schedule).placement, **layout}
    trainer = Trainer(
        config, tiny_subject(tiny_model(**MODEL)), objective, mesh_of(ParallelLayout(**layout)), watcher=recorder
    )
    if die_after:
        advance = trainer._after_step

        def after_step(result: Any, lr: float) -> None:
            advance(result, lr)
            if trainer.state.step == die_after:
                raise Killed  # on every rank, so that none waits for another

        trainer._after_step = after_step  # type: ignore[method-assign]
    try:
        result = trainer.run()
    except Killed:
        return {"losses": recorder.losses(), "asked": objective.asked}
    return {"losses": recorder.losses(), "asked": objective.asked, "result": result}


def fingerprints(folder: Path, step: int) -> dict[str, str]:
    manifest = read_manifest(Store(folder / "checkpoints").path(step))
    return {name: stored.fingerprint for name, stored in manifest.tensors.items()}


MUON_BF16 = {"name": "muon", "moments": "bf16"}


@pytest.mark.parametrize(
    ("layout", "optim", "state"),
    [
        ({}, {}, "exp_avg_sq"),
        ({"tp": 2, "pp": 2}, {}, "exp_avg_sq"),
        ({"dp": 2, "shard": "zero2"}, {}, "exp_avg_sq"),
        ({"dp": 2}, {}, "exp_avg_sq"),
        ({"tp": 2, "dp": 2, "shard": "zero1"}, MUON_BF16, "momentum"),
        ({"dp": 4, "shard": "zero3", "shard_size": 2}, {"offload": True}, "exp_avg_sq"),
    ],
    ids=str,
)
def test_six_steps_equal_four_steps_a_crash_and_a_resume_bit_for_bit(
    layout: dict[str, Any], optim: dict[str, Any], state: str, tmp_path: Path
) -> None:
    world = ParallelLayout(**layout).world_size
    run = (lambda *args: run_ranks(world, train_with, *args)) if world > 1 else (lambda *args: [train_with(*args)])
    whole = run(str(tmp_path / "whole"), layout, 0, optim)
    broken = run(str(tmp_path / "broken"), layout, 4, optim)
    resumed = run(str(tmp_path / "broken"), layout, 0, optim)
    assert [step for step, _ in broken[0]["losses"]] == [1, 2, 3, 4]
    # The checkpoint of step 3 is the last one, so step 4 is done again.
    assert [step for step, _ in resumed[0]["losses"]] == [4, 5, 6]
    assert resumed[0]["losses"] == whole[0]["losses"][3:]
    assert resumed[0]["result"].metrics == whole[0]["result"].metrics
    assert fingerprints(tmp_path / "broken", 6) == fingerprints(tmp_path / "whole", 6)
    assert any(name.startswith(f"optim.{state}/") for name in fingerprints(tmp_path / "whole", 6))


def train_with(
    folder: str, layout: dict[str, Any], die_after: int, optim: dict[str, Any] | None = None, schedule: str = "1f1b"
) -> dict[str, Any]:
    tables = {"checkpoint": {"every": 3}, "parallel": {"schedule": schedule}, "optim": optim or {}}
    return train(folder, layout, die_after=die_after, **tables)


@pytest.mark.parametrize(
    ("layout", "schedule", "optim"),
    [
        ({"tp": 2, "pp": 2}, "1f1b", {}),
        ({"tp": 2, "dp": 2, "shard": "zero3"}, "1f1b", {}),
        ({"dp": 2, "pp": 2, "vpp": 2}, "zbv", {}),
        ({"dp": 2, "pp": 2, "vpp": 2, "shard": "zero3"}, "interleaved_zb", {}),
        ({"tp": 2, "dp": 2, "shard": "zero2"}, "1f1b", MUON_BF16),
        ({"tp": 2, "cp": 2, "sequence_parallel": True}, "1f1b", {}),
        ({"cp": 2, "dp": 2, "shard": "zero3", "context": "ring"}, "1f1b", {}),
    ],
    ids=str,
)
def test_a_run_resumed_at_another_layout_sees_the_same_data_and_loses_alike(
    layout: dict[str, Any], schedule: str, optim: dict[str, Any], tmp_path: Path
) -> None:
    whole = train(str(tmp_path / "whole"), {}, optim=optim)
    train(str(tmp_path / "moved"), {}, die_after=3, checkpoint={"every": 3}, optim=optim)
    moved = run_ranks(4, train_with, str(tmp_path / "moved"), layout, 0, optim, schedule)
    assert [step for step, _ in moved[0]["losses"]] == [4, 5, 6]
    for (_, loss), (_, expected) in zip(moved[0]["losses"], whole["losses"][3:], strict=True):
        assert loss == pytest.approx(expected, rel=1e-5)
    assert moved[0]["result"].metrics == pytest.approx(whole["result"].metrics, rel=1e-5)
    seen = {index for rank in moved for index in rank["asked"]}
    assert seen == set(whole["asked"][24:])


def test_a_changed_batch_size_goes_on_where_the_data_stopped(tmp_path: Path) -> None:
    train(str(tmp_path), {}, run={"steps": 2})
    more = train(str(tmp_path), {}, run={"steps": 4}, batch={"global_size": 4})
    assert more["asked"] == list(range(16, 24))
    assert more["result"].samples == 24


def test_a_signal_ends_the_step_saves_and_says_so(tmp_path: Path) -> None:
    recorder = Recorder(after={2: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    trainer = Trainer(
        tiny_config(str(tmp_path)),
        tiny_subject(tiny_model(**MODEL)),
        Noise(),
        mesh_of(ParallelLayout()),
        watcher=recorder,
    )
    result = trainer.run()
    assert (result.interrupted, result.step, result.ended_by) == (True, 2, "signal")
    assert Store(tmp_path / "checkpoints").steps() == (2,)
    assert train(str(tmp_path), {}, run={"resume": "must"})["result"].step == 6


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    train(str(tmp_path), {}, checkpoint={"every": 1, "keep": 2})
    assert Store(tmp_path / "checkpoints").steps() == (5, 6)


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = train(str(tmp_path), {})
    again = train(str(tmp_path), {})
    assert again["losses"] == []
    assert again["result"].metrics == first["result"].metrics
    assert Store(tmp_path / "checkpoints").steps() == (6,)


def test_a_time_limit_fixes_the_number_of_steps_and_the_curve_ends_with_it(tmp_path: Path) -> None:
    recorder = Recorder()
    config = tiny_config(str(tmp_path), run={"steps": None, "seconds": 3.0}, optim={"warmup": 0, "schedule": "linear"})
    result = Trainer(config, tiny_subject(tiny_model()), Noise(), mesh_of(ParallelLayout()), watcher=recorder).run()
    assert result.step > 2
    assert result.seconds < 4.5
    rates = [row["lr"] for row in recorder.rows if "lr" in row]
    assert rates == sorted(rates, reverse=True)
    if result.ended_by == "steps":
        assert rates[-1] < 2 * rates[0] / result.step


def test_weights_alone_cannot_be_resumed(tmp_path: Path) -> None:
    train(str(tmp_path), {}, run={"steps": 2}, checkpoint={"optimizer": False})
    with pytest.raises(CheckpointError, match="holds no optimizer state.*finetune from it"):
        train(str(tmp_path), {})


def test_moments_keep_their_kind_and_format_in_a_checkpoint_that_is_resharded(tmp_path: Path) -> None:
    train(str(tmp_path), {}, optim=MUON_BF16, run={"steps": 2})
    before = read_manifest(Store(tmp_path / "checkpoints").path(2)).tensors
    assert main(["reshard", str(tmp_path), str(tmp_path / "cut"), "--tp", "2", "--pp", "2"]) == 0
    after = read_manifest(tmp_path / "cut").tensors
    assert {name: (stored.tensor, stored.fingerprint) for name, stored in after.items()} == {
        name: (stored.tensor, stored.fingerprint) for name, stored in before.items()
    }
    momentum = after["optim.momentum/layers.3.mlp.up_proj.weight"]
    assert momentum.tensor.dtype == "BF16"
    assert {box.file for box in momentum.boxes} == {f"optim-tp0{rank}-pp01.safetensors" for rank in (0, 1)}
    assert "optim.momentum/embed_tokens.weight" not in after
    assert after["optim.exp_avg/embed_tokens.weight"].tensor.dtype == "BF16"


def test_a_run_with_another_optimizer_is_refused_with_both_names(tmp_path: Path) -> None:
    train(str(tmp_path), {}, run={"steps": 1})
    with pytest.raises(ConfigError, match="optim.name is muon, was adamw"):
        train(str(tmp_path), {}, optim={"name": "muon"})


NAMES = ("first", "second")


@pytest.mark.parametrize("layout", [{}, {"tp": 2, "dp": 2, "shard": "zero3"}], ids=str)
def test_two_deterministic_runs_end_in_the_same_bytes(layout: dict[str, Any], tmp_path: Path) -> None:
    world = ParallelLayout(**layout).world_size
    for name in NAMES:
        modes = run_ranks(world, train_deterministically, str(tmp_path / name), layout)
        assert modes == [(True, True, False)] * world
    first, second = (sorted((tmp_path / name / "checkpoints/step-00000006").glob("*.safetensors")) for name in NAMES)
    assert [file.name for file in first] == [file.name for file in second]
    assert all(one.read_bytes() == other.read_bytes() for one, other in zip(first, second, strict=True))


def train_deterministically(folder: str, layout: dict[str, Any]) -> tuple[bool, bool, bool]:
    """Whether torch was deterministic, and cuBLAS, and whether buffers were filled."""
    try:
        train(folder, layout, run={"deterministic": True}, precision={"compute": "bf16"})
        filled = torch.utils.deterministic.fill_uninitialized_memory
        return torch.are_deterministic_algorithms_enabled(), "CUBLAS_WORKSPACE_CONFIG" in os.environ, filled
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_run_with_another_seed_or_model_is_refused_with_both_values(tmp_path: Path) -> None:
    train(str(tmp_path), {}, run={"steps": 1})
    with pytest.raises(ConfigError, match="run.seed is 6, was 5"):
        train(str(tmp_path), {}, run={"seed": 6})
    model = tiny_model(**MODEL, intermediate_size=64)
    with pytest.raises(ConfigError, match=r"model\.intermediate_size is 64, was 48"):
        Trainer(tiny_config(str(tmp_path)), tiny_subject(model), Noise(), mesh_of(ParallelLayout()))


@pytest.mark.parametrize(
    ("resume", "steps", "error", "message"),
    [
        ("must", 0, CheckpointError, "run.resume = 'must', but .* holds no checkpoint"),
        ("never", 1, ConfigError, "run.resume = 'never', but .*step-00000001 is there"),
    ],
)
def test_resume_is_refused_where_it_was_ruled_out(
    resume: str, steps: int, error: type[WorkbenchError], message: str, tmp_path: Path
) -> None:
    if steps:
        train(str(tmp_path), {}, run={"steps": steps})
    with pytest.raises(error, match=message):
        train(str(tmp_path), {}, run={"resume": resume})


def test_a_diverged_run_stops_with_its_step_and_the_rate(tmp_path: Path) -> None:
    with pytest.raises(WorkbenchError, match=r"step \d+: the loss is .*diverged.*optim.lr=1e\+38"):
        train(str(tmp_path), {}, optim={"lr": 1e38, "clip": 0.0, "warmup": 0, "weight_decay": 0.0})


@pytest.mark.parametrize("layout", [{}, {"tp": 2, "pp": 2}], ids=str)
def test_a_run_that_saves_memory_is_the_run_that_does_not(layout: dict[str, Any], tmp_path: Path) -> None:
    """Losses of fp32 in another order of sums, and the evaluation in chunks as well: equal to 1e-5."""
    world = ParallelLayout(**layout).world_size
    plain, saving = (
        run_ranks(world, train_saving, str(tmp_path / mode), layout, mode, chunk)[0]
        for mode, chunk in (("none", 0), ("full", 5))
    )
    assert [loss for _, loss in saving["losses"]] == pytest.approx([loss for _, loss in plain["losses"]], rel=1e-5)
    assert saving["result"].metrics["valid/loss"] == pytest.approx(plain["result"].metrics["valid/loss"], rel=1e-5)


def train_saving(folder: str, layout: dict[str, Any], mode: str, chunk: int) -> dict[str, Any]:
    return train(folder, layout, recompute={"mode": mode}, kernels={"loss_chunk_tokens": chunk, "backend": "auto"})
