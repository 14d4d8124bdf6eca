"""Who multiplies in a linear layer, and when the gradient of its weight is computed.

A backward has two products: one for the gradient of the input, which earlier layers wait for, and one for the gradient
of the weight, which nobody waits for before the optimizer. Zero-bubble schedules compute them apart (arXiv:2401.10241).
Each product is computed once, whether split or not.

Legend: N rows (all leading dimensions), I inputs, O outputs, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from workbench.parallel.grouped import grouped_product, grouped_weight_gradient


@dataclass(frozen=True, slots=True)
class WaitingProduct:
    """The gradient of a weight that is still to be computed: from the layer's input and its output's gradient."""

    gemm: Gemm
    weight: nn.Parameter
    x_NI: torch.Tensor
    grad_NO: torch.Tensor
    sizes_E: torch.Tensor | None = None
    """The rows of each expert, where the weight is that of several, one below the other."""

    def add(self) -> None:
        """Computes the gradient and adds it to that of the weight."""
        if self.sizes_E is None:
            grad_OI = self.gemm.weight_gradient(self.x_NI, self.grad_NO).to(self.weight.dtype)
        else:
            grad_EOI = grouped_weight_gradient(self.x_NI, self.grad_NO, self.sizes_E)
            grad_OI = grad_EOI.flatten(0, 1).to(self.weight.dtype)
        if self.weight.grad is None:
            self.weight.grad = grad_OI
        else:
            self.weight.grad += grad_OI


class Gemm:
    """The products of linear layers in the type of their input.

    With `waiting`, backward leaves the gradients of weights there instead of computing them. computes_apart: whether
    `input_gradient` and `weight_gradient` are what backward of `product` computes.
    """

    computes_apart = True

    def __init__(self) -> None:
        self.waiting: list[WaitingProduct] | None = None

    def __call__(self, x: torch.Tensor, weight: nn.Parameter, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x W^T + b, all in the type of x; leading dimensions of x are kept."""
        if self.waiting is None or not (weight.requires_grad and torch.is_grad_enabled()):
            return self.product(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        y = self.product(x, weight.detach().to(x.dtype), None if bias is None else bias.to(x.dtype))
        return _Wait.apply(y, x, weight, self)

    def grouped(self, x_NI: torch.Tensor, weight: nn.Parameter, sizes_E: torch.Tensor) -> torch.Tensor:
        """x W_e^T for the rows of each expert e, which follow one another, `sizes_E` of each; in the type of x.

        `weight` [E * O, I] holds the experts' weights one below the other.
        """
        experts = len(sizes_E)
        if self.waiting is None or not (weight.requires_grad and torch.is_grad_enabled()):
            return grouped_product(x_NI, weight.to(x_NI.dtype).unflatten(0, (experts, -1)), sizes_E)
        y = grouped_product(x_NI, weight.detach().to(x_NI.dtype).unflatten(0, (experts, -1)), sizes_E)
        return _Wait.apply(y, x_NI, weight, self, sizes_E)

    def product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x W^T + b, differentiable."""
        return F.linear(x, weight, bias)

    def input_gradient(self, grad_NO: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """What backward of `product` computes for the input [N, I]."""
        return grad_NO @ weight

    def weight_gradient(self, x_NI: torch.Tensor, grad_NO: torch.Tensor) -> torch.Tensor:
        """What backward of `product` computes for the weight [O, I]."""
        return grad_NO.t() @ x_NI


class _Wait(torch.autograd.Function):
    """Passes the output of a linear layer through; backward notes what the gradient of the weight will need."""

    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        weight: nn.Parameter,
        gemm: Gemm,
        sizes_E: torch.Tensor | None = None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, sizes_E)
        ctx.weight, ctx.gemm = weight, gemm
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, sizes_E = ctx.saved_tensors
        assert ctx.gemm.waiting is not None
        # Detached, so that what waits holds the input alone and not the graph that made it.
        x_NI, grad_NO = x.detach().flatten(0, -2), grad.detach().flatten(0, -2)
        ctx.gemm.waiting.append(WaitingProduct(ctx.gemm, ctx.weight, x_NI, grad_NO, sizes_E))
        return grad, None, None, None, None


PLAIN = Gemm()
