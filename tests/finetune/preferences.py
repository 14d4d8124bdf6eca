"""Rows of preferences, runs that learn from them, and what a run must come to whatever its layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from converters.merge import base_fingerprint
from converters.open import open_checkpoint
from finetune.config import FinetuneConfig
from finetune.run import Base, Finetuning
from tests.finetune.adapters import write_base
from tests.finetune.data import byte_tokenizer, config_of, small_model, write_rows
from workbench.parallel.mesh import Mesh
from workbench.spec.layout import ParallelLayout

LORA = {"kind": "lora", "r": 3}
FULL = {"kind": "full"}
PAIRS = [
    {"prompt": f"{chr(97 + n % 7)}{n % 3}->", "chosen": chr(65 + n % 7) * (1 + n % 3), "rejected": "no" * (1 + n % 2)}
    for n in range(24)
]
SINGLE = [{"prompt": row["prompt"], "completion": row["chosen" if n % 3 else "rejected"], "label": bool(n % 3)}
          for n, row in enumerate(PAIRS)]  # fmt: skip


def write_all(root: Path) -> Path:
    """A base with a tokenizer, and rows of pairs and of single answers."""
    write_base(root / "base", small_model(), tokenizer=byte_tokenizer(root / "tokenizer"))
    write_rows(root / "pairs.jsonl", PAIRS)
    write_rows(root / "single.jsonl", SINGLE)
    return root


def base_of(folder: Path) -> Base:
    opened = open_checkpoint(folder / "base")
    fingerprint = base_fingerprint(opened)
    return Base(opened.model, opened.source, folder / "tokenizer", str(folder / "base"), fingerprint)


def config(folder: Path, loss: str, method: dict[str, Any], place: Path, **tables: Any) -> FinetuneConfig:
    """A run that learns by `loss`: a kind of preference, or "reward"."""
    rows = str(folder / ("single.jsonl" if loss == "kto" else "pairs.jsonl"))
    kind = {"kind": "reward"} if loss == "reward" else {"kind": "preference", "loss": loss}
    task = {**kind, "train": rows, "valid": rows, **tables.pop("task", {})}
    return config_of(folder, task, method, run={"dir": str(place), **tables.pop("run", {})}, **tables)


REWARDS = tuple(f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies"))
TOLD = ("grad_norm", *REWARDS, "kl", "accuracy", "margin")


class Steps:
    """A watcher that keeps the gradient norm of every step, and what the judge says of it; rank 0 alone is told."""

    def __init__(self) -> None:
        self.seen: dict[str, float] = {}

    def measured(self, row: Mapping[str, Any]) -> None:
        if "grad_norm" in row:
            # Before the first update both answers are as likely as under the base, so rounding decides which is better.
            told = [name for name in TOLD if name in row and not (row["step"] == 1 and "accurac" in name)]
            self.seen |= {f"step {row['step']}/{name}": row[name] for name in told}

    def started(self, facts: Mapping[str, Any]) -> None: ...
    def stepped(self, done: int, total: int | None) -> None: ...
    def saved(self, checkpoint: Path) -> None: ...


def tune(folder: Path, settings: FinetuneConfig, layout: ParallelLayout | None = None) -> dict[str, float]:
    """The metrics and the loss of a run in float64, and on rank 0 what was told of its steps."""
    mesh = Mesh.single() if layout is None else Mesh.create(layout, torch.device("cpu"))
    steps = Steps()
    result = Finetuning(settings, base_of(folder), mesh, watcher=steps, dtype=torch.float64).run()
    assert result.loss is not None
    return {**result.metrics, "loss": result.loss, **steps.seen}
