"""The losses of words that a head predicts, of the labelled tokens alone where few have a label.

Legend: B batch, T tokens of this context rank, N those whose loss is made, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from workbench.models.batch import LocalBatch
from workbench.parallel.chunked_loss import Chunking, chunked_loss, chunked_token_losses
from workbench.parallel.embedding import VocabParallelHead
from workbench.parallel.loss import IGNORE, vocab_parallel_cross_entropy
from workbench.parallel.sequence import whole_input
from workbench.parallel.softcap import soft_cap


@dataclass(frozen=True)
class Labelled:
    """The labels of a batch [B, T], and the places among all its tokens of those that count [N]; None: of all."""

    labels_BT: torch.Tensor
    places_N: torch.Tensor | None

    @classmethod
    def of(cls, batch: LocalBatch, head: VocabParallelHead) -> Labelled:
        """Those of a batch for a head. One that gathers tokens itself, or is adapted, knows them by their places, so it
        is given all."""
        assert batch.labels is not None
        by_place = head.mesh.layout.sequence_parallel or head.delta is not None
        if by_place or not batch.few_labels:
            return cls(batch.labels, None)
        return cls(batch.labels, (batch.labels.flatten() != IGNORE).nonzero().squeeze(-1))

    def pick(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """What is at the places: [N, D], or as it is where they are all."""
        return x_BTD if self.places_N is None else x_BTD.flatten(0, 1)[self.places_N]

    @property
    def labels_N(self) -> torch.Tensor:
        labels = self.labels_BT.flatten()
        return labels if self.places_N is None else labels[self.places_N]

    def spread(self, losses_N: torch.Tensor) -> torch.Tensor:
        """The losses where their tokens are [B, T], zero elsewhere."""
        if self.places_N is not None:
            losses_N = losses_N.new_zeros(self.labels_BT.numel()).index_copy(0, self.places_N, losses_N)
        return losses_N.view(self.labels_BT.shape)


def word_losses(
    x: torch.Tensor, head: VocabParallelHead, weight: nn.Parameter, labels_N: torch.Tensor, how: Chunking, *, sums: bool
) -> torch.Tensor:
    """The loss of each label [N], 0 where ignored, or with `sums` their sum; `x` [N, D] or [B, T, D] is as the head
    takes it. `how.tokens`: 0 for all at once."""
    # What is compiled holds the logits only, in the type of activations, and makes the gradients at once.
    learns = how.compiled and sums and torch.is_grad_enabled()
    if how.tokens or learns:
        x_ND = whole_input(x, head.mesh).flatten(0, -2)
        return (chunked_loss if sums else chunked_token_losses)(x_ND, weight, head.bias, labels_N, how)
    logits_NV = soft_cap(head(x, weight), how.softcap).flatten(0, -2)
    losses_N = vocab_parallel_cross_entropy(
        logits_NV, labels_N, how.axis, vocab_size=how.vocab_size, smoothing=how.smoothing
    )
    return losses_N.sum() if sums else losses_N
