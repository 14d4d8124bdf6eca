"""Runs that learn from preferences: what they learn, at which layouts, and what of the base they keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from converters.open import open_checkpoint
from finetune.reference import FILE
from finetune.run import Finetuning, evaluate_model
from tests.finetune.data import write_rows
from tests.finetune.preferences import FULL, LORA, PAIRS, base_of, config, tune, write_all
from tests.helpers.ranks import run_ranks
from workbench.checkpoint.reader import open_native
from workbench.errors import DataError
from workbench.parallel.mesh import Mesh
from workbench.spec.geometry import Box
from workbench.spec.layout import ParallelLayout

LOSSES = ["dpo", "ipo", "orpo", "kto", "reward"]
TOLERANCE = 1e-10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("preference"))


def last_weights(place: Path) -> dict[str, np.ndarray]:
    source = open_native(max((place / "checkpoints").iterdir()))
    return {name: source.read(name, Box.whole(tensor.shape)) for name, tensor in source.schema.items()}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float) -> None:
    assert set(found) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(
            found[name], values, rtol=0, atol=tolerance * max(np.abs(values).max(), 1e-30), err_msg=name
        )


@pytest.mark.parametrize("method", [LORA, FULL], ids=lambda method: method["kind"])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_margin_between_rewards_rises(loss: str, method: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    before = tune(folder, config(folder, loss, method, tmp_path / "a", run={"steps": 2}, optim={"lr": 1e-9}))
    after = tune(folder, config(folder, loss, method, tmp_path / "b", run={"steps": 20}, optim={"lr": 1e-2}))
    name = "valid/margin" if loss == "reward" else "valid/rewards/margins"
    assert after[name] > max(before[name], 0.0) + 0.1
    if loss == "reward":
        assert after["valid/accuracy"] > 0.9 and after["valid/pairs"] == len(PAIRS)
    elif loss == "kto":
        assert after["valid/rewards/chosen"] > 0 > after["valid/rewards/rejected"] and after["valid/kl"] >= 0
    else:
        assert after["valid/rewards/accuracies"] > 0.9 and after["valid/pairs"] == len(PAIRS)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_step_says_what_it_was_learned_with(loss: str, folder: Path, tmp_path: Path) -> None:
    found = tune(folder, config(folder, loss, LORA, tmp_path, run={"steps": 2}, optim={"lr": 1e-9}))
    rewards = {f"step 2/rewards/{name}" for name in ("chosen", "rejected", "margins")}
    told = {"reward": {"step 2/margin", "step 2/accuracy"}, "kto": rewards | {"step 2/kl"}}
    assert told.get(loss, rewards | {"step 2/rewards/accuracies"}) <= set(found)
    # Rows that are learned from and judged by are the same, and nothing has been learned.
    if loss == "dpo":
        assert found["step 2/rewards/margins"] == pytest.approx(found["valid/rewards/margins"], abs=1e-6)
    if loss in ("dpo", "ipo", "kto"):
        assert found["loss"] == pytest.approx(found["valid/loss"], rel=1e-6)


CASES = [
    (ParallelLayout(tp=2), "dpo", LORA),
    (ParallelLayout(pp=2), "kto", LORA),
    (ParallelLayout(dp=2), "kto", FULL),
    (ParallelLayout(tp=2, pp=2), "ipo", FULL),
    (ParallelLayout(tp=2, cp=2, sequence_parallel=True), "orpo", LORA),
    (ParallelLayout(tp=2, cp=2, sequence_parallel=True), "reward", FULL),
    (ParallelLayout(dp=2, shard="zero3"), "dpo", FULL),
    (ParallelLayout(cp=2, dp=2, context="ring"), "kto", LORA),
]
LAYOUTS = [
    ParallelLayout(tp=4),
    ParallelLayout(tp=2, dp=2, sequence_parallel=True),
    ParallelLayout(pp=2, dp=2),
    ParallelLayout(cp=2, pp=2),
    ParallelLayout(dp=2, shard="zero2"),
]
EVERY = [
    pytest.param(layout, loss, method, marks=pytest.mark.exhaustive)
    for layout in LAYOUTS
    for loss in LOSSES
    for method in (LORA, FULL)
]


@pytest.mark.parity
@pytest.mark.parametrize(("layout", "loss", "method"), [*CASES, *EVERY], ids=str)
def test_a_run_at_any_layout_is_the_run_of_one_process(
    layout: ParallelLayout, loss: str, method: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    run = {"steps": 5}
    one = tune(folder, config(folder, loss, method, tmp_path / "one", run=run))
    settings = config(folder, loss, method, tmp_path / "many", run=run)
    first, *others = run_ranks(layout.world_size, tune, folder, settings, layout)
    assert first == pytest.approx(one, rel=TOLERANCE, abs=1e-12)
    told = {name: value for name, value in one.items() if not name.startswith("step ")}
    assert all(found == pytest.approx(told, rel=TOLERANCE, abs=1e-12) for found in others)
    assert_same(last_weights(tmp_path / "many"), last_weights(tmp_path / "one"), 1e-9)


@pytest.mark.parametrize("loss", LOSSES)
def test_neither_loss_nor_update_depends_on_how_pairs_lie_in_microbatches(
    loss: str, folder: Path, tmp_path: Path
) -> None:
    found = {}
    for micro_size in (1, 2, 8):
        settings = config(folder, loss, LORA, tmp_path / str(micro_size), batch={"micro_size": micro_size})
        found[micro_size] = tune(folder, settings)
    for micro_size in (1, 2):
        assert found[micro_size] == pytest.approx(found[8], rel=TOLERANCE, abs=1e-12)
        assert_same(last_weights(tmp_path / str(micro_size)), last_weights(tmp_path / "8"), 1e-9)


def test_chunks_of_logits_change_nothing(folder: Path, tmp_path: Path) -> None:
    whole = tune(folder, config(folder, "dpo", FULL, tmp_path / "a"))
    chunks = config(folder, "dpo", FULL, tmp_path / "b", kernels={"loss_chunk_tokens": 5})
    found = run_ranks(2, tune, folder, chunks, ParallelLayout(tp=2))[0]
    assert found == pytest.approx(whole, rel=TOLERANCE, abs=1e-12)


@pytest.mark.parametrize(("loss", "method"), [("dpo", LORA), ("dpo", FULL), ("kto", FULL)])
def test_a_run_that_goes_on_measures_against_the_same_base(
    loss: str, method: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    Finetuning(config(folder, loss, method, tmp_path / "a", run={"steps": 6}), base_of(folder), Mesh.single()).run()
    for steps in (3, 6):
        run = Finetuning(
            config(folder, loss, method, tmp_path / "b", run={"steps": steps}), base_of(folder), Mesh.single()
        )
        run.run()
    expected, found = last_weights(tmp_path / "a"), last_weights(tmp_path / "b")
    assert set(found) == set(expected)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_the_base_is_asked_once_and_again_only_of_rows_that_are_new(folder: Path, tmp_path: Path) -> None:
    tune(folder, config(folder, "dpo", LORA, tmp_path))
    kept = load_file(tmp_path / FILE)
    assert [len(values) for values in kept.values()] == [2 * len(PAIRS)]  # train and valid are the same rows
    other = write_rows(tmp_path / "other.jsonl", PAIRS[:5])
    tune(folder, config(folder, "dpo", LORA, tmp_path, task={"valid": other}, run={"steps": 5}))
    added = load_file(tmp_path / FILE)
    (same,) = (values for key, values in added.items() if key in kept)
    (new,) = (values for key, values in added.items() if key not in kept)
    np.testing.assert_allclose(new, same[:10], rtol=1e-12)


def test_weights_that_were_trained_are_not_taken_for_the_base(folder: Path, tmp_path: Path) -> None:
    tune(folder, config(folder, "dpo", FULL, tmp_path))
    other = write_rows(tmp_path / "other.jsonl", PAIRS[:5])
    with pytest.raises(DataError, match=r"reference.safetensors: does not hold what the base says of the valid rows"):
        tune(folder, config(folder, "dpo", FULL, tmp_path, task={"valid": other}, run={"steps": 5}))


def test_the_score_of_a_saved_model_is_the_score_of_its_run(folder: Path, tmp_path: Path) -> None:
    settings = config(folder, "ipo", FULL, tmp_path / "run")
    result = Finetuning(settings, base_of(folder), Mesh.single()).run()
    saved = open_checkpoint(Path(result.checkpoint))
    assert evaluate_model(settings, saved.model, saved.source, saved.tokenizer, Mesh.single()) == result.metrics
    elsewhere = config(folder, "ipo", FULL, tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"of the valid rows, by which rewards are measured"):
        evaluate_model(elsewhere, saved.model, saved.source, saved.tokenizer, Mesh.single())
