"""Products that were quickened are still fp32, and processors that would round them are left alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from workbench.parallel import host_products
from workbench.parallel.host_products import keeps_fp32, quicken_products

EPYC = {"cpu_name": "AMD EPYC", "avx512_f": True, "amx_tile": False}


@pytest.fixture(autouse=True)
def precision_comes_back() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def as_on(monkeypatch: pytest.MonkeyPatch, **processor: object) -> str:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: EPYC | processor)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    quicken_products()
    return torch.get_float32_matmul_precision()


@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(2048, 512, 1408), (511, 129, 97), (8, 64, 64), (1, 512, 9)])
def test_a_linear_layer_and_its_gradients_are_fp32s(tokens: int, inputs: int, outputs: int) -> None:
    quicken_products()  # whatever this processor is
    generator = torch.Generator().manual_seed(1)
    shapes = ((tokens, inputs), (outputs, inputs), (outputs,))
    leaves = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    grad = torch.randn(tokens, outputs, generator=generator)
    y, exact = F.linear(*leaves), F.linear(*wide)
    y.backward(grad)
    exact.backward(grad.double())
    for ours, theirs in [(y, exact), *((one.grad, other.grad) for one, other in zip(leaves, wide, strict=True))]:
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_where_bf16_shows_the_permission_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply = torch.Tensor.__matmul__

    def rounded(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return multiply(a.bfloat16().float() if a.dtype == torch.float32 else a, b)

    assert keeps_fp32()
    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    assert not keeps_fp32()
    assert as_on(monkeypatch) == "highest"


@pytest.mark.parametrize("other", [{"cpu_name": "Intel Xeon"}, {"avx512_f": False}, {"amx_tile": True}])
def test_other_processors_keep_what_they_have(other: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    assert as_on(monkeypatch, **other) == "highest"


def test_it_is_done_where_it_was_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_products, "keeps_fp32", lambda: True)
    assert as_on(monkeypatch) == "medium"
