"""fp8 products: exactly the rounded operands multiplied in fp32, and so near the true product as rounding allows.

e4m3 has 3 bits of mantissa, so rounding moves an element by at most 2^-4 of itself, e5m2 (2 bits) by 2^-3; elements
below the smallest normal number move by at most half the smallest step.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.helpers.models import gated_model
from tests.helpers.ranks import run_ranks
from workbench.models.batch import Batch
from workbench.models.build import build_stage, initialise
from workbench.parallel.fp8 import Fp8Gemm, Scaling
from workbench.parallel.gradients import complete_gradients
from workbench.parallel.mesh import Mesh
from workbench.spec.execution import StageOptions, fp8_size_faults
from workbench.spec.layout import ParallelLayout

SCALINGS: tuple[Scaling, ...] = ("tensorwise", "rowwise")
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
ROUNDING = {E4M3: 2**-4, E5M2: 2**-3}
HALF_STEP = {E4M3: 2**-10, E5M2: 2**-17}
ROWS, INPUTS, OUTPUTS = 24, 64, 48  # 24 rows: the gradient of the weight is padded to 32


@pytest.mark.parametrize("scaling", SCALINGS)
def test_all_three_products_are_those_of_rounded_operands(scaling: Scaling) -> None:
    x, weight, grad = _operands()
    y, grad_x, grad_weight = _products(scaling, x, weight, grad)
    format = _grad_format(scaling)
    for found, a, b in (
        (y, _rounded(x, E4M3, scaling), _rounded(weight, E4M3, scaling)),
        (grad_x, _rounded(grad, format, scaling), _rounded(weight.t(), E4M3, scaling)),
        (grad_weight, _rounded(grad.t(), format, scaling), _rounded(x.t(), E4M3, scaling)),
    ):
        expected = a @ b.t()
        # fp32 sums of up to 64 terms: relative to the sum of their sizes, not to what is left of it.
        assert ((found - expected).abs() <= 64 * 2**-24 * (a.abs() @ b.t().abs())).all()


@pytest.mark.parametrize("scaling", SCALINGS)
def test_products_err_by_no_more_than_the_rounding_of_their_operands(scaling: Scaling) -> None:
    x, weight, grad = _operands()
    y, grad_x, grad_weight = _products(scaling, x, weight, grad)
    format = _grad_format(scaling)
    for found, (a, a_format), b in (
        (y, (x, E4M3), weight),
        (grad_x, (grad, format), weight.t()),
        (grad_weight, (grad.t(), format), x.t()),
    ):
        a_error, b_error = _largest_error(a, a_format, scaling), _largest_error(b, E4M3, scaling)
        limit = a_error @ b.t().abs() + a.abs() @ b_error.t() + a_error @ b_error.t()
        true = a @ b.t()
        assert ((found - true).abs() <= limit).all()
        # Roundings that lie evenly within their limits have 1 / sqrt(3) of them as their spread, and are independent.
        spread = math.hypot(ROUNDING[a_format], ROUNDING[E4M3]) / math.sqrt(3)
        assert (found - true).norm() < spread * true.norm()


@pytest.mark.parametrize("scaling", SCALINGS)
def test_the_gradient_of_a_waiting_weight_is_the_same_bit_for_bit(scaling: Scaling) -> None:
    x, weight, grad = _operands()
    _, expected_x, expected = _products(scaling, x, weight, grad)
    gemm, parameter = Fp8Gemm(scaling), torch.nn.Parameter(weight)
    gemm.waiting = []
    x = x.clone().requires_grad_()
    gemm(x, parameter).backward(grad)
    assert parameter.grad is None and torch.equal(x.grad, expected_x)
    for product in gemm.waiting:
        product.add()
    assert torch.equal(parameter.grad, expected)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_zeros_stay_zeros(scaling: Scaling) -> None:
    zeros = torch.zeros(16, 32, requires_grad=True)
    weight = torch.nn.Parameter(torch.zeros(16, 32))
    Fp8Gemm(scaling)(zeros, weight).sum().backward()
    assert not zeros.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("linear", ["fp8_tensorwise", "fp8_rowwise"])
@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"tp": 2, "sequence_parallel": True}], ids=str)
def test_a_small_model_learns_as_in_fp32(linear: str, layout: dict[str, Any]) -> None:
    """Within 2 % of the way that fp32 comes down in 30 steps: rounding is noise of 5 % in each gradient, without bias,
    and AdamW divides by its size."""
    expected = _learn("compute", {}, torch.float32)
    assert expected[-1] < 0.3 * expected[0]
    for losses in run_ranks(layout.get("tp", 1), _learn, linear, layout, torch.bfloat16):
        assert losses[0] == pytest.approx(expected[0], rel=0.01)
        assert abs(losses[-1] - expected[-1]) < 0.02 * (expected[0] - expected[-1])


def test_layers_that_fp8_cannot_multiply_are_named_with_their_sizes() -> None:
    options = StageOptions(linear="fp8_rowwise")
    fitting = gated_model(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)
    assert fp8_size_faults(options, fitting, ParallelLayout(tp=2)) == []
    assert fp8_size_faults(StageOptions(), gated_model(), ParallelLayout(tp=4)) == []
    (fault,) = fp8_size_faults(options, fitting, ParallelLayout(tp=4))
    assert fault.startswith("precision.linear='fp8_rowwise' multiplies matrices whose sizes are multiples of 16")
    assert "on each of tp=4 ranks layers.*.mlp.down_proj 64 x 24 are not" in fault
    (fault,) = fp8_size_faults(StageOptions(linear="te:mxfp8"), fitting, ParallelLayout(tp=2))
    assert "multiples of 32" in fault and "layers.*.mlp.down_proj 64 x 48" in fault


def _operands() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(ROWS, INPUTS, generator=generator) * torch.logspace(-2, 1, ROWS).unsqueeze(1)
    weight = torch.randn(OUTPUTS, INPUTS, generator=generator) / 8
    return x, weight, 1e-3 * torch.randn(ROWS, OUTPUTS, generator=generator)


def _products(
    scaling: Scaling, x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, parameter = x.clone().requires_grad_(), torch.nn.Parameter(weight)
    y = Fp8Gemm(scaling)(x.view(2, ROWS // 2, INPUTS), parameter)
    y.backward(grad.view(2, ROWS // 2, OUTPUTS))
    assert x.grad is not None and parameter.grad is not None
    return y.detach().flatten(0, 1), x.grad, parameter.grad


def _grad_format(scaling: Scaling) -> torch.dtype:
    return E5M2 if scaling == "tensorwise" else E4M3


def _scale(x: torch.Tensor, format: torch.dtype, scaling: Scaling) -> torch.Tensor:
    largest = x.abs().amax(dim=1, keepdim=True) if scaling == "rowwise" else x.abs().max()
    return LARGEST[format] / largest


def _rounded(x: torch.Tensor, format: torch.dtype, scaling: Scaling) -> torch.Tensor:
    scale = _scale(x, format, scaling)
    return (x * scale).clamp(-LARGEST[format], LARGEST[format]).to(format).float() / scale


def _largest_error(x: torch.Tensor, format: torch.dtype, scaling: Scaling) -> torch.Tensor:
    return torch.maximum(ROUNDING[format] * x.abs(), HALF_STEP[format] / _scale(x, format, scaling))


def _learn(linear: str, layout: dict[str, Any], dtype: torch.dtype) -> list[float]:
    """Losses of thirty AdamW steps on the same two rows."""
    model = gated_model(hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    mesh = Mesh.create(ParallelLayout(**layout), torch.device("cpu"))
    options = StageOptions(linear=linear)
    built = build_stage(model, mesh, compute_dtype=dtype, options=options)
    initialise(built.parameters, model, seed=4)
    ids = torch.randint(0, model.vocab_size, (2, 33), generator=torch.Generator().manual_seed(1))
    adamw = torch.optim.AdamW(built.module.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = built.module(None, Batch(ids[:, :-1], ids[:, 1:])) / 64
        loss.backward()
        complete_gradients(built.parameters, mesh)
        adamw.step()
        adamw.zero_grad()
        losses.append(loss.item())
    return losses
