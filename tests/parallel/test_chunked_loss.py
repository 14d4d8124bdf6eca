"""The loss in chunks of tokens against the loss of all logits at once: equal in float64, and never as large."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers.allocations import Allocations
from tests.helpers.models import gated_model
from tests.helpers.ranks import run_ranks
from workbench.models.batch import Batch
from workbench.models.build import BuiltStage, build_stage, initialise
from workbench.parallel.chunked_loss import Chunking, chunked_loss, chunked_token_losses
from workbench.parallel.collectives import copy_to
from workbench.parallel.loss import IGNORE
from workbench.parallel.mesh import Mesh
from workbench.spec.execution import StageOptions
from workbench.spec.layout import ParallelLayout

VOCAB, HIDDEN, TOKENS, PADDED = 10, 6, 7, 16
SCALE = 0.25


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(("chunk", "smoothing"), [(1, 0.0), (3, 0.1), (7, 0.0), (100, 0.0)])
def test_loss_and_gradients_equal_those_of_the_whole_vocabulary(tp: int, chunk: int, smoothing: float) -> None:
    hidden, weight, labels = _case()
    hidden.requires_grad_()
    weight.requires_grad_()
    logits = hidden @ weight.t()
    losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE, label_smoothing=smoothing)
    (losses.sum() * SCALE).backward()
    assert hidden.grad is not None and weight.grad is not None
    for rank, (total, each, grad_hidden, grad_weight) in enumerate(run_ranks(tp, _local, tp, chunk, smoothing)):
        torch.testing.assert_close(total, losses.sum().detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(each, losses.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grad_hidden, hidden.grad, rtol=1e-12, atol=1e-12)
        mine = weight.grad[rank * PADDED // tp : (rank + 1) * PADDED // tp]
        torch.testing.assert_close(grad_weight[: len(mine)], mine, rtol=1e-12, atol=1e-12)
        assert not grad_weight[len(mine) :].any(), "padding must have no gradient"


@pytest.mark.parametrize("chunk", [0, 3])
def test_losses_of_tp_1_and_tp_2_are_equal_when_tp_does_not_divide_the_vocabulary(chunk: int) -> None:
    (alone,) = run_ranks(1, _stage_loss, 1, chunk)
    for loss in run_ranks(2, _stage_loss, 2, chunk):
        assert loss == pytest.approx(alone, rel=1e-12)


@pytest.mark.parametrize("chunk", [0, 3])
@pytest.mark.parametrize("tp", [1, 2])
def test_a_model_that_knows_nothing_loses_log_vocab_and_not_log_tp_more(tp: int, chunk: int) -> None:
    for loss in run_ranks(tp, _uniform_loss, tp, chunk):
        assert loss == pytest.approx(TOKENS * math.log(VOCAB), rel=1e-12)


@pytest.mark.parametrize("chunk", [0, 3])
@pytest.mark.parametrize("tp", [1, 2])
def test_a_microbatch_without_labels_costs_nothing_and_moves_nothing(tp: int, chunk: int) -> None:
    for loss, largest in run_ranks(tp, _ignored_step, tp, chunk):
        assert (loss, largest) == (0.0, 0.0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("output", ["loss", "token_losses"])
def test_no_tensor_holds_all_logits(tied: bool, output: Any) -> None:
    model = gated_model(tie_word_embeddings=tied, vocab_size=2000, num_hidden_layers=1)
    ids = torch.randint(0, 2000, (8, 32), generator=torch.Generator().manual_seed(1))
    largest = {}
    for chunk in (0, 16):
        built = _built(model, chunk)
        with Allocations() as seen:
            built.module(None, Batch(ids, ids), output).sum().backward()
        largest[chunk] = seen.largest
    assert largest[0] >= ids.numel() * 2000
    # The gradient of the weight, 2000 x 32, or a chunk of logits, 16 x 2000.
    assert largest[16] == 2000 * model.hidden_size < ids.numel() * 2000 / 4


def test_no_product_of_the_head_runs_twice() -> None:
    hidden, weight, labels = _case()
    counter = FlopCounterMode(display=False)
    with counter:
        chunked_loss(hidden.requires_grad_(), weight.requires_grad_(), None, labels, _how(1, 2)).backward()
    assert counter.get_total_flops() == 3 * 2 * TOKENS * HIDDEN * VOCAB


def test_a_frozen_head_has_no_gradient_and_no_product_for_it() -> None:
    hidden, weight, labels = _case()
    counter = FlopCounterMode(display=False)
    with counter:
        chunked_loss(hidden.requires_grad_(), weight, None, labels, _how(1, 2)).backward()
    assert hidden.grad is not None and weight.grad is None
    assert counter.get_total_flops() == 2 * 2 * TOKENS * HIDDEN * VOCAB


def test_bfloat16_gradients_of_the_weight_are_summed_in_float32() -> None:
    """Against fp64 on the same rounded inputs: 2^-8 for logits and 2^-8 for their gradient, each rounded to bf16."""
    hidden, weight, labels = (part.repeat(64, 1) if part.dim() > 1 else part.repeat(64) for part in _case())
    weight = weight[:VOCAB].float().requires_grad_()
    narrow = hidden.to(torch.bfloat16).requires_grad_()
    loss = chunked_loss(narrow, weight, None, labels, _how(1, 5))
    loss.backward()
    wide = weight.detach().to(torch.bfloat16).double().requires_grad_()
    expected = F.cross_entropy(narrow.detach().double() @ wide.t(), labels, reduction="sum", ignore_index=IGNORE)
    expected.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=2**-7)
    assert weight.grad is not None and wide.grad is not None and weight.grad.dtype == torch.float32
    assert (weight.grad - wide.grad).norm() < 2**-7 * wide.grad.norm()


def _case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, HIDDEN, dtype=torch.float64, generator=generator)
    weight = 3 * torch.randn(VOCAB, HIDDEN, dtype=torch.float64, generator=generator)
    return hidden, weight, torch.tensor([0, 9, IGNORE, 4, 8, 5, IGNORE])


def _how(tp: int, chunk: int) -> Chunking:
    return Chunking(Mesh.single().tp if tp == 1 else _mesh(tp).tp, VOCAB, chunk)


def _mesh(tp: int) -> Mesh:
    return Mesh.create(ParallelLayout(tp=tp), torch.device("cpu"))


def _local(tp: int, chunk: int, smoothing: float) -> tuple[torch.Tensor, ...]:
    mesh = _mesh(tp)
    hidden, weight, labels = _case()
    padded = F.pad(weight, (0, 0, 0, PADDED - VOCAB), value=50.0)
    local = padded.chunk(tp)[mesh.tp.rank].clone().requires_grad_()
    hidden.requires_grad_()
    how = Chunking(mesh.tp, VOCAB, chunk, smoothing=smoothing)
    total = chunked_loss(copy_to(hidden, mesh.tp), local, None, labels, how)
    (total * SCALE).backward()
    assert hidden.grad is not None and local.grad is not None
    each = chunked_token_losses(hidden.detach(), local.detach(), None, labels, how)
    return total.detach(), each, hidden.grad, local.grad


def _built(model: Any, chunk: int, tp: int = 1, dtype: torch.dtype = torch.float32) -> BuiltStage:
    mesh = Mesh.single() if tp == 1 else _mesh(tp)
    built = build_stage(model, mesh, dtype=dtype, options=StageOptions(loss_chunk_tokens=chunk))
    initialise(built.parameters, model, seed=1)
    return built


def _small(tp: int, chunk: int) -> BuiltStage:
    model = gated_model(vocab_size=VOCAB, num_hidden_layers=1, initializer_range=0.5)
    return _built(model, chunk, tp, torch.float64)


def _stage_loss(tp: int, chunk: int) -> float:
    ids = torch.arange(TOKENS).view(1, -1)
    return _small(tp, chunk).module(None, Batch(ids, ids.flip(1))).item()


def _uniform_loss(tp: int, chunk: int) -> float:
    built = _small(tp, chunk)
    with torch.no_grad():
        built.module.lm_head.weight.zero_()
    ids = torch.arange(TOKENS).view(1, -1)
    return built.module(None, Batch(ids, ids)).item()


def _ignored_step(tp: int, chunk: int) -> tuple[float, float]:
    built = _small(tp, chunk)
    ids = torch.arange(TOKENS).view(1, -1)
    loss = built.module(None, Batch(ids, torch.full_like(ids, IGNORE)))
    loss.backward()
    return loss.item(), max(float(parameter.require_grad().abs().max()) for parameter in built.parameters)
