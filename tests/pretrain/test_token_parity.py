"""Sharing the tokens of a row changes nothing: sequence and context parallelism against one process, in float64."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from tests.helpers.models import biased_model, gated_model
from tests.helpers.parity import DOCUMENTS, POSITIONS, Observed, assert_observed, train_three_steps
from tests.helpers.ranks import run_ranks
from workbench.models.batch import Batch
from workbench.models.build import build_stage, initialise
from workbench.models.decoder import Output
from workbench.parallel.loss import IGNORE
from workbench.parallel.mesh import Mesh
from workbench.spec.layout import ParallelLayout
from workbench.spec.model import ModelConfig

DROPOUT = {"embed_dropout": 0.1, "attention_dropout": 0.2, "hidden_dropout": 0.3}
MODELS = {
    "gated": gated_model(),
    "gated, tied": gated_model(tie_word_embeddings=True),
    "biased": biased_model(),
    "biased, tied": biased_model(tie_word_embeddings=True),
    "gated, dropout": gated_model(**DROPOUT),
    "biased, dropout": biased_model(tie_word_embeddings=True, **DROPOUT),
}
SP: dict[str, Any] = {"sequence_parallel": True}
RING: dict[str, Any] = {"context": "ring"}
# What the parity matrix (tests/parity) leaves out: dropout, KV heads with copies, and all of it at once.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("biased", {"tp": 4, **SP}),
    ("biased, dropout", {"tp": 2, **SP}),
    ("biased, dropout", {"cp": 2}),
    ("gated, dropout", {"tp": 2, "cp": 2, **SP}),
    ("gated, tied", {"tp": 2, "cp": 2, **SP, **RING}),
]
DOCUMENT_CASES: list[tuple[str, dict[str, Any]]] = [("biased", {"tp": 2, "cp": 2, **SP})]


@cache
def _reference(name: str, documents: bool) -> Observed:
    return train_three_steps(MODELS[name], ParallelLayout(), "gpipe", 4, documents)


@pytest.mark.parametrize(("name", "degrees"), CASES, ids=str)
def test_three_steps_with_shared_tokens_equal_one_process(name: str, degrees: dict[str, Any]) -> None:
    _check(name, degrees, documents=False)


@pytest.mark.parametrize(("name", "degrees"), DOCUMENT_CASES, ids=str)
def test_three_steps_over_packed_documents_equal_one_process(name: str, degrees: dict[str, Any]) -> None:
    _check(name, degrees, documents=True)


@pytest.mark.parametrize("degrees", [{"tp": 2, **SP}, {"cp": 2}, {"tp": 2, "cp": 2, **SP, **RING}], ids=str)
@pytest.mark.parametrize("num_labels", [0, 3])
def test_logits_and_losses_come_back_whole_and_in_token_order(degrees: dict[str, Any], num_labels: int) -> None:
    model, layout = gated_model(num_labels=num_labels), ParallelLayout(**degrees)
    for output in ("logits", "token_losses"):
        expected = _output(model, ParallelLayout(), output)
        for found in run_ranks(layout.world_size, _output, model, layout, output):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_the_loss_of_packed_documents_is_the_sum_of_their_losses_alone() -> None:
    for model in (gated_model(), biased_model()):
        built = build_stage(model, Mesh.single(), dtype=torch.float64)
        initialise(built.parameters, model, seed=7)
        ids, labels = _rows(model)
        packed = built.module(None, Batch(ids, labels, positions=POSITIONS, documents=DOCUMENTS), "loss")
        alone = sum(
            built.module(None, Batch(ids[row][here][None], labels[row][here][None]), "loss")
            for row in range(len(ids))
            for number in DOCUMENTS[row].unique()
            for here in [DOCUMENTS[row] == number]
        )
        torch.testing.assert_close(packed, alone, rtol=1e-12, atol=0)


@pytest.mark.parametrize("context", ["all_gather", "ring"])
@pytest.mark.parametrize("num_labels", [0, 3])
def test_a_context_rank_without_labels_adds_nothing_and_no_rank_divides_by_its_own_count(
    context: str, num_labels: int
) -> None:
    model = gated_model(num_labels=num_labels)
    layout = ParallelLayout.model_validate({"cp": 2, "context": context})
    first, second = run_ranks(2, _partial, model, layout)
    assert first == pytest.approx(_partial(model, ParallelLayout()), rel=1e-12)
    assert second == 0.0


def _partial(model: ModelConfig, layout: ParallelLayout) -> float:
    """This rank's loss where only the first tokens of rows are labelled, or are the last there are."""
    built = build_stage(model, Mesh.create(layout, torch.device("cpu")), dtype=torch.float64)
    initialise(built.parameters, model, seed=7)
    ids, labels = _rows(model)
    labels[:, 3:] = IGNORE
    lengths = torch.full((len(ids),), 2)
    loss = built.module(None, Batch(ids, ids[:, 0] % num if (num := model.num_labels) else labels, lengths), "loss")
    loss.backward()
    assert all(parameter.require_grad().isfinite().all() for parameter in built.parameters)
    return float(loss.detach())


def _check(name: str, degrees: dict[str, Any], *, documents: bool) -> None:
    layout = ParallelLayout(**degrees)
    seen = run_ranks(layout.world_size, train_three_steps, MODELS[name], layout, "1f1b", 1, documents)
    assert_observed(seen, _reference(name, documents))


def _output(model: ModelConfig, layout: ParallelLayout, output: Output) -> torch.Tensor:
    """What a forward of ragged rows gives on this rank."""
    built = build_stage(model, Mesh.create(layout, torch.device("cpu")), dtype=torch.float64)
    initialise(built.parameters, model, seed=7)
    ids, labels = _rows(model)
    lengths = torch.tensor([12, 1, 7, 10])
    batch = Batch(ids, ids[:, 0] % model.num_labels if model.num_labels else labels, lengths)
    with torch.no_grad():
        return built.module(None, batch, output)


def _rows(model: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, model.vocab_size, DOCUMENTS.shape, generator=torch.Generator().manual_seed(3))
    return ids, ids.roll(1, dims=1)
