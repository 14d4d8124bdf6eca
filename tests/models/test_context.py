"""Attention over the context axis computes what the plain formula does, and its work is shared evenly."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.ranks import run_ranks
from workbench.models.attend import attend
from workbench.models.context import attend_in_context
from workbench.models.ring import _merge, _weights, pieces
from workbench.models.scoring import PLAIN, Scoring
from workbench.parallel.context import context_tokens
from workbench.parallel.mesh import Mesh
from workbench.spec.layout import ContextMethod, ParallelLayout

sizes = st.integers(2, 6)


@given(size=sizes, chunk=st.integers(1, 5))
def test_every_token_has_one_context_rank(size: int, chunk: int) -> None:
    length = 2 * size * chunk
    found = torch.cat([context_tokens(length, size, rank) for rank in range(size)])
    assert sorted(found.tolist()) == list(range(length))


@given(size=sizes, chunk=st.integers(1, 5))
def test_every_context_rank_has_the_same_share_of_the_causal_triangle(size: int, chunk: int) -> None:
    length = 2 * size * chunk
    work = {int((context_tokens(length, size, rank) + 1).sum()) for rank in range(size)}
    assert work == {length * (length + 1) // 2 // size}


@given(size=sizes, chunk=st.integers(1, 7), longest=st.integers(1, 4), window=st.none() | st.integers(1, 99))
def test_the_pieces_of_a_ring_hold_every_visible_pair_once_and_are_as_many_on_each_rank(
    size: int, chunk: int, longest: int, window: int | None
) -> None:
    length, counts = 2 * size * chunk, []
    seen = torch.zeros(length, length, dtype=torch.int64)
    for rank in range(size):
        mine, found = context_tokens(length, size, rank), 0
        for source in range(size):
            theirs = context_tokens(length, size, source)
            for piece in pieces(size, rank, source, 2 * chunk, longest, Scoring(window=window)):
                queries, keys = mine[piece.queries], theirs[piece.keys]
                assert queries.tolist() == list(range(piece.first_query, piece.first_query + len(queries)))
                assert keys.tolist() == list(range(piece.first_key, piece.first_key + len(keys)))
                visible = (keys <= queries[:, None]).long()
                if window is not None:
                    visible *= keys > queries[:, None] - window
                assert piece.masked or visible.all()
                seen[queries[:, None], keys] += visible
                found += visible.numel()
        counts.append(found)
    everything = torch.ones(length, length, dtype=torch.int64).tril()
    assert torch.equal(seen, everything if window is None else everything.triu(1 - window))
    assert window is not None or len(set(counts)) == 1


@pytest.mark.parametrize("context", ["all_gather", "ring"])
@pytest.mark.parametrize(
    ("size", "length", "kv_heads", "masked", "scoring"),
    [
        (2, 8, 2, False, PLAIN),
        (2, 28, 1, True, PLAIN),
        (4, 16, 2, True, PLAIN),
        (4, 40, 4, True, PLAIN),
        (2, 4200, 1, True, PLAIN),
        (2, 8, 2, False, Scoring(window=3)),
        (2, 28, 1, True, Scoring(scale=0.7, window=9, softcap=1.5)),
        (4, 40, 4, False, Scoring(window=1, softcap=0.5)),
        (2, 4200, 1, False, Scoring(window=700)),
    ],
)
def test_outputs_and_gradients_equal_the_plain_formula(
    context: ContextMethod, size: int, length: int, kv_heads: int, masked: bool, scoring: Scoring
) -> None:
    parts, documents = _inputs(length, kv_heads, masked)
    expected = _with_gradients(_plain(*parts, documents, scoring), parts)
    for found in run_ranks(size, _in_context, size, context, length, kv_heads, masked, scoring):
        for one, (tokens, part) in zip(expected, found, strict=True):
            torch.testing.assert_close(part, one[:, tokens], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("scoring", [PLAIN, Scoring(window=5), Scoring(scale=0.7, window=4, softcap=1.5)])
@pytest.mark.parametrize(("tokens", "kv_heads"), [(6, 2), (150, 1), (2100, 1)])
def test_one_rank_keeps_documents_apart(tokens: int, kv_heads: int, scoring: Scoring) -> None:
    parts, documents = _inputs(tokens, kv_heads, masked=True)
    for one, other in zip(
        _with_gradients(attend(*parts, documents, None, scoring), parts),
        _with_gradients(_plain(*parts, documents, scoring), parts),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_a_query_that_sees_nothing_yet_gives_zero_and_then_what_it_sees() -> None:
    out, lse = torch.zeros(3, 2), torch.full((3,), float("-inf"))
    scores = torch.tensor([[float("-inf")] * 4, [0.0, 1.0, float("-inf"), 2.0], [float("-inf")] * 4])
    nothing = torch.full((3,), float("-inf"))
    assert not _weights(torch.full((3, 4), float("-inf")), nothing).any()
    _merge(out, lse, torch.zeros(3, 2), nothing)
    assert not out.any() and torch.equal(lse, nothing)
    found_lse = scores.logsumexp(dim=-1)
    values = torch.arange(8.0).view(4, 2)
    for _ in range(2):  # seen twice, each counts half
        _merge(out, lse, _weights(scores, found_lse) @ values, found_lse)
    torch.testing.assert_close(out[1], scores[1].softmax(dim=-1) @ values)
    assert not out[0].any() and not out[2].any() and lse[0] == float("-inf")


def _inputs(length: int, kv_heads: int, masked: bool) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Queries, keys and values, and random documents."""
    generator = torch.Generator().manual_seed(length + kv_heads)
    shapes = [(2, length, heads, 6) for heads in (4, kv_heads, kv_heads)] if length < 1000 else [(1, length, 1, 4)] * 3
    parts = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    begins = torch.rand(shapes[0][:2], generator=generator) < 0.2
    return parts, begins.long().cumsum(dim=1) if masked else None


def _plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: torch.Tensor | None, scoring: Scoring
) -> torch.Tensor:
    groups = q.shape[2] // k.shape[2]
    k, v = (part.repeat_interleave(groups, dim=2) for part in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) * (scoring.scale or 1 / math.sqrt(q.shape[-1]))
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    tokens = torch.arange(q.shape[1])
    mask = tokens <= tokens[:, None]
    if scoring.window is not None:
        mask &= tokens[:, None] - tokens < scoring.window
    if documents is not None:
        mask = mask & (documents[:, None, :, None] == documents[:, None, None, :])
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(~mask, float("-inf")).softmax(dim=-1), v)


def _with_gradients(out: torch.Tensor, parts: list[torch.Tensor], tokens: torch.Tensor | None = None) -> list:
    """The output and the gradients of the parts, of a loss that tells every element of the row apart."""
    rows = torch.arange(out.shape[1]) if tokens is None else tokens
    upstream = torch.sin(1.0 + rows)[None, :, None, None] * torch.linspace(1, 2, out.shape[-1], dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, parts, upstream.expand_as(out))]


def _in_context(
    size: int, context: ContextMethod, length: int, kv_heads: int, masked: bool, scoring: Scoring
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """This rank's tokens, with output and gradients for them."""
    mesh = Mesh.create(ParallelLayout(cp=size, context=context), torch.device("cpu"))
    whole, documents = _inputs(length, kv_heads, masked)
    tokens = context_tokens(length, size, mesh.cp.rank)
    parts = [part.detach()[:, tokens].requires_grad_() for part in whole]
    out = attend_in_context(parts[0], parts[1], parts[2], documents, None, mesh, scoring)
    return [(tokens, found) for found in _with_gradients(out, parts, tokens)]
