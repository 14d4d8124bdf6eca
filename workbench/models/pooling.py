"""One vector for a whole row, where its tokens may lie on several ranks; and the losses of labels of rows or tokens.

Legend: B batch, T tokens of this context rank, D hidden, N labels.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from workbench.models.batch import LocalBatch
from workbench.parallel.axis import Axis
from workbench.parallel.collectives import sum_over
from workbench.parallel.loss import IGNORE, accumulation_dtype

Pooling = Literal["mean_state", "last_state"]


def pooled(x_BTD: torch.Tensor, batch: LocalBatch, context: Axis, how: Pooling) -> torch.Tensor:
    """The mean state of each row's tokens without padding, or that of its last one: [B, D], on every context rank."""
    lengths_B1 = batch.lengths.unsqueeze(-1)
    if how == "mean_state":
        share_BT = (batch.tokens < lengths_B1) / lengths_B1
    else:
        share_BT = batch.tokens == lengths_B1 - 1
    return sum_over(torch.einsum("btd,bt->bd", x_BTD, share_BT.to(x_BTD.dtype)), context)


def speaker(x_BTD: torch.Tensor, batch: LocalBatch, *, first: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The state [B, D] of the first or the last token of each row, and on which rows this context rank has it [B]."""
    place_B = torch.zeros_like(batch.lengths) if first else batch.lengths - 1
    speaks_BT = batch.tokens == place_B.unsqueeze(-1)
    rows_B = torch.arange(len(speaks_BT), device=x_BTD.device)
    return x_BTD[rows_B, speaks_BT.int().argmax(dim=-1)], speaks_BT.any(dim=-1)


def label_losses(logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
    """The loss of each label [...], in fp32 or wider, given logits [..., N]; 0 where it is IGNORE. smoothing: the share
    of each label that is spread over all."""
    wide = logits.to(accumulation_dtype(logits.dtype)).flatten(0, -2)
    losses = F.cross_entropy(wide, labels.flatten(), reduction="none", ignore_index=IGNORE, label_smoothing=smoothing)
    return losses.view(labels.shape)
