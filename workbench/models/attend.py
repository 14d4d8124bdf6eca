"""Attention on one rank: causal or not, inside documents, with dropout, for the last tokens of a row or for all.

Legend: B batch, T tokens, S tokens attended to, H heads (local), K key/value heads (local), d head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from workbench.models.blockwise import attend_blockwise, suits
from workbench.models.scoring import PLAIN, Scoring, visible
from workbench.parallel.dropout import dropout
from workbench.parallel.softcap import soft_cap

WINDOWED_QUERIES = 1024
"""Queries of a window that are computed at once, if it is not longer: no mask is wider than they and their window."""
SCORED = 256
"""Tokens, up to which a CPU keeps scores under every mask: one product for all heads is the faster way there."""
FLASH_SIZE = 256  # of a head, at the most (PyTorch, sdp_utils.cpp, check_head_dim_size_flash)


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
    scoring: Scoring = PLAIN,
    first: int | None = None,
) -> torch.Tensor:
    """softmax(scores) v, [B, T, H, d]: each token attends to itself and those before it in its document and window, or
    to all of its document if scoring is not causal.

    The queries are those of the T tokens from `first` on, by default the last of the S tokens.
    """
    tokens, attended = q_BTHd.shape[1], k_BSKd.shape[1]
    first = attended - tokens if first is None else first
    if scoring.causal and documents_BS is None and dropped is None and tokens == attended and suits(q_BTHd):
        return attend_blockwise(q_BTHd, k_BSKd, v_BSKd, scoring)
    if scoring.window is not None and tokens > (span := max(scoring.window, WINDOWED_QUERIES)):
        return _attend_by_spans(span, q_BTHd, k_BSKd, v_BSKd, documents_BS, dropped, scoring)
    if dropped is None and (unseen := scoring.first_seen(first)):
        k_BSKd, v_BSKd = k_BSKd[:, unseen:], v_BSKd[:, unseen:]
        attended, first = attended - unseen, first - unseen
        documents_BS = None if documents_BS is None else documents_BS[:, unseen:]
    q_BHTd, k_BKSd, v_BKSd = (part.transpose(1, 2) for part in (q_BTHd, k_BSKd, v_BSKd))
    hides = scoring.first_seen(first + tokens - 1) > 0 or scoring.mask is not None
    short = q_BTHd.device.type == "cpu" and tokens > 1 and attended <= SCORED
    by_scores = short or dropped is not None or scoring.softcap is not None
    if by_scores or documents_BS is not None or hides:
        mask = visible(first, tokens, 0, attended, documents_BS, q_BTHd.device, scoring)
        k_BHSd, v_BHSd = _repeat_heads(q_BHTd, k_BKSd), _repeat_heads(q_BHTd, v_BKSd)
        if by_scores:
            return _attend_by_scores(q_BHTd, k_BHSd, v_BHSd, mask, dropped, scoring, first).transpose(1, 2)
        return _fused(q_BHTd, k_BHSd, v_BHSd, mask, scoring).transpose(1, 2)
    # Not a tensor: a GPU's kernels know this mask, and of a long row it would be larger than the activations.
    mask = None if not scoring.causal or tokens in (1, attended) else causal_lower_right(tokens, attended)
    if not shares_heads(q_BHTd, k_BKSd, v_BKSd):
        k_BKSd, v_BKSd = _repeat_heads(q_BHTd, k_BKSd), _repeat_heads(q_BHTd, v_BKSd)
    return _fused(q_BHTd, k_BKSd, v_BKSd, mask, scoring).transpose(1, 2)


def _attend_by_spans(
    span: int,
    q_BTHd: torch.Tensor,
    k_BSKd: torch.Tensor,
    v_BSKd: torch.Tensor,
    documents_BS: torch.Tensor | None,
    dropped: WeightDropout | None,
    scoring: Scoring,
) -> torch.Tensor:
    """What `attend` gives, `span` queries at a time, each time with the keys up to the last of them."""
    tokens, before = q_BTHd.shape[1], k_BSKd.shape[1] - q_BTHd.shape[1]
    found = []
    for start in range(0, tokens, span):
        seen = slice(before + min(start + span, tokens))
        documents = None if documents_BS is None else documents_BS[:, seen]
        queries = q_BTHd[:, start : start + span]
        found.append(attend(queries, k_BSKd[:, seen], v_BSKd[:, seen], documents, dropped, scoring))
    return torch.cat(found, dim=1)


def shares_heads(q_BHTd: torch.Tensor, k_BKSd: torch.Tensor, v_BKSd: torch.Tensor) -> bool:
    """Whether a fused kernel reads each key/value head for all query heads that share it.

    A GPU's flash kernel does, and runs wherever bf16 does; where it does not, keys and values must be repeated, or
    scores would be kept. Not asked of torch (`can_use_flash_attention`), for torch.compile cannot trace the question.
    """
    size = q_BHTd.shape[-1]
    runs = q_BHTd.device.type == "cuda" and q_BHTd.dtype == torch.bfloat16 and size <= FLASH_SIZE
    return runs and k_BKSd.shape[-1] == v_BKSd.shape[-1] == size


def _fused(
    q_BHTd: torch.Tensor, k_BKSd: torch.Tensor, v_BKSd: torch.Tensor, mask: torch.Tensor | None, scoring: Scoring
) -> torch.Tensor:
    """softmax(q k^T scale) v, [B, H, T, d], without keeping scores; all without a mask, or those before."""
    whole = scoring.causal and mask is None and q_BHTd.shape[2] == k_BKSd.shape[2]
    scale, size = scoring.scale_of(q_BHTd.shape[-1]), v_BKSd.shape[-1]
    if q_BHTd.device.type == "cpu" and size != q_BHTd.shape[-1]:
        q_BHTd, k_BKSd, v_BKSd = _of_one_size(q_BHTd, k_BKSd, v_BKSd)
    grouped = k_BKSd.shape[1] < q_BHTd.shape[1]
    return F.scaled_dot_product_attention(
        q_BHTd, k_BKSd, v_BKSd, attn_mask=mask, is_causal=whole, scale=scale, enable_gqa=grouped
    )[..., :size]


def _attend_by_scores(
    q_BHTd: torch.Tensor,
    k_BHSd: torch.Tensor,
    v_BHSd: torch.Tensor,
    mask: torch.Tensor,
    dropped: WeightDropout | None,
    scoring: Scoring,
    first: int,
) -> torch.Tensor:
    scores_BHTS = q_BHTd @ k_BHSd.transpose(-1, -2) * scoring.scale_of(q_BHTd.shape[-1])
    scores_BHTS = soft_cap(scores_BHTS, scoring.softcap)
    weights_BHTS = scores_BHTS.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    if dropped is None:
        return weights_BHTS @ v_BHSd
    _, heads, tokens, attended = weights_BHTS.shape
    device = q_BHTd.device
    coordinates = (
        torch.arange(dropped.first_head, dropped.first_head + heads, device=device),
        torch.arange(first, first + tokens, device=device),
        torch.arange(attended, device=device),
    )
    return dropout(weights_BHTS, dropped.probability, dropped.rows_B, coordinates) @ v_BHSd


def _of_one_size(*heads: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Vectors with zeros at their ends: for values of another size a CPU has no fused kernel, and keeps all scores."""
    size = max(part.shape[-1] for part in heads)
    return tuple(F.pad(part, (0, size - part.shape[-1])) for part in heads)


def _repeat_heads(q_BHTd: torch.Tensor, x_BKSd: torch.Tensor) -> torch.Tensor:
    """Each key/value head repeated for the query heads that share it."""
    groups = q_BHTd.shape[1] // x_BKSd.shape[1]
    return x_BKSd if groups == 1 else x_BKSd.repeat_interleave(groups, dim=1)
