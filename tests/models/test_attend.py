"""Heads that share a key and value read them in place or repeated: the same numbers."""

from __future__ import annotations

import pytest
import torch

from workbench.models import attend as module
from workbench.models.attend import attend


@pytest.mark.parametrize("looking", [1, 13, 40])
def test_shared_heads_give_what_repeated_ones_give(monkeypatch: pytest.MonkeyPatch, looking: int) -> None:
    found = []
    for shares in (False, True):
        monkeypatch.setattr(module, "shares_heads", lambda *_, shares=shares: shares)
        generator = torch.Generator().manual_seed(1)
        q, k, v = (
            torch.randn(2, tokens, heads, 8, generator=generator, dtype=torch.float64).requires_grad_()
            for tokens, heads in ((looking, 6), (40, 2), (40, 2))
        )
        out = attend(q, k, v)
        out.square().sum().backward()
        found.append((out, q.grad, k.grad, v.grad))
    for repeated, shared in zip(*found, strict=True):
        torch.testing.assert_close(shared, repeated, rtol=1e-12, atol=1e-12)


def test_a_cpu_repeats_heads_because_its_fused_kernel_wants_them() -> None:
    q, k = torch.zeros(1, 4, 8, 16), torch.zeros(1, 2, 8, 16)
    assert not module.shares_heads(q, k, k)
