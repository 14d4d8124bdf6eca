"""Collectives that autograd knows: each pairs what happens forward with what happens backward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from workbench.parallel.axis import Axis


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


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return axis.all_reduce(tensor.contiguous().clone())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.axis.all_reduce(grad.contiguous().clone()), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, axis: Axis, dim: int) -> torch.Tensor:
        ctx.axis, ctx.dim = axis, dim
        return axis.all_gather(tensor, dim)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.axis.reduce_scatter(grad, ctx.dim), None, None


class _GatherCopies(_Gather):
    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grad.chunk(ctx.axis.size, dim=ctx.dim)[ctx.axis.rank], None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, axis: Axis, dim: int) -> torch.Tensor:
        ctx.axis, ctx.dim = axis, dim
        return axis.reduce_scatter(tensor, dim)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.axis.all_gather(grad, ctx.dim), None, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, axis: Axis, sent: Sequence[int], received: Sequence[int]) -> torch.Tensor:
        ctx.axis, ctx.sent, ctx.received = axis, sent, received
        return _exchange(rows, axis, sent, received)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _exchange(grad, ctx.axis, ctx.received, ctx.sent), None, None, None


def _exchange(rows: torch.Tensor, axis: Axis, sent: Sequence[int], received: Sequence[int]) -> torch.Tensor:
    width = math.prod(rows.shape[1:])
    pieces = [piece.reshape(-1) for piece in rows.split(list(sent))]
    arrived = torch.cat(list(axis.exchange(pieces, [count * width for count in received])))
    return arrived.view(-1, *rows.shape[1:])


def copy_to(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """`tensor`, which is equal on all ranks of `axis`; backward sums the gradients over the axis.

    It stands where a replicated activation enters a column-parallel layer (`f` in arXiv:1909.08053, sec. 3).
    """
    return tensor if axis.size == 1 else _Copy.apply(tensor, axis)


def reduce_from(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """The sum of `tensor` over `axis`; backward passes the gradient, equal on all ranks, through (`g`)."""
    return tensor if axis.size == 1 else _Reduce.apply(tensor, axis)


def sum_over(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """The sum of `tensor` over `axis`, from which each rank computes its part of the loss; backward sums as well."""
    return tensor if axis.size == 1 else _Sum.apply(tensor, axis)


def gather_from(tensor: torch.Tensor, axis: Axis, dim: int = 1) -> torch.Tensor:
    """The ranks' tensors in one, on `dim`; backward sums the gradients, of which each rank has part, and scatters."""
    return tensor if axis.size == 1 else _Gather.apply(tensor, axis, dim)


def gather_copies(tensor: torch.Tensor, axis: Axis, dim: int = 1) -> torch.Tensor:
    """Like `gather_from`, where all ranks go on to compute the same: backward takes this rank's share."""
    return tensor if axis.size == 1 else _GatherCopies.apply(tensor, axis, dim)


def scatter_to(tensor: torch.Tensor, axis: Axis, dim: int = 1) -> torch.Tensor:
    """This rank's share, on `dim`, of the sum of the ranks' tensors; backward gathers the gradients."""
    return tensor if axis.size == 1 else _Scatter.apply(tensor, axis, dim)


def exchange_rows(rows: torch.Tensor, axis: Axis, sent: Sequence[int], received: Sequence[int]) -> torch.Tensor:
    """The rows that each position of `axis` has for this one, in order of position, `received` of each.

    `rows` go out in that order, `sent` to each. Backward sends the gradients back.
    """
    return rows if axis.size == 1 else _Exchange.apply(rows, axis, sent, received)
