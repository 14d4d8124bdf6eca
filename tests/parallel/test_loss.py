"""Vocabulary-parallel cross-entropy against torch's own on the whole vocabulary, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.ranks import run_ranks
from workbench.parallel.loss import IGNORE, losses_and_gradient, vocab_parallel_cross_entropy
from workbench.parallel.mesh import Mesh
from workbench.parallel.softcap import soft_cap
from workbench.spec.layout import ParallelLayout

VOCAB, TOKENS = 10, 6


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize(("tp", "rows"), [(1, 10), (1, 16), (2, 8), (4, 4)])
def test_loss_and_gradient_equal_cross_entropy_of_the_whole_vocabulary(tp: int, rows: int, smoothing: float) -> None:
    """With tp=4 and 4 rows a rank, the third rank is half padding and the fourth all of it."""
    logits, labels = _case()
    logits.requires_grad_()
    expected = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE, label_smoothing=smoothing)
    (expected * _weights()).sum().backward()
    assert logits.grad is not None
    for rank, (losses, gradient) in enumerate(run_ranks(tp, _local_loss, tp, rows, smoothing)):
        torch.testing.assert_close(losses, expected.detach(), rtol=1e-12, atol=1e-12)
        mine = logits.grad[:, rank * rows : (rank + 1) * rows]
        torch.testing.assert_close(gradient[:, : mine.shape[1]], mine, rtol=1e-12, atol=1e-12)
        assert not gradient[:, mine.shape[1] :].any(), "padding must have no gradient"


@pytest.mark.parametrize("softcap", [None, 15.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("rows", [10, 16])
def test_what_is_written_to_be_compiled_gives_the_same(rows: int, smoothing: float, softcap: float | None) -> None:
    logits, labels = _case()
    logits.requires_grad_()
    capped = soft_cap(logits, softcap)
    expected = F.cross_entropy(capped, labels, reduction="none", ignore_index=IGNORE, label_smoothing=smoothing)
    expected.sum().backward()
    assert logits.grad is not None
    padded = F.pad(logits.detach(), (0, rows - VOCAB), value=99.0)
    losses, gradient = losses_and_gradient(padded, labels, VOCAB, softcap, smoothing)
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient[:, :VOCAB], logits.grad, rtol=1e-12, atol=1e-12)
    assert not gradient[:, VOCAB:].any(), "padding must have no gradient"


def test_loss_of_bfloat16_logits_is_taken_in_float32() -> None:
    logits, labels = _case()
    narrow = logits.to(torch.bfloat16)
    losses = vocab_parallel_cross_entropy(narrow, labels, Mesh.single().tp, vocab_size=VOCAB)
    expected = F.cross_entropy(narrow.float(), labels, reduction="none", ignore_index=IGNORE)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected)


def _case() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = 20 * torch.randn(TOKENS, VOCAB, dtype=torch.float64, generator=generator)
    labels = torch.tensor([0, 9, IGNORE, 4, 8, 5])
    return logits, labels


def _weights() -> torch.Tensor:
    return torch.linspace(0.5, 2.0, TOKENS, dtype=torch.float64)


def _local_loss(tp: int, rows: int, smoothing: float) -> tuple[torch.Tensor, torch.Tensor]:
    mesh = Mesh.create(ParallelLayout(tp=tp), torch.device("cpu"))
    logits, labels = _case()
    padded = F.pad(logits, (0, tp * rows - VOCAB), value=1e4)
    local = padded[:, mesh.tp.rank * rows : (mesh.tp.rank + 1) * rows].clone().requires_grad_()
    losses = vocab_parallel_cross_entropy(local, labels, mesh.tp, vocab_size=VOCAB, smoothing=smoothing)
    (losses * _weights()).sum().backward()
    assert local.grad is not None
    return losses.detach(), local.grad
