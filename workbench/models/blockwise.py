"""Causal attention in blocks of queries, from batched GEMMs: what a CPU runs fastest at moderate lengths.

A block multiplies only with the keys that it may see, and the query heads that share a key/value head are rows of one
GEMM, so keys and values are never repeated. PyTorch's fused CPU kernel holds no scores, but takes two to three times
as long in bf16, and ten times for short rows, since it multiplies for each head apart (docs/performance.md). Here the
scores of all blocks are kept for backward, hence LONGEST.

Legend: B batch, T tokens, H heads, K key/value heads, G heads that share one, d head size, C tokens of a block,
S tokens that a block sees.
"""

from __future__ import annotations

import torch

from workbench.models.scoring import PLAIN, Scoring, visible
from workbench.parallel.softcap import soft_cap

BLOCKS = 4
WHOLE = 127  # tokens, up to which all queries are one block
LONGEST = 1024  # tokens; longer ones would hold too many scores


def suits(q_BTHd: torch.Tensor) -> bool:
    """Whether `attend_blockwise` is the faster choice for these queries."""
    return q_BTHd.device.type == "cpu" and q_BTHd.shape[1] <= LONGEST


def attend_blockwise(
    q_BTHd: torch.Tensor, k_BTKd: torch.Tensor, v_BTKd: torch.Tensor, scoring: Scoring = PLAIN
) -> torch.Tensor:
    """softmax(scores) v, [B, T, H, d], each token attending to itself and those before it in its window."""
    batch, tokens, _, size = q_BTHd.shape
    num_kv = k_BTKd.shape[2]
    q_BKGTd = q_BTHd.unflatten(2, (num_kv, -1)).permute(0, 2, 3, 1, 4)
    keys, values = (part.transpose(1, 2).reshape(batch * num_kv, tokens, -1) for part in (k_BTKd, v_BTKd))
    blocks = 1 if tokens <= WHOLE else BLOCKS
    seen_keys, seen_values = keys.chunk(blocks, dim=1), values.chunk(blocks, dim=1)
    sees_TT = visible(0, tokens, 0, tokens, None, keys.device, scoring)
    mask_TT = keys.new_zeros(tokens, tokens).masked_fill_(~sees_TT, float("-inf"))
    scale = scoring.scale_of(size)
    outputs = []
    stop = 0
    for i, q_BKGCd in enumerate(q_BKGTd.chunk(blocks, dim=3)):
        start, stop = stop, stop + q_BKGCd.shape[3]
        # Concatenated rather than sliced from `keys`: backward of a slice fills a whole tensor with zeros.
        first = scoring.first_seen(start) // seen_keys[0].shape[1]
        k_S, v_S = torch.cat(seen_keys[first : i + 1], dim=1), torch.cat(seen_values[first : i + 1], dim=1)
        rows = q_BKGCd.reshape(batch * num_kv, -1, size)
        mask = mask_TT[start:stop, stop - k_S.shape[1] : stop].repeat(q_BKGCd.shape[2], 1)
        mask = mask.expand(batch * num_kv, -1, -1)
        if scoring.softcap is None:
            scores = torch.baddbmm(mask, rows, k_S.transpose(1, 2), alpha=scale)
        else:
            scores = soft_cap(rows @ k_S.transpose(1, 2) * scale, scoring.softcap) + mask
        outputs.append((scores.softmax(dim=-1) @ v_S).view(*q_BKGCd.shape[:-1], -1))
    return torch.cat(outputs, dim=3).permute(0, 3, 1, 2, 4).flatten(2, 3)
