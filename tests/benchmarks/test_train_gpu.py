"""The benchmark that needs a GPU runs without one at toy size, so that it does not break unseen."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("contender", ["engine-bf16", "transformers-compiled"])
def test_a_step_of_each_side_learns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, contender: str) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("train_gpu")
    if contender == "engine-bf16":
        step = script.engine_step("toy", 32, {}, "none", str(tmp_path))
    else:
        monkeypatch.setattr("torch.compile", lambda module: module)
        step = script.transformers_step("toy", 32, recompute=False)
    losses = [step() for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]
