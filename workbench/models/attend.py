"""Attention on one rank: causal or not, inside documents, with dropout, for the last tokens of a row or for all.

Legend: B batch, T tokens, S tokens attended to, H heads (local), K key/value heads (local), d head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from workbench.models.blockwise import attend_blockwise, suits
from workbench.parallel.dropout import dropout


@dataclass(frozen=True)
class WeightDropout:
    """Dropout of attention weights: how many fall, one hash a sample [B], and which head of the model comes first."""

    probability: float
    rows_B: torch.Tensor
    first_head: int


def attend(
    q_BTHd: torch.Tensor,
    k_BSKd: torch.Tensor,
    v_BSKd: torch.Tensor,
    documents_BS: torch.Tensor | None = None,
    dropped: WeightDropout | None = None,
    first: int | None = None,
    *,
    causal: bool = True,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v, [B, T, H, d]: each token attends to itself and those before it in its document, or if
    not `causal` to all of its document.

    The queries are those of the T tokens from `first` on, by default the last of the S tokens.
    """
    tokens, attended = q_BTHd.shape[1], k_BSKd.shape[1]
    first = attended - tokens if first is None else first
    if causal and documents_BS is None and dropped is None and tokens == attended and suits(q_BTHd):
        return attend_blockwise(q_BTHd, k_BSKd, v_BSKd)
    groups = q_BTHd.shape[2] // k_BSKd.shape[2]
    q_BHTd = q_BTHd.transpose(1, 2)
    k_BHSd, v_BHSd = (_repeat_heads(part.transpose(1, 2), groups) for part in (k_BSKd, v_BSKd))
    if dropped is not None or documents_BS is not None:
        mask = visible(first, tokens, 0, attended, documents_BS, q_BTHd.device, causal=causal)
    if dropped is not None:
        return _attend_with_dropout(q_BHTd, k_BHSd, v_BHSd, mask, dropped, first).transpose(1, 2)
    if documents_BS is None:
        # Not a tensor: a GPU's kernels know this mask, and of a long row it would be larger than the activations.
        mask = None if not causal or tokens in (1, attended) else causal_lower_right(tokens, attended)
    whole = causal and mask is None and tokens == attended
    return F.scaled_dot_product_attention(q_BHTd, k_BHSd, v_BHSd, attn_mask=mask, is_causal=whole).transpose(1, 2)


def visible(
    first: int,
    tokens: int,
    first_seen: int,
    seen: int,
    documents_BS: torch.Tensor | None,
    device: torch.device,
    *,
    causal: bool = True,
) -> torch.Tensor:
    """[T, S], or [B, 1, T, S] with documents: whether each of `tokens` tokens from `first` on may look at each of
    `seen` tokens from `first_seen` on. `documents_BS` are those of whole rows."""
    mask = torch.ones(tokens, seen, dtype=torch.bool, device=device)
    mask = mask.tril(first - first_seen) if causal else mask
    if documents_BS is None:
        return mask
    looking_BT1 = documents_BS[:, first : first + tokens, None]
    return (mask & (looking_BT1 == documents_BS[:, None, first_seen : first_seen + seen])).unsqueeze(1)


def _attend_with_dropout(
    q_BHTd: torch.Tensor,
    k_BHSd: torch.Tensor,
    v_BHSd: torch.Tensor,
    mask: torch.Tensor,
    dropped: WeightDropout,
    first: int,
) -> torch.Tensor:
    scores_BHTS = q_BHTd @ k_BHSd.transpose(-1, -2) / math.sqrt(q_BHTd.shape[-1])
    weights_BHTS = scores_BHTS.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    _, heads, tokens, attended = weights_BHTS.shape
    device = q_BHTd.device
    coordinates = (
        torch.arange(dropped.first_head, dropped.first_head + heads, device=device),
        torch.arange(first, first + tokens, device=device),
        torch.arange(attended, device=device),
    )
    return dropout(weights_BHTS, dropped.probability, dropped.rows_B, coordinates) @ v_BHSd


def _repeat_heads(x_BKSd: torch.Tensor, groups: int) -> torch.Tensor:
    """Each key/value head repeated for the `groups` query heads that share it."""
    return x_BKSd if groups == 1 else x_BKSd.repeat_interleave(groups, dim=1)
