"""What a step learns by: what the last stage computes of a microbatch, and the loss that is made of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from workbench.models.batch import Batch
from workbench.models.decoder import Output
from workbench.parallel.mesh import Mesh

if TYPE_CHECKING:
    from pretrain.pipeline import Pipeline


class StepJudge(Protocol):
    """Metrics of a step, from what its microbatches say."""

    def tally(self, batch: Batch, output: torch.Tensor) -> torch.Tensor:
        """What a microbatch adds to the sums, a vector; or a matrix, of which every row is kept."""
        ...

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        """Metrics from the sums over everything, or from all rows, one after the other in any order."""
        ...


class Criterion:
    """The sum of the losses of all labels, as the model's own head gives it; a subclass says otherwise.

    The loss of a step is the sum over its microbatches, divided by the labels (or `terms`) of all its rows.
    """

    output: Output = "loss"
    """What the last stage computes."""

    judge: StepJudge | None = None
    """Who says more of a step than its loss, of what it was learned from."""

    def loss(self, batch: Batch, output: torch.Tensor, mesh: Mesh) -> torch.Tensor:
        """The summed loss of a microbatch, a scalar. Ranks that share the microbatch all compute it; those of the dp
        axis may communicate."""
        return output

    def ready(self, pipeline: Pipeline, batches: Sequence[Batch]) -> Sequence[Batch]:
        """The batches of a step as they are learned from. May run some of their rows forward, on all ranks together."""
        return batches
