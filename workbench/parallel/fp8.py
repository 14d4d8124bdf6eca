"""The products of linear layers in fp8 with dynamic scaling, on torch._scaled_mm.

As the float8 recipes of torchao (torchao/float8/config.py): activations and weights in e4m3; the gradients of outputs
in e5m2 with one scale a tensor ("tensorwise"), in e4m3 with one scale a row ("rowwise"). A scale maps the largest
element to the largest number of the format. It is taken of what this rank holds: under tensor parallelism every shard
has a scale of its own, which is at least as fine as one for the whole tensor, and communicates nothing.

Legend: N rows (all leading dimensions), I inputs, O outputs; M, N, K sizes of a product.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F

from workbench.parallel.gemm import Gemm

Scaling = Literal["tensorwise", "rowwise"]
_SMALLEST = 1e-12  # as in torchao: the scale of a tensor of zeros stays finite
_MULTIPLE = 16  # of the contracted size, for torch._scaled_mm on a GPU


class Fp8Gemm(Gemm):
    """All three products in fp8, their results in the type of the input; what is kept for backward is not rounded."""

    def __init__(self, scaling: Scaling) -> None:
        super().__init__()
        self.rowwise = scaling == "rowwise"
        self.grad_format = torch.float8_e4m3fn if self.rowwise else torch.float8_e5m2

    def product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y = _Fp8Product.apply(x, weight, self)
        return y if bias is None else y + bias

    def input_gradient(self, grad_NO: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self._multiply(grad_NO, self.grad_format, weight.t())

    def weight_gradient(self, x_NI: torch.Tensor, grad_NO: torch.Tensor) -> torch.Tensor:
        padding = -len(x_NI) % _MULTIPLE
        if padding:
            x_NI, grad_NO = (F.pad(part, (0, 0, 0, padding)) for part in (x_NI, grad_NO))
        return self._multiply(grad_NO.t(), self.grad_format, x_NI.t())

    def forward_product(self, x_NI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
        """x W^T [N, O], not differentiable."""
        return self._multiply(x_NI, torch.float8_e4m3fn, weight_OI, fast=True)

    def _multiply(
        self, a_MK: torch.Tensor, a_format: torch.dtype, b_NK: torch.Tensor, *, fast: bool = False
    ) -> torch.Tensor:
        """a b^T in the type of a; b is always e4m3. fast: may accumulate in less than fp32, as torchao allows here."""
        a, a_scale = quantise(a_MK, a_format, rowwise=self.rowwise)
        b, b_scale = quantise(b_NK, torch.float8_e4m3fn, rowwise=self.rowwise)
        return torch._scaled_mm(
            a,
            b.t(),
            scale_a=a_scale,
            scale_b=b_scale.t(),
            out_dtype=a_MK.dtype,
            use_fast_accum=fast or self.rowwise,
        )


def quantise(x_MK: torch.Tensor, format: torch.dtype, *, rowwise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """`x` in an fp8 format, rows contiguous, and the fp32 scales [M, 1] or [1, 1] by which it is to be multiplied."""
    largest = torch.finfo(format).max
    amax = x_MK.abs().amax(dim=1, keepdim=True) if rowwise else x_MK.abs().max().view(1, 1)
    scale = largest / amax.float().clamp(min=_SMALLEST)
    scaled = (x_MK.float() * scale).clamp(-largest, largest)
    return scaled.to(format).contiguous(), scale.reciprocal()


class _Fp8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, gemm: Fp8Gemm) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.gemm = gemm
        return gemm.forward_product(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad_NO = grad.flatten(0, -2)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = ctx.gemm.input_gradient(grad_NO, weight).view(x.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = ctx.gemm.weight_gradient(x.flatten(0, -2), grad_NO)
        return grad_x, grad_weight, None
