"""A model whose tokens see all others is the same at every layout: padding, segments, both heads, in float64."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from pretrain.schedules import schedule_named
from tests.helpers.models import masked_model
from tests.helpers.parity import Observed, assert_observed, exhaustive, train_three_steps
from tests.helpers.ranks import run_ranks
from workbench.models.batch import Batch
from workbench.models.build import build_stage, initialise
from workbench.models.decoder import DecoderStage
from workbench.parallel.mesh import Mesh
from workbench.spec.execution import StageOptions
from workbench.spec.layout import ParallelLayout

SP: dict[str, Any] = {"sequence_parallel": True}
RING: dict[str, Any] = {"context": "ring"}
MODELS = {
    "tied": masked_model(),
    "untied": masked_model(tie_word_embeddings=False, next_sentence=False, pooler=False),
    "dropout": masked_model(embed_dropout=0.1, attention_dropout=0.2, hidden_dropout=0.3, mlp_dropout=0.25),
}
SAVING = StageOptions(recompute="full", loss_chunk_tokens=5)


@cache
def _reference(name: str, documents: bool = False) -> Observed:
    return train_three_steps(MODELS[name], ParallelLayout(), "gpipe", 4, documents)


@pytest.mark.parametrize(
    ("name", "degrees", "schedule", "options"),
    [
        ("tied", {"tp": 2}, "1f1b", None),
        ("tied", {"tp": 2, **SP}, "1f1b", SAVING),
        ("tied", {"cp": 2, **RING}, "1f1b", SAVING),
        ("tied", {"dp": 2, "shard": "zero3"}, "1f1b", SAVING),
        ("tied", {"pp": 2}, "zb_h1", None),
        ("tied", {"pp": 2, "vpp": 2}, "dualpipev", None),
        ("dropout", {"tp": 2, "cp": 2, **SP}, "1f1b", None),
        ("dropout", {"pp": 2}, "1f1b", None),
        *exhaustive(
            ("untied", {"tp": 2, "pp": 2, **SP}, "1f1b", None),
            ("tied", {"cp": 2}, "1f1b", None),
            ("untied", {"tp": 2, "cp": 2, **SP, **RING}, "1f1b", None),
            ("tied", {"pp": 2, "dp": 2, "shard": "zero2"}, "1f1b", None),
            ("tied", {"pp": 2}, "gpipe", StageOptions(recompute="selective")),
            ("tied", {"pp": 2, "vpp": 2}, "interleaved", None),
            ("untied", {"pp": 2, "vpp": 2}, "interleaved_zb", SAVING),
            ("tied", {"pp": 2, "vpp": 2}, "zbv", None),
        ),
    ],
    ids=str,
)
def test_three_steps_at_any_layout_equal_one_process(
    name: str, degrees: dict[str, Any], schedule: str, options: StageOptions | None
) -> None:
    layout = ParallelLayout.model_validate({**degrees, "placement": schedule_named(schedule).placement})
    observed = run_ranks(layout.world_size, train_three_steps, MODELS[name], layout, schedule, 1, False, options)
    assert_observed(observed, _reference(name))


@pytest.mark.parametrize("degrees", [{"cp": 2}, {"cp": 2, **RING}, {"tp": 2, **SP}], ids=str)
def test_packed_documents_equal_one_process(degrees: dict[str, Any]) -> None:
    layout = ParallelLayout.model_validate(degrees)
    observed = run_ranks(layout.world_size, train_three_steps, MODELS["tied"], layout, "1f1b", 1, True)
    assert_observed(observed, _reference("tied", documents=True))


def test_padding_is_not_seen_and_sees_no_emptiness() -> None:
    stage = _stage()
    ids = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 0, 0], [5, 6, 7, 1, 2]])
    padded = stage(None, Batch(ids, lengths=torch.tensor([5, 3, 3])), "logits")
    alone = stage(None, Batch(ids[1:2, :3]), "logits")
    assert torch.isfinite(padded).all()
    for row in (1, 2):
        torch.testing.assert_close(padded[row, :3], alone[0], rtol=1e-12, atol=1e-12)
    pairs = stage(None, Batch(ids, lengths=torch.tensor([5, 3, 3])), "pair_logits")
    torch.testing.assert_close(pairs[1], pairs[2], rtol=1e-12, atol=1e-12)


def test_a_token_sees_those_after_it() -> None:
    stage = _stage()
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
    first, second = stage(None, Batch(ids), "logits")
    assert ((first - second).abs().amax(dim=-1) > 1e-6).all()


def _stage() -> DecoderStage:
    model = MODELS["tied"]
    built = build_stage(model, Mesh.single(), dtype=torch.float64)
    initialise(built.parameters, model, seed=3)
    return built.module.eval().requires_grad_(False)
