"""Scores of a model over held-out rows, through the same pipeline as training."""

from __future__ import annotations

import torch

from pretrain.objective import Evaluation, Share, to_batch
from pretrain.pipeline import Pipeline
from pretrain.tally import Tally
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
    mesh, tally = pipeline.mesh, Tally()

    def take(batch: Batch, output: torch.Tensor) -> None:
        # A loss is that of one context rank's tokens; anything else is whole on all of them.
        whole = mesh.cp.all_reduce(output.clone()) if evaluation.output == "loss" else output
        tally.put(evaluation.tally(batch, whole))

    share = Share(micro_size, mesh.dp.rank, mesh.dp.size)
    for rows in evaluation.batches(share, num_microbatches=num_microbatches, max_samples=max_samples):
        pipeline.evaluate([to_batch(r, mesh.device) for r in rows], evaluation.output, take)
    return evaluation.metrics(tally.total(mesh))
