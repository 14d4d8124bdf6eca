"""What tasks minimise where that is not the loss that the model has for its labels.

Legend: B rows, N outputs, S samples of G rows each, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from finetune.task import IGNORE
from pretrain.engine import Criterion
from workbench.models.batch import Batch
from workbench.models.decoder import Output
from workbench.models.pooling import Pooling
from workbench.parallel.collectives import gather_from
from workbench.parallel.loss import accumulation_dtype
from workbench.parallel.mesh import Mesh


class LabelLoss(Criterion):
    """Cross-entropy of one label a row, those of each class counting `weights` times."""

    output: Output = "logits"

    def __init__(self, weights: Sequence[float], smoothing: float) -> None:
        self._weights, self._smoothing = weights, smoothing

    def loss(self, batch: Batch, output: torch.Tensor, mesh: Mesh) -> torch.Tensor:
        assert batch.labels is not None
        logits_BN = widened(output)
        weight_N = logits_BN.new_tensor(self._weights)
        how: dict[str, Any] = {"weight": weight_N, "label_smoothing": self._smoothing, "ignore_index": IGNORE}
        return F.cross_entropy(logits_BN, batch.labels, reduction="sum", **how)


class MultiLabelLoss(Criterion):
    """Binary cross-entropy of each label, its presence counting `weights` times; the mean over the labels of a row."""

    output: Output = "logits"

    def __init__(self, weights: Sequence[float] | None, smoothing: float) -> None:
        self._weights, self._smoothing = weights, smoothing

    def loss(self, batch: Batch, output: torch.Tensor, mesh: Mesh) -> torch.Tensor:
        logits_BN = widened(output)
        targets_BN = batch.values["target"].to(logits_BN) * (1 - self._smoothing) + self._smoothing / 2
        weight_N = None if self._weights is None else logits_BN.new_tensor(self._weights)
        losses_BN = F.binary_cross_entropy_with_logits(logits_BN, targets_BN, pos_weight=weight_N, reduction="none")
        return counted(losses_BN.mean(dim=-1), batch).sum()


class SquaredLoss(Criterion):
    """The square of the distance from a row's target."""

    output: Output = "logits"

    def loss(self, batch: Batch, output: torch.Tensor, mesh: Mesh) -> torch.Tensor:
        values = widened(output)
        return counted((values - batch.values["target"].to(values)).square().sum(dim=-1), batch).sum()


class ChoiceLoss(Criterion):
    """Cross-entropy of the right one among the scores of a sample's rows."""

    output: Output = "logits"

    def __init__(self, group: int) -> None:
        self._group = group

    def loss(self, batch: Batch, output: torch.Tensor, mesh: Mesh) -> torch.Tensor:
        scores_SG, labels_S = choices(output, batch, self._group)
        return F.cross_entropy(scores_SG, labels_S, reduction="sum", ignore_index=IGNORE)


class ContrastiveLoss(Criterion):
    """InfoNCE: which of all candidates of the step belongs to a query, by cosine (arXiv:1807.03748, sec. 2.3).

    A sample's first row is the query and its second the one that belongs to it; further ones are negatives, as are the
    candidates of all other samples, on whichever data-parallel rank they are.
    """

    def __init__(self, pooling: Pooling, group: int, temperature: float) -> None:
        self.output: Output = pooling
        self._group, self._temperature = group, temperature

    def loss(self, batch: Batch, output: torch.Tensor, mesh: Mesh) -> torch.Tensor:
        vectors_SGD = F.normalize(widened(output), dim=-1).unflatten(0, (-1, self._group))
        candidates = gather_from(vectors_SGD[:, 1:].contiguous(), mesh.dp, dim=0).flatten(0, 1)
        scores = vectors_SGD[:, 0] @ candidates.T / self._temperature
        first = mesh.dp.rank * len(vectors_SGD)
        own_S = (first + torch.arange(len(vectors_SGD), device=scores.device)) * (self._group - 1)
        return F.cross_entropy(scores, own_S, reduction="sum")


def widened(output: torch.Tensor) -> torch.Tensor:
    """In fp32 or wider."""
    return output.to(accumulation_dtype(output.dtype))


def counted(losses_B: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Zero for rows that only fill a batch."""
    assert batch.labels is not None
    return losses_B.masked_fill(batch.labels == IGNORE, 0.0)


def choices(output: torch.Tensor, batch: Batch, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The scores of each sample's choices [S, G], the lowest there is for those that it does not have, and the number
    of the right one [S]. A row's target says whether it is a choice."""
    assert batch.labels is not None
    scores_B = widened(output).squeeze(-1)
    scores_B = scores_B.masked_fill(batch.values["target"].squeeze(-1) == 0, torch.finfo(scores_B.dtype).min)
    return scores_B.view(-1, group), batch.labels.view(-1, group)[:, 0]
