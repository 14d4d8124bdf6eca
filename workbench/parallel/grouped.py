"""Products of many weights, each with some of the rows: torch's grouped GEMM where it has one, else one after another.

Legend: N rows, in order of their experts, E experts, I inputs, O outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

_ALIGNED_BYTES = 16  # of each row, for a grouped GEMM (torch, aten/src/ATen/native/GroupedMMUtils.h)


def grouped_product(x_NI: torch.Tensor, weight_EOI: torch.Tensor, sizes_E: torch.Tensor) -> torch.Tensor:
    """x W_e^T [N, O] for the `sizes_E` rows of each expert; differentiable."""
    if has_grouped_gemm(x_NI, weight_EOI):
        return F.grouped_mm(x_NI.contiguous(), weight_EOI.transpose(1, 2), offs=_ends(sizes_E))
    rows = x_NI.split(sizes_E.tolist())
    return torch.cat([F.linear(x, weight) for x, weight in zip(rows, weight_EOI.unbind(), strict=True)])


def grouped_weight_gradient(x_NI: torch.Tensor, grad_NO: torch.Tensor, sizes_E: torch.Tensor) -> torch.Tensor:
    """What backward of `grouped_product` computes for the weights [E, O, I]."""
    if has_grouped_gemm(x_NI, grad_NO):
        return F.grouped_mm(grad_NO.contiguous().t(), x_NI.contiguous(), offs=_ends(sizes_E))
    sizes = sizes_E.tolist()
    return torch.stack([grad.t() @ x for x, grad in zip(x_NI.split(sizes), grad_NO.split(sizes), strict=True)])


def has_grouped_gemm(*operands: torch.Tensor) -> bool:
    """Whether one kernel multiplies all groups: in bf16 on a GPU, of rows that it can load."""
    return all(
        x.is_cuda and x.dtype == torch.bfloat16 and x.shape[-1] * x.element_size() % _ALIGNED_BYTES == 0
        for x in operands
    )


def _ends(sizes_E: torch.Tensor) -> torch.Tensor:
    return sizes_E.cumsum(0).to(torch.int32)
