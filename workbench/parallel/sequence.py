"""Sequence parallelism: between the layers that are cut over tp, each tensor rank holds its share of the tokens.

What enters a column-parallel layer is gathered and what leaves a row-parallel one is reduced and scattered, in place of
the one all-reduce of both (arXiv:2205.05198, sec. 4.2.2). Shares are consecutive tokens.

Legend: B batch, T tokens, t this rank's share of them, I inputs, O outputs (local).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from workbench.parallel.axis import Axis
from workbench.parallel.collectives import copy_to, gather_from, reduce_from, scatter_to
from workbench.parallel.gemm import Gemm, WaitingProduct
from workbench.parallel.mesh import Mesh


def enter_cut(x_BtI: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """The input for `column_product`: summed gradients without sequence parallelism, which sums in the product."""
    return x_BtI if mesh.layout.sequence_parallel else copy_to(x_BtI, mesh.tp)


def whole_input(x_BtI: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """The input of all tokens for a product of cut outputs that computes its own gradients; sums them over tp."""
    return gather_from(x_BtI, mesh.tp) if mesh.layout.sequence_parallel else copy_to(x_BtI, mesh.tp)


def leave_cut(y_BTO: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """The sum of partial results over tp: whole, or this rank's tokens of it under sequence parallelism."""
    return scatter_to(y_BTO, mesh.tp) if mesh.layout.sequence_parallel else reduce_from(y_BTO, mesh.tp)


def column_product(
    gemm: Gemm, x_BtI: torch.Tensor, weight: nn.Parameter, bias: torch.Tensor | None, mesh: Mesh
) -> torch.Tensor:
    """x W^T + b [B, T, O] for all tokens, of an input that has gone through `enter_cut`."""
    if not mesh.layout.sequence_parallel:
        return gemm(x_BtI, weight, bias)
    if not gemm.computes_apart:
        return gemm(gather_from(x_BtI, mesh.tp), weight, bias)
    waits = gemm.waiting is not None and weight.requires_grad and torch.is_grad_enabled()
    cast = (weight.detach() if waits else weight).to(x_BtI.dtype)
    bias = None if bias is None else bias.to(x_BtI.dtype)
    return _GatheredProduct.apply(x_BtI, cast, bias, mesh.tp, gemm, weight if waits else None)


class _GatheredProduct(torch.autograd.Function):
    """The product of the gathered input. Only this rank's tokens are kept; backward gathers them again while it
    multiplies for the input's gradient, which is then scattered while it multiplies for the weight's."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BtI: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        axis: Axis,
        gemm: Gemm,
        waiting: nn.Parameter | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x_BtI, weight)
        ctx.axis, ctx.gemm, ctx.waiting = axis, gemm, waiting
        return gemm.product(axis.all_gather(x_BtI, dim=1), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_BTO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_BtI, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        needs_weight = needs_weight or ctx.waiting is not None
        gathering = ctx.axis.start_all_gather(x_BtI, dim=1) if needs_weight else None
        scattering = grad_weight = None
        grad_NO = grad_BTO.flatten(0, -2)
        if needs_x:
            grad_BTI = ctx.gemm.input_gradient(grad_NO, weight).unflatten(0, grad_BTO.shape[:-1])
            scattering = ctx.axis.start_reduce_scatter(grad_BTI, dim=1)
        if gathering is not None:
            x_NI = gathering.wait().flatten(0, -2)
            if ctx.waiting is None:
                grad_weight = ctx.gemm.weight_gradient(x_NI, grad_NO)
            else:
                ctx.gemm.waiting.append(WaitingProduct(ctx.gemm, ctx.waiting, x_NI, grad_NO))
        grad_bias = grad_BTO.sum(dim=(0, 1)) if needs_bias else None
        return None if scattering is None else scattering.wait(), grad_weight, grad_bias, None, None, None
