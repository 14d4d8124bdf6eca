"""The three matrix products of a linear layer: of forward, for the gradient of its input and for that of its weight.

They are torch's own, but for fp32 on AMD processors with AVX-512. There torch asks MKL, which keeps its AVX-512 kernels
for Intel's processors; oneDNN, which torch carries as well, multiplies 1.6 to 2.2 times as fast (docs/performance.md).

Legend: N rows (all leading dimensions), I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

_LEAST = 1 << 20  # multiplications: below it oneDNN's call takes longer than MKL's product


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + b, differentiable; leading dimensions of x are kept."""
    if not _by_onednn(x, len(weight)):
        return F.linear(x, weight, bias)
    return _Product.apply(x, weight, bias)


def input_gradient(grad_NO: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What backward of `product` computes for the input [N, I]."""
    return _onednn(grad_NO, weight.t()) if _by_onednn(grad_NO, weight.shape[1]) else grad_NO @ weight


def weight_gradient(x_NI: torch.Tensor, grad_NO: torch.Tensor) -> torch.Tensor:
    """What backward of `product` computes for the weight [O, I], contiguous."""
    if not _by_onednn(x_NI, grad_NO.shape[1]):
        return grad_NO.t() @ x_NI
    # oneDNN copies its first matrix if that is transposed: the smaller of the two is put there.
    if grad_NO.shape[1] <= x_NI.shape[1]:
        return _onednn(grad_NO.t(), x_NI.t())
    return _onednn(x_NI.t(), grad_NO.t()).t().contiguous()


class _Product(torch.autograd.Function):
    """`product` by oneDNN, whose operator has no backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad_NO = grad.reshape(-1, grad.shape[-1])
        return (
            input_gradient(grad_NO, weight).view(x.shape) if needs_x else None,
            weight_gradient(x.reshape(-1, x.shape[-1]), grad_NO) if needs_weight else None,
            grad_NO.sum(dim=0) if needs_bias else None,
        )


def _by_onednn(x: torch.Tensor, outputs: int) -> bool:
    """Whether a product of x with a matrix that has so many outputs goes through oneDNN."""
    return _QUICKER and x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() * outputs >= _LEAST


def _multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _shape(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


# An operator of our own, because torch.compile takes the weights of torch's for constants.
torch.library.define("workbench::onednn_product", "(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor")
torch.library.impl("workbench::onednn_product", "CPU", _multiply)
torch.library.register_fake("workbench::onednn_product", _shape)
_onednn = torch.ops.workbench.onednn_product.default


def _quicker() -> bool:
    processor = torch.cpu.get_capabilities()
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and str(processor.get("cpu_name")).startswith("AMD")
        and bool(processor.get("avx512_f"))
    )


_QUICKER = _quicker()
