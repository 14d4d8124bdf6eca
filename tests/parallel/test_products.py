"""The products of linear layers by oneDNN: equal to float64, whatever lies how in memory, compiled or not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from workbench.parallel import products
from workbench.parallel.products import input_gradient, product, weight_gradient

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
"""Sums of at most 200 products of normal numbers: fp32 keeps them to 1e-5."""


@pytest.fixture(autouse=True)
def on_any_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_QUICKER", True)


def through_autograd(multiply, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, grad: torch.Tensor):
    leaves = [None if part is None else part.detach().clone().requires_grad_() for part in (x, weight, bias)]
    y = multiply(*leaves)
    y.backward(grad.to(y.dtype))
    return [y.detach()] + [leaf.grad for leaf in leaves if leaf is not None]


@pytest.mark.parametrize("outputs", [97, 300])
@pytest.mark.parametrize("biased", [False, True])
def test_product_and_gradients_are_those_of_float64(outputs: int, biased: bool, monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 70, 129, generator=generator)
    weight = torch.randn(outputs, 129, generator=generator)
    bias = torch.randn(outputs, generator=generator) if biased else None
    grad = torch.randn(3, 70, outputs, generator=generator)
    calls = []
    monkeypatch.setattr(products, "_onednn", lambda *given: calls.append(1) or _ONEDNN(*given))
    found = through_autograd(product, x, weight, bias, grad)
    assert len(calls) == 3, "all three products are oneDNN's"
    wide = [None if part is None else part.double() for part in (x, weight, bias)]
    for ours, theirs in zip(found, through_autograd(F.linear, *wide, grad), strict=True):
        torch.testing.assert_close(ours, theirs.float(), **CLOSE)
        assert ours.is_contiguous()


_ONEDNN = products._onednn


def test_products_of_transposed_and_cut_matrices():
    generator = torch.Generator().manual_seed(2)
    x_NI = torch.randn(130, 400, generator=generator).t()[:, 1:]
    grad_NO = torch.randn(400, 200, generator=generator)[:, ::2]
    weight = torch.randn(129, 100, generator=generator).t()
    torch.testing.assert_close(product(x_NI, weight), (x_NI.double() @ weight.double().t()).float(), **CLOSE)
    torch.testing.assert_close(input_gradient(grad_NO, weight), (grad_NO.double() @ weight.double()).float(), **CLOSE)
    torch.testing.assert_close(
        weight_gradient(x_NI, grad_NO), (grad_NO.double().t() @ x_NI.double()).float(), rtol=1e-4, atol=2e-4
    )


def test_what_is_small_or_no_fp32_is_left_to_torch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(products, "_onednn", None)
    product(torch.randn(8, 64), torch.randn(64, 64))
    for dtype in (torch.float64, torch.bfloat16):
        product(torch.randn(128, 128, dtype=dtype), torch.randn(128, 128, dtype=dtype))


def test_product_compiles_with_changing_weights():
    compiled = torch.compile(product, fullgraph=True)
    generator = torch.Generator().manual_seed(3)
    grad = torch.randn(2, 64, 120, generator=generator)
    for _ in range(2):
        x, weight = torch.randn(2, 64, 140, generator=generator), torch.randn(120, 140, generator=generator)
        for ours, eager in zip(
            through_autograd(compiled, x, weight, None, grad),
            through_autograd(product, x, weight, None, grad),
            strict=True,
        ):
            torch.testing.assert_close(ours, eager, **CLOSE)
