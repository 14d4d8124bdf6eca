"""Ring attention: keys and values travel round the context axis while each rank computes with those it has
(arXiv:2310.01889), and merges partial results by their log-sum-exp (arXiv:2205.14135, sec. 3.1).

No rank holds the keys of a whole row, nor the scores of more than QUERIES queries. Scores, sums and results are kept
in fp32 at least. Backward goes round as well: gradients of keys and values travel with them and end where they belong.

Legend: B batch, T tokens of this rank, S tokens of the row, K key/value heads (local), G query heads that share one,
d head size (that of queries and keys, of values, or in `kv` both), N = G * q rows of one piece (q queries), s its keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from workbench.models.scoring import PLAIN, Scoring, visible
from workbench.parallel.axis import Axis
from workbench.parallel.context import context_chunks
from workbench.parallel.loss import accumulation_dtype
from workbench.parallel.softcap import soft_cap, through_soft_cap

QUERIES = 512


@dataclass(frozen=True)
class Piece:
    """Queries of this rank and keys of another that they may see: where they lie there, and in the row.

    `masked` says that some query may not see some key: one after its own token, one before its window, or by a mask.
    """

    queries: slice
    keys: slice
    first_query: int
    first_key: int
    masked: bool


def pieces(
    size: int, rank: int, source: int, tokens: int, longest: int = QUERIES, scoring: Scoring = PLAIN
) -> Iterator[Piece]:
    """What `rank` computes with the keys of `source`, each rank having `tokens` tokens; what lies wholly after a query
    or before its window is left out. At most `longest` queries a piece."""
    chunk = tokens // 2
    for i, mine in enumerate(context_chunks(size, rank)):
        for j, theirs in enumerate(context_chunks(size, source)):
            for start in range(0, chunk if theirs <= mine or not scoring.causal else 0, longest):
                stop = min(start + longest, chunk)
                diagonal = scoring.causal and theirs == mine
                seen = stop if diagonal else chunk
                first_key = max(theirs * chunk, scoring.first_seen(mine * chunk + start))
                if first_key >= theirs * chunk + seen:
                    continue
                hides = scoring.first_seen(mine * chunk + stop - 1) > first_key or scoring.mask is not None
                yield Piece(
                    queries=slice(i * chunk + start, i * chunk + stop),
                    keys=slice(j * chunk + first_key - theirs * chunk, j * chunk + seen),
                    first_query=mine * chunk + start,
                    first_key=first_key,
                    masked=diagonal or hides,
                )


def attend_in_ring(
    q_BTHd: torch.Tensor,
    k_BTKd: torch.Tensor,
    v_BTKd: torch.Tensor,
    documents_BS: torch.Tensor | None,
    axis: Axis,
    scoring: Scoring = PLAIN,
) -> torch.Tensor:
    """softmax(scores) v, [B, T, H, d]: each token attends to itself and those before it in its document and window."""
    q_BKGTd = q_BTHd.unflatten(2, (k_BTKd.shape[2], -1)).permute(0, 2, 3, 1, 4)
    kv_BKTd = torch.cat((k_BTKd, v_BTKd), dim=-1).transpose(1, 2)
    out_BKGTd = _Ring.apply(q_BKGTd, kv_BKTd, documents_BS, axis, scoring)
    return out_BKGTd.permute(0, 3, 1, 2, 4).flatten(2, 3)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BKGTd: torch.Tensor,
        kv_BKTd: torch.Tensor,
        documents_BS: torch.Tensor | None,
        axis: Axis,
        scoring: Scoring,
    ) -> torch.Tensor:
        wide = accumulation_dtype(q_BKGTd.dtype)
        size = q_BKGTd.shape[-1]
        out_BKGTd = q_BKGTd.new_zeros((*q_BKGTd.shape[:-1], kv_BKTd.shape[-1] - size), dtype=wide)
        lse_BKGT = q_BKGTd.new_full(q_BKGTd.shape[:-1], float("-inf"), dtype=wide)
        for source, arrived in _travel(kv_BKTd, axis):
            k_BKTd, v_BKTd = arrived.tensor_split((size,), dim=-1)
            for piece in pieces(axis.size, axis.rank, source, q_BKGTd.shape[3], scoring=scoring):
                scores = _scores(q_BKGTd, k_BKTd, documents_BS, piece, scoring)
                found_lse = scores.logsumexp(dim=-1)
                found = (_weights(scores, found_lse).to(v_BKTd.dtype).flatten(2, 3) @ v_BKTd[:, :, piece.keys]).to(wide)
                _merge(
                    out_BKGTd[:, :, :, piece.queries],
                    lse_BKGT[:, :, :, piece.queries],
                    found.unflatten(2, found_lse.shape[2:]),
                    found_lse,
                )
        ctx.save_for_backward(q_BKGTd, kv_BKTd, documents_BS, out_BKGTd, lse_BKGT)
        ctx.axis, ctx.scoring = axis, scoring
        return out_BKGTd.to(q_BKGTd.dtype)

    @staticmethod
    def backward(ctx: Any, grad_BKGTd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        q_BKGTd, kv_BKTd, documents_BS, out_BKGTd, lse_BKGT = ctx.saved_tensors
        axis, scoring, wide = ctx.axis, ctx.scoring, out_BKGTd.dtype
        size = q_BKGTd.shape[-1]
        scale = scoring.scale_of(size)
        dot_BKGT = (grad_BKGTd.to(wide) * out_BKGTd).sum(dim=-1)
        grad_q = torch.zeros_like(q_BKGTd, dtype=wide)
        arriving = None
        for source, arrived in _travel(kv_BKTd, axis):
            k_BKTd, v_BKTd = arrived.tensor_split((size,), dim=-1)
            grad_kv = torch.zeros_like(kv_BKTd, dtype=wide)
            grad_k, grad_v = grad_kv.tensor_split((size,), dim=-1)
            for piece in pieces(axis.size, axis.rank, source, q_BKGTd.shape[3], scoring=scoring):
                rows = piece.queries
                scores = _scores(q_BKGTd, k_BKTd, documents_BS, piece, scoring)
                weights = _weights(scores, lse_BKGT[:, :, :, rows])
                q_BKNd, grad_BKNd = (x[:, :, :, rows].flatten(2, 3) for x in (q_BKGTd, grad_BKGTd))
                k_BKsd, v_BKsd = k_BKTd[:, :, piece.keys], v_BKTd[:, :, piece.keys]
                grad_weights = (grad_BKNd @ v_BKsd.transpose(-1, -2)).to(wide).view(weights.shape)
                grad_scores = weights * (grad_weights - dot_BKGT[:, :, :, rows, None]) * scale
                grad_scores = through_soft_cap(grad_scores, scores, scoring.softcap)
                weights_BKNs, grad_BKNs = (x.to(q_BKNd.dtype).flatten(2, 3) for x in (weights, grad_scores))
                grad_q[:, :, :, rows] += (grad_BKNs @ k_BKsd).view_as(grad_q[:, :, :, rows])
                grad_k[:, :, piece.keys] += grad_BKNs.transpose(-1, -2) @ q_BKNd
                grad_v[:, :, piece.keys] += weights_BKNs.transpose(-1, -2) @ grad_BKNd
            if arriving is not None:
                grad_kv += arriving.wait()
            arriving = axis.pass_on(grad_kv)
        assert arriving is not None
        return grad_q.to(q_BKGTd.dtype), arriving.wait().to(kv_BKTd.dtype), None, None, None


def _travel(kv_BKTd: torch.Tensor, axis: Axis) -> Iterator[tuple[int, torch.Tensor]]:
    """Keys and values of every context rank with the rank they belong to, its own first; the next are under way while
    the caller computes."""
    for step in range(axis.size):
        arriving = axis.pass_on(kv_BKTd) if step + 1 < axis.size else None
        yield (axis.rank - step) % axis.size, kv_BKTd
        if arriving is not None:
            kv_BKTd = arriving.wait()


def _scores(
    q_BKGTd: torch.Tensor, k_BKTd: torch.Tensor, documents_BS: torch.Tensor | None, piece: Piece, scoring: Scoring
) -> torch.Tensor:
    """The scores of one piece [B, K, G, q, s] in fp32 at least, -inf where a query may not look."""
    q_BKGqd, k_BKsd = q_BKGTd[:, :, :, piece.queries], k_BKTd[:, :, piece.keys]
    scores = (q_BKGqd.flatten(2, 3) @ k_BKsd.transpose(-1, -2)).to(accumulation_dtype(q_BKGTd.dtype))
    scores = scores.unflatten(2, q_BKGqd.shape[2:4]) * scoring.scale_of(q_BKGqd.shape[-1])
    scores = soft_cap(scores, scoring.softcap)
    if documents_BS is None and not piece.masked:
        return scores
    looking, seen = q_BKGqd.shape[3], k_BKsd.shape[2]
    mask = visible(piece.first_query, looking, piece.first_key, seen, documents_BS, scores.device, scoring)
    return scores.masked_fill(~(mask if documents_BS is None else mask.unsqueeze(1)), float("-inf"))


def _weights(scores: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """exp(scores - lse), and 0 where a query sees nothing (there both are -inf)."""
    return (scores - _finite(lse).unsqueeze(-1)).exp()


def _merge(out: torch.Tensor, lse: torch.Tensor, found: torch.Tensor, found_lse: torch.Tensor) -> None:
    """Adds a partial result to `out` in place, each weighted by its part of the sum of exponentials."""
    total = torch.logaddexp(lse, found_lse)
    out *= (lse - _finite(total)).exp().unsqueeze(-1)
    out += found * (found_lse - _finite(total)).exp().unsqueeze(-1)
    lse.copy_(total)


def _finite(lse: torch.Tensor) -> torch.Tensor:
    return lse.masked_fill(lse == float("-inf"), 0.0)
