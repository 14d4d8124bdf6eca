"""Cross-entropy over a vocabulary that is cut over the tensor axis.

Legend: N tokens, V vocabulary (local, padded).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from workbench.parallel.axis import Axis
from workbench.parallel.softcap import soft_cap, through_soft_cap

IGNORE = -100


@dataclass(frozen=True, slots=True)
class Smoothed:
    """What a label lost to the whole vocabulary: `share`, of which `each` of this rank's `columns` got so much."""

    share: float
    each: float
    columns: int


class VocabParallelSoftmax:
    """Losses of tokens [N], and how to get the gradient of their logits. Communicates the maxima, then the sums.

    smoothing: this share of each label is spread evenly over the whole vocabulary (arXiv:1512.00567, sec. 7).
    """

    def __init__(
        self, logits_NV: torch.Tensor, labels_N: torch.Tensor, axis: Axis, vocab_size: int, smoothing: float = 0.0
    ) -> None:
        rows = logits_NV.shape[-1]
        first = rows * axis.rank
        valid = max(0, min(rows, vocab_size - first))
        exp_NV = logits_NV.to(accumulation_dtype(logits_NV.dtype), copy=True)
        exp_NV[:, valid:] = float("-inf")
        largest_N = axis.all_reduce(exp_NV.amax(dim=-1), "max")
        exp_NV -= largest_N.unsqueeze(-1)
        counted_N = labels_N != IGNORE
        local_N = labels_N - first
        mine_N = counted_N & (local_N >= 0) & (local_N < valid)
        target_N = local_N.clamp(0, rows - 1).unsqueeze(-1)
        chosen_N = exp_NV.gather(-1, target_N).squeeze(-1).masked_fill(~mine_N, 0.0)
        if smoothing:
            chosen_N = (1 - smoothing) * chosen_N + smoothing / vocab_size * exp_NV[:, :valid].sum(dim=-1)
        exp_NV.exp_()
        sums_2N = axis.all_reduce(torch.stack((exp_NV.sum(dim=-1), chosen_N)))
        self.losses_N = (sums_2N[0].log() - sums_2N[1]).masked_fill(~counted_N, 0.0)
        self.tensors = (exp_NV, sums_2N[0], target_N, mine_N, counted_N)
        self.smoothed = Smoothed(smoothing, smoothing / vocab_size, valid)

    @staticmethod
    def gradient(tensors: Sequence[torch.Tensor], scale_N: torch.Tensor, smoothed: Smoothed) -> torch.Tensor:
        """The gradient of sum(scale * losses) with respect to the logits [N, V]; overwrites the first of `tensors`."""
        exp_NV, sum_N, target_N, mine_N, counted_N = tensors
        scale_N = scale_N.masked_fill(~counted_N, 0.0)
        grad_NV = exp_NV.mul_((scale_N / sum_N).unsqueeze(-1))
        if smoothed.share:
            grad_NV[:, : smoothed.columns] -= (smoothed.each * scale_N).unsqueeze(-1)
        chosen_N = ((smoothed.share - 1) * scale_N).masked_fill(~mine_N, 0.0)
        return grad_NV.scatter_add_(-1, target_N, chosen_N.unsqueeze(-1))


def losses_and_gradient(
    logits_NV: torch.Tensor, labels_N: torch.Tensor, vocab_size: int, softcap: float | None, smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `VocabParallelSoftmax` computes of the whole vocabulary on one rank: the losses [N], and the gradient of
    their sum for logits that are still to be capped [N, V], in their type.

    Written for torch.compile, which reads the logits three times and writes the gradient: nothing is kept in between.
    """
    columns_V = torch.arange(logits_NV.shape[-1], device=logits_NV.device)
    capped_NV = soft_cap(logits_NV.to(accumulation_dtype(logits_NV.dtype)), softcap)
    valid_NV = capped_NV.masked_fill(columns_V >= vocab_size, float("-inf"))
    largest_N = valid_NV.amax(dim=-1, keepdim=True)
    exp_NV = (valid_NV - largest_N).exp()
    sum_N = exp_NV.sum(dim=-1, keepdim=True)
    counted_N = (labels_N != IGNORE).unsqueeze(-1)
    target_N = labels_N.clamp(min=0).unsqueeze(-1)
    share_NV = (columns_V == target_N).to(capped_NV.dtype)
    chosen_N = capped_NV.gather(-1, target_N)
    if smoothing:
        even_V = (columns_V < vocab_size).to(capped_NV.dtype) / vocab_size
        share_NV = (1 - smoothing) * share_NV + smoothing * even_V
        chosen_N = (1 - smoothing) * chosen_N + smoothing * (even_V * capped_NV).sum(dim=-1, keepdim=True)
    losses_N = (sum_N.log() + largest_N - chosen_N) * counted_N
    grad_NV = through_soft_cap((exp_NV / sum_N - share_NV) * counted_N, capped_NV, softcap)
    return losses_N.squeeze(-1), grad_NV.to(logits_NV.dtype)


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_NV: torch.Tensor, labels_N: torch.Tensor, axis: Axis, vocab_size: int, smoothing: float
    ) -> torch.Tensor:
        softmax = VocabParallelSoftmax(logits_NV, labels_N, axis, vocab_size, smoothing)
        ctx.save_for_backward(*softmax.tensors)
        ctx.dtype, ctx.smoothed = logits_NV.dtype, softmax.smoothed
        return softmax.losses_N

    @staticmethod
    def backward(ctx: Any, grad_N: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_NV = VocabParallelSoftmax.gradient(ctx.saved_tensors, grad_N, ctx.smoothed)
        return grad_NV.to(ctx.dtype), None, None, None, None


def vocab_parallel_cross_entropy(
    logits_NV: torch.Tensor, labels_N: torch.Tensor, axis: Axis, *, vocab_size: int, smoothing: float = 0.0
) -> torch.Tensor:
    """Loss of each token [N], in fp32 or wider, 0 where the label is IGNORE; equal on all ranks of `axis`.

    `logits_NV` are this rank's columns; those at and past `vocab_size` of the whole vocabulary are padding and count
    for nothing. `smoothing`: the share of each label that is spread over the vocabulary. Communicates the maxima, then
    the sums, over the axis.
    """
    return _VocabParallelCrossEntropy.apply(logits_NV, labels_N, axis, vocab_size, smoothing)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """At least fp32: the type in which sums over many elements are taken."""
    return torch.promote_types(dtype, torch.float32)
