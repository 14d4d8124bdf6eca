"""Blockwise causal attention computes what the plain formula does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from workbench.models.blockwise import LONGEST, attend_blockwise, suits
from workbench.models.scoring import PLAIN, Scoring


def _inputs(batch: int, tokens: int, heads: int, num_kv: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(batch, tokens, count, 8) for count in (heads, num_kv, num_kv)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def _reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scoring: Scoring = PLAIN) -> torch.Tensor:
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for part in (k, v))
    if scoring == PLAIN:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    scores = q @ k.transpose(-1, -2) * (scoring.scale or q.shape[-1] ** -0.5)
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    tokens = torch.arange(q.shape[2])
    before = tokens[:, None] - tokens
    unseen = (before < 0) | (before >= (scoring.window or len(tokens)))
    return (scores.masked_fill(unseen, float("-inf")).softmax(dim=-1) @ v).transpose(1, 2)


@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "num_kv"), [(2, 128, 4, 2), (1, 130, 6, 1), (2, 257, 3, 3), (1, 5, 2, 1), (1, 1, 2, 2)]
)
@pytest.mark.parametrize(
    "scoring",
    [PLAIN, Scoring(window=1), Scoring(window=33), Scoring(window=128), Scoring(scale=0.5, window=70, softcap=2.0)],
)
def test_output_and_gradients_equal_the_plain_formula_in_float64(batch, tokens, heads, num_kv, scoring):
    parts = _inputs(batch, tokens, heads, num_kv, torch.float64)
    found, expected = attend_blockwise(*parts, scoring), _reference(*parts, scoring)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(expected.shape, dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad(found, parts, upstream), torch.autograd.grad(expected, parts, upstream), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_in_bfloat16_it_is_as_close_to_the_truth_as_the_fused_kernel_within_a_factor_of_two():
    parts = _inputs(2, 256, 4, 2, torch.bfloat16)
    truth = _reference(*(part.double() for part in parts))
    ours, fused = (
        (one.double() - truth).norm() / truth.norm() for one in (attend_blockwise(*parts), _reference(*parts))
    )
    assert ours < 2 * fused
    assert ours < 0.01


def test_only_lengths_at_which_it_is_faster_go_this_way():
    assert [suits(torch.empty(1, tokens, 2, 8)) for tokens in (1, LONGEST, LONGEST + 1)] == [True, True, False]
    assert not suits(torch.empty(1, 128, 2, 8, device="meta"))
