"""Minimal pairs scored by a checkpoint at any layout, on ranks of its own."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from converters.open import open_checkpoint
from pretrain.evaluation import evaluate
from pretrain.minimal_pairs import MinimalPairs
from pretrain.pipeline import Pipeline
from pretrain.schedules import schedule_named
from workbench.errors import CheckpointError
from workbench.models.build import build_stage
from workbench.models.state import load
from workbench.parallel.launch import choose_device, run_on_ranks
from workbench.parallel.mesh import Mesh
from workbench.spec.layout import ParallelLayout
from workbench.tokenizer import Tokenizer

ROWS = 20


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """(good, bad) of each line, those of like length side by side so that little is padded."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return sorted(((row["good"], row["bad"]) for row in rows), key=lambda pair: (len(pair[0]), pair))


def score_pairs(checkpoint: Path, pairs: Path, layout: ParallelLayout) -> float:
    """The share of pairs that the checkpoint tells apart, computed over `layout`'s ranks in float64.

    In float64 no pair can flip because another layout adds in another order.
    """
    found: float = run_on_ranks(_score, str(checkpoint), str(pairs), layout, nproc=layout.world_size)
    return found


def _score(checkpoint: str, pairs: str, layout: ParallelLayout) -> float:
    mesh = Mesh.create(layout, choose_device())
    opened = open_checkpoint(Path(checkpoint))
    if opened.tokenizer is None:
        raise CheckpointError(f"{checkpoint}: holds no tokenizer, so no text can be scored")
    built = build_stage(opened.model, mesh, dtype=torch.float64)
    load(built.parameters, opened.source)
    judged = MinimalPairs(read_pairs(Path(pairs)), Tokenizer.load(opened.tokenizer))
    pipeline = Pipeline(built, mesh, schedule_named("gpipe"))
    return evaluate(pipeline, judged, micro_size=ROWS, num_microbatches=2 * layout.pp)["accuracy"]
