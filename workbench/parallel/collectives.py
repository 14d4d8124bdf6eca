"""Collectives that autograd knows: each pairs what happens forward with what happens backward."""

from __future__ import annotations

from typing import Any

import torch

from workbench.parallel.mesh import Axis


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.axis.all_reduce(grad.contiguous().clone()), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
        return axis.all_reduce(tensor.contiguous().clone())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


def copy_to(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """`tensor`, which is equal on all ranks of `axis`; backward sums the gradients over the axis.

    It stands where a replicated activation enters a column-parallel layer (`f` in arXiv:1909.08053, sec. 3).
    """
    return tensor if axis.size == 1 else _Copy.apply(tensor, axis)


def reduce_from(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """The sum of `tensor` over `axis`; backward passes the gradient, equal on all ranks, through (`g`)."""
    return tensor if axis.size == 1 else _Reduce.apply(tensor, axis)
