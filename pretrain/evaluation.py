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
    found: list[torch.Tensor] = []

    def take(batch: Batch, output: torch.Tensor) -> None:
        # A loss is that of one context rank's tokens; anything else is whole on all of them.
        whole = mesh.cp.all_reduce(output.clone()) if evaluation.output == "loss" else output
        _put(found, evaluation.tally(batch, whole))

    share = Share(micro_size, mesh.dp.rank, mesh.dp.size)
    for rows in evaluation.batches(share, num_microbatches=num_microbatches, max_samples=max_samples):
        pipeline.evaluate([to_batch(r, mesh.device) for r in rows], evaluation.output, take)
    counts_here = bool(found) and mesh.tp.rank == 0 and mesh.cp.rank == 0
    totals: list[torch.Tensor] = []
    for part in mesh.world.gather_objects(torch.cat(found).cpu() if counts_here else None):
        if part is not None:
            _put(totals, part)
    return evaluation.metrics(torch.cat(totals).flatten().tolist())


def _put(found: list[torch.Tensor], more: torch.Tensor) -> None:
    """Adds a vector to the one that is there; a matrix is kept beside the others."""
    if found and more.dim() == 1:
        found[0] = found[0] + more
    else:
        found.append(more)
