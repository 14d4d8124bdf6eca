"""What a step learns by: what the last stage computes of a microbatch, and the loss that is made of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from workbench.models.batch import Batch
from workbench.models.decoder import Output

if TYPE_CHECKING:
    from pretrain.pipeline import Pipeline


class Criterion(Protocol):
    """The loss of a step is the sum over its microbatches, divided by the labels (or `terms`) of all its rows."""

    @property
    def output(self) -> Output:
        """What the last stage computes."""
        ...

    def loss(self, batch: Batch, output: torch.Tensor) -> torch.Tensor:
        """The summed loss of a microbatch, a scalar. Ranks that share the microbatch all compute it."""
        ...

    def ready(self, pipeline: Pipeline, batches: Sequence[Batch]) -> Sequence[Batch]:
        """The batches of a step as they are learned from. May run some of their rows forward, on all ranks together."""
        ...


class SummedLoss:
    """The sum of the losses of all labels, as the model's own head gives it."""

    output: Output = "loss"

    def loss(self, batch: Batch, output: torch.Tensor) -> torch.Tensor:
        return output

    def ready(self, pipeline: Pipeline, batches: Sequence[Batch]) -> Sequence[Batch]:
        return batches
