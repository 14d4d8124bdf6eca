"""Cross-entropy over a vocabulary that is cut over the tensor axis.

Legend: N tokens, V vocabulary (local, padded).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from workbench.parallel.mesh import Axis

IGNORE = -100


class VocabParallelSoftmax:
    """Losses of tokens [N], and how to get the gradient of their logits. Communicates the maxima, then the sums."""

    def __init__(self, logits_NV: torch.Tensor, labels_N: torch.Tensor, axis: Axis, vocab_size: int) -> None:
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
        exp_NV.exp_()
        sums_2N = axis.all_reduce(torch.stack((exp_NV.sum(dim=-1), chosen_N)))
        self.losses_N = (sums_2N[0].log() - sums_2N[1]).masked_fill(~counted_N, 0.0)
        self.tensors = (exp_NV, sums_2N[0], target_N, mine_N, counted_N)

    @staticmethod
    def gradient(tensors: Sequence[torch.Tensor], scale_N: torch.Tensor) -> torch.Tensor:
        """The gradient of sum(scale * losses) with respect to the logits [N, V]; overwrites the first of `tensors`."""
        exp_NV, sum_N, target_N, mine_N, counted_N = tensors
        scale_N = scale_N.masked_fill(~counted_N, 0.0)
        grad_NV = exp_NV.mul_((scale_N / sum_N).unsqueeze(-1))
        return grad_NV.scatter_add_(-1, target_N, (-scale_N).masked_fill(~mine_N, 0.0).unsqueeze(-1))


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: torch.Tensor, labels_N: torch.Tensor, axis: Axis, vocab_size: int) -> torch.Tensor:
        softmax = VocabParallelSoftmax(logits_NV, labels_N, axis, vocab_size)
        ctx.save_for_backward(*softmax.tensors)
        ctx.dtype = logits_NV.dtype
        return softmax.losses_N

    @staticmethod
    def backward(ctx: Any, grad_N: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return VocabParallelSoftmax.gradient(ctx.saved_tensors, grad_N).to(ctx.dtype), None, None, None


def vocab_parallel_cross_entropy(
    logits_NV: torch.Tensor, labels_N: torch.Tensor, axis: Axis, *, vocab_size: int
) -> torch.Tensor:
    """Loss of each token [N], in fp32 or wider, 0 where the label is IGNORE; equal on all ranks of `axis`.

    `logits_NV` are this rank's columns; those at and past `vocab_size` of the whole vocabulary are padding and count
    for nothing. Communicates the maxima, then the sums, over the axis.
    """
    return _VocabParallelCrossEntropy.apply(logits_NV, labels_N, axis, vocab_size)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """At least fp32: the type in which sums over many elements are taken."""
    return torch.promote_types(dtype, torch.float32)
