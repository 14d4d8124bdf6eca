"""An encoder with a decoder is the same at every layout, in float64."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from pretrain.schedules import schedule_named
from tests.helpers.models import answering_model
from tests.helpers.parity import Observed, assert_observed, exhaustive, train_three_steps
from tests.helpers.ranks import run_ranks
from workbench.errors import LayoutError
from workbench.models.batch import Batch
from workbench.models.build import build_stage, initialise
from workbench.parallel.mesh import Mesh
from workbench.spec.execution import StageOptions
from workbench.spec.layout import ParallelLayout

SP: dict[str, Any] = {"sequence_parallel": True}
MODELS = {
    "tied": answering_model(),
    "untied": answering_model(tie_word_embeddings=False, gated_mlp=False, hidden_act="relu", logit_scale=1.0),
    "dropout": answering_model(
        embed_dropout=0.1, attention_dropout=0.2, hidden_dropout=0.3, mlp_dropout=0.25, final_dropout=0.15
    ),
}
SAVING = StageOptions(recompute="full", loss_chunk_tokens=5)


@cache
def _reference(name: str) -> Observed:
    return train_three_steps(MODELS[name], ParallelLayout(), "gpipe", 4)


@pytest.mark.parametrize(
    ("name", "degrees", "schedule", "options"),
    [
        ("tied", {"tp": 2}, "1f1b", None),
        ("untied", {"tp": 2, **SP}, "1f1b", SAVING),
        ("tied", {"pp": 2}, "1f1b", None),
        ("untied", {"pp": 2, "pp_layout": (3, 1)}, "1f1b", StageOptions(recompute="selective")),
        ("tied", {"pp": 2, "vpp": 2}, "interleaved", SAVING),
        ("tied", {"pp": 2, "vpp": 2}, "dualpipev", None),
        ("tied", {"dp": 2, "shard": "zero3"}, "1f1b", SAVING),
        ("dropout", {"tp": 2, "pp": 2, **SP}, "1f1b", None),
        *exhaustive(
            ("tied", {"pp": 4}, "gpipe", None),
            ("tied", {"tp": 2, "pp": 2, **SP}, "1f1b", None),
            ("tied", {"pp": 2}, "zb_h1", None),
            ("untied", {"pp": 2, "vpp": 2}, "interleaved_zb", None),
            ("tied", {"pp": 2, "vpp": 2}, "zbv", None),
            ("tied", {"pp": 2, "dp": 2, "shard": "zero2"}, "1f1b", None),
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


def test_padding_of_the_encoder_is_not_seen_and_the_decoder_sees_no_future() -> None:
    model = MODELS["tied"]
    built = build_stage(model, Mesh.single(), dtype=torch.float64)
    initialise(built.parameters, model, seed=3)
    stage = built.module.eval().requires_grad_(False)
    ids, answers = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 1, 2]]), torch.tensor([[3, 4, 5], [3, 4, 6]])
    padded = stage(None, Batch(ids, lengths=torch.tensor([5, 3]), decoder_ids=answers), "logits")
    alone = stage(None, Batch(ids[1:, :3], decoder_ids=answers[1:]), "logits")
    torch.testing.assert_close(padded[1], alone[0], rtol=1e-12, atol=1e-12)
    other = stage(None, Batch(ids, decoder_ids=answers.flip(0)), "logits")
    whole = stage(None, Batch(ids, decoder_ids=answers), "logits")
    torch.testing.assert_close(other[:, :2], whole[:, :2], rtol=1e-12, atol=1e-12)
    assert (other[:, 2] - whole[:, 2]).abs().max() > 1e-6


def test_context_parallelism_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"cp=2 with num_encoder_layers=2: .* use cp = 1"):
        ParallelLayout(cp=2).validate_for(MODELS["tied"])
