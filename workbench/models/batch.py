"""One microbatch as the stages of a pipeline see it.

Legend: B batch (samples), T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from workbench.parallel.dropout import DropoutKey


@dataclass(frozen=True)
class Batch:
    """Token ids and what is to be predicted, right-padded.

    input_ids: [B, T] int64. labels: [B, T] int64, the token that follows each position, IGNORE where nothing is
    predicted; [B] class numbers for a sequence head; None where only logits are wanted. lengths: [B], real tokens of
    each row, None when all rows are full. dropout: what the dropout masks depend on; None switches dropout off.
    positions: [B, T], the place of each token in its sequence; None for 0 to T-1. documents: [B, T], the number of the
    document that each token belongs to, which it does not look beyond; None when a row is one document.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    dropout: DropoutKey | None = None
    positions: torch.Tensor | None = None
    documents: torch.Tensor | None = None
