"""Scores of a model over held-out rows, through the same pipeline as training."""

from __future__ import annotations

import torch

from pretrain.objective import Evaluation, Share, to_batch
from pretrain.pipeline import Pipeline
from workbench.models.batch import Batch


def evaluate(
    pipeline: Pipeline,
    evaluation: Evaluation,
    *,
    micro_size: int,
    num_microbatches: int,
    max_samples: int | None = None,
) -> dict[str, float]:
    """The metrics of `evaluation` on every rank; communicates on all axes."""
    mesh = pipeline.mesh
    totals: list[torch.Tensor] = []

    def take(batch: Batch, output: torch.Tensor) -> None:
        # A loss is that of one context rank's tokens; anything else is whole on all of them.
        found = evaluation.tally(batch, mesh.cp.all_reduce(output.clone()) if evaluation.output == "loss" else output)
        if totals:
            totals[0] += found
        else:
            totals.append(found)

    share = Share(micro_size, mesh.dp.rank, mesh.dp.size)
    for rows in evaluation.batches(share, num_microbatches=num_microbatches, max_samples=max_samples):
        pipeline.evaluate([to_batch(r, mesh.device) for r in rows], evaluation.output, take)
    counts_here = bool(totals) and mesh.tp.rank == 0 and mesh.cp.rank == 0
    gathered = mesh.world.gather_objects(totals[0].tolist() if counts_here else None)
    sums = [sum(column) for column in zip(*(part for part in gathered if part is not None), strict=True)]
    return evaluation.metrics(sums)
