"""The loss of a vocabulary head without the logits of all tokens: they are made and used up a chunk at a time.

The gradients with respect to hidden states and weight are computed with the losses, while a chunk's logits are there,
so no product runs twice (arXiv:2410.10989, sec. 3.2). Backward only scales them. The price: from forward to backward
the weight's gradient is kept, [V, D] in fp32 or wider. Where each token's loss has a gradient of its own, which forward
cannot know, backward makes the logits of a chunk once more.

Legend: N tokens, C tokens of a chunk, D hidden, V vocabulary (local, padded).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from workbench.parallel.axis import Axis
from workbench.parallel.loss import (
    VocabParallelSoftmax,
    accumulation_dtype,
    losses_and_gradient,
    vocab_parallel_cross_entropy,
)
from workbench.parallel.softcap import soft_cap, through_soft_cap


@dataclass(frozen=True)
class Chunking:
    """How a head's loss is computed: over which axis its vocabulary is cut, its true size, tokens at a time (0: all),
    what its logits are capped at, the share of each label that is spread over the vocabulary, and whether what follows
    the logits is compiled where the vocabulary is not cut."""

    axis: Axis
    vocab_size: int
    tokens: int
    softcap: float | None = None
    smoothing: float = 0.0
    compiled: bool = False

    def softmax(
        self, hidden_CD: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels_C: torch.Tensor
    ) -> tuple[VocabParallelSoftmax, torch.Tensor]:
        """The losses of a chunk, and its logits."""
        logits_CV = soft_cap(F.linear(hidden_CD, weight, bias), self.softcap)
        return VocabParallelSoftmax(logits_CV, labels_C, self.axis, self.vocab_size, self.smoothing), logits_CV

    def losses_and_gradient(
        self, hidden_CD: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels_C: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The losses of a chunk [C], and the gradient of their sum for the product with the weight [C, V]."""
        if self.compiled and self.axis.size == 1:
            logits_CV = F.linear(hidden_CD, weight, bias)
            return _compiled()(logits_CV, labels_C, self.vocab_size, self.softcap, self.smoothing)
        softmax, logits_CV = self.softmax(hidden_CD, weight, bias, labels_C)
        ones_C = torch.ones_like(softmax.losses_N)
        grad_CV = VocabParallelSoftmax.gradient(softmax.tensors, ones_C, softmax.smoothed)
        return softmax.losses_N, through_soft_cap(grad_CV, logits_CV, self.softcap).to(weight.dtype)

    def losses(
        self, hidden_CD: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels_C: torch.Tensor
    ) -> torch.Tensor:
        """The losses of a chunk [C], through which autograd finds its way back."""
        logits_CV = soft_cap(F.linear(hidden_CD, weight, bias), self.softcap)
        return vocab_parallel_cross_entropy(
            logits_CV, labels_C, self.axis, vocab_size=self.vocab_size, smoothing=self.smoothing
        )


def chunked_loss(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    labels_N: torch.Tensor,
    how: Chunking,
) -> torch.Tensor:
    """The summed loss of all labels, a scalar in fp32 or wider, equal on all ranks of the axis.

    The gradient of `hidden_ND` is this rank's part, to be summed over the axis. Communicates twice a chunk.
    """
    if not torch.is_grad_enabled():
        return chunked_token_losses(hidden_ND, weight_VD, bias_V, labels_N, how).sum()
    return _ChunkedLoss.apply(hidden_ND, weight_VD, bias_V, labels_N, how)


def chunked_token_losses(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    labels_N: torch.Tensor,
    how: Chunking,
) -> torch.Tensor:
    """The loss of each label [N], 0 where ignored. The gradient of `hidden_ND` is this rank's part, as above."""
    weight, bias = _cast(weight_VD, bias_V, hidden_ND.dtype)
    pairs = zip(hidden_ND.split(how.tokens), labels_N.split(how.tokens), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([how.softmax(hidden_CD, weight, bias, labels_C)[0].losses_N for hidden_CD, labels_C in pairs])
    keep = {"use_reentrant": False, "preserve_rng_state": False}
    return torch.cat(
        [checkpoint(how.losses, hidden_CD, weight, bias, labels_C, **keep) for hidden_CD, labels_C in pairs]
    )


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        labels_N: torch.Tensor,
        how: Chunking,
    ) -> torch.Tensor:
        wide = accumulation_dtype(hidden_ND.dtype)
        weight, bias = _cast(weight_VD, bias_V, hidden_ND.dtype)
        wants_hidden, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        grad_ND = torch.empty_like(hidden_ND) if wants_hidden else None
        grad_VD: torch.Tensor | None = None
        grad_V = weight.new_zeros(len(weight), dtype=wide) if wants_bias else None
        total = torch.zeros((), dtype=wide, device=hidden_ND.device)
        tokens = how.tokens or max(len(labels_N), 1)
        # Also without any label there is one chunk, so that the gradients are zeros.
        for start in range(0, max(len(labels_N), 1), tokens):
            rows = slice(start, start + tokens)
            hidden_CD = hidden_ND[rows]
            losses_C, grad_CV = how.losses_and_gradient(hidden_CD, weight, bias, labels_N[rows])
            total += losses_C.sum()
            if grad_ND is not None:
                torch.mm(grad_CV, weight, out=grad_ND[rows])
            if wants_weight and grad_VD is None:
                grad_VD = (grad_CV.t() @ hidden_CD).to(wide)
            elif grad_VD is not None and grad_VD.dtype == weight.dtype:
                torch.addmm(grad_VD, grad_CV.t(), hidden_CD, out=grad_VD)
            elif grad_VD is not None:
                grad_VD += grad_CV.t() @ hidden_CD
            if grad_V is not None:
                grad_V += grad_CV.sum(dim=0, dtype=wide)
        ctx.save_for_backward(grad_ND, grad_VD, grad_V)
        ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_ND, *of_head = (None if saved is None else saved.mul_(grad) for saved in ctx.saved_tensors)
        grad_VD, grad_V = (None if saved is None else saved.to(ctx.weight_dtype) for saved in of_head)
        return grad_ND, grad_VD, grad_V, None, None


@cache
def _compiled() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    return torch.compile(losses_and_gradient)


def _cast(
    weight_VD: torch.Tensor, bias_V: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    return weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)
