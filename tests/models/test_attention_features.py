"""Windows, norms, caps and scales change nothing about parallelism: against one process, in float64; and decoding."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from pretrain.flops import flops_per_token
from tests.helpers.models import gated_model, post_norm_model, sliding_model
from tests.helpers.parity import Observed, assert_observed, exhaustive, perturb, train_three_steps
from tests.helpers.ranks import run_ranks
from workbench.models.attention import KeyValueCache
from workbench.models.batch import Batch
from workbench.models.build import build_stage, initialise
from workbench.models.decoder import DecoderStage
from workbench.parallel.mesh import Mesh
from workbench.spec.execution import StageOptions, te_faults
from workbench.spec.layout import ParallelLayout
from workbench.spec.model import ModelConfig

MODELS = {
    "sliding": sliding_model(),
    "sliding, dropout": sliding_model(attention_dropout=0.2, hidden_dropout=0.1),
    "post": post_norm_model(),
    "post, wide heads": post_norm_model(qk_norm="head", head_dim=12, attention_bias=True, num_key_value_heads=1),
}
SP: dict[str, Any] = {"sequence_parallel": True}
RING: dict[str, Any] = {"context": "ring"}
VEE: dict[str, Any] = {"pp": 2, "vpp": 2, "placement": "vee"}
FULL, SELECTIVE, CHUNKS = StageOptions(recompute="full"), StageOptions(recompute="selective"), 5
CASES: list[Any] = [
    ("sliding", {"tp": 2}, "gpipe", True, FULL),
    ("sliding", VEE, "zbv", True, StageOptions(loss_chunk_tokens=CHUNKS)),
    ("sliding", {"cp": 2}, "gpipe", True, SELECTIVE),
    ("sliding, dropout", {"cp": 2}, "gpipe", False, StageOptions()),
    ("sliding", {"cp": 2, **RING}, "gpipe", True, StageOptions()),
    ("post", {"tp": 2}, "gpipe", False, FULL),
    ("post", {"tp": 2, **VEE, **SP}, "zbv", False, StageOptions()),
    ("post, wide heads", {"tp": 2, "cp": 2, **SP}, "gpipe", True, FULL),
    *exhaustive(
        ("sliding", {"tp": 4, **SP}, "gpipe", True, SELECTIVE),
        ("sliding", {"tp": 2, **SP}, "gpipe", False, StageOptions(loss_chunk_tokens=CHUNKS)),
        ("sliding", {"dp": 2, "shard": "zero3"}, "gpipe", False, FULL),
        ("post", {"tp": 4, **SP}, "gpipe", True, StageOptions()),
        ("post", {"tp": 2, "cp": 2, **RING}, "gpipe", False, SELECTIVE),
        ("post", {"tp": 2, "dp": 2, "shard": "zero3"}, "gpipe", True, StageOptions()),
    ),
]


@cache
def _reference(name: str, documents: bool) -> Observed:
    return train_three_steps(MODELS[name], ParallelLayout(), "gpipe", 4, documents)


@pytest.mark.parametrize(("name", "degrees", "schedule", "documents", "options"), CASES, ids=str)
def test_three_steps_equal_one_process(
    name: str, degrees: dict[str, Any], schedule: str, documents: bool, options: StageOptions
) -> None:
    layout = ParallelLayout(**degrees)
    observed = run_ranks(layout.world_size, train_three_steps, MODELS[name], layout, schedule, 1, documents, options)
    assert_observed(observed, _reference(name, documents))


@pytest.mark.parametrize("name", ["sliding", "post", "post, wide heads"])
def test_decoding_with_a_cache_equals_a_whole_forward_pass(name: str) -> None:
    stage = _stage(MODELS[name])
    ids = torch.randint(0, 101, (2, 23), generator=torch.Generator().manual_seed(3))
    cache, found = KeyValueCache(), []
    with torch.inference_mode():
        whole = stage(None, Batch(ids), "logits")
        for piece in ids.split([7, 1, 1, 6, 1, 1, 1, 5], dim=1):
            found.append(stage(None, Batch(piece), "logits", cache))
    torch.testing.assert_close(torch.cat(found, dim=1), whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "change",
    [
        {"sliding_window": 6},
        {"sliding_window": 4},
        {"layer_types": ("full_attention", "sliding_attention", "sliding_attention", "sliding_attention")},
        {"rope_local_theta": None},
        {"rope_theta": 10.0},
        {"norm_unit_offset": False},
        {"scale_embeddings": False},
        {"query_pre_attn_scalar": None},
        {"attn_logit_softcapping": None},
        {"final_logit_softcapping": None},
    ],
    ids=str,
)
def test_each_feature_shows_in_the_logits(change: dict[str, Any]) -> None:
    ids = torch.arange(3, 15).unsqueeze(0)
    with_it, without = (_stage(sliding_model(**changes)) for changes in ({}, change))
    without.load_state_dict(with_it.state_dict())
    with torch.inference_mode():
        one, other = (stage(None, Batch(ids), "logits") for stage in (with_it, without))
    assert float((one - other).abs().max()) > 1e-3


def test_a_window_is_counted_in_the_work_of_attention() -> None:
    whole, slid = gated_model(), gated_model(sliding_window=16)
    assert flops_per_token(whole, 16) == flops_per_token(slid, 16)
    assert flops_per_token(whole, 64) - flops_per_token(slid, 64) == 6 * 4 * 2 * (64 - 16) * 32


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layer_types": ("full_attention",)}, "layer_types has 1 entries, but num_hidden_layers=4"),
        ({"layer_types": ("full_attention",) * 4}, "no layer that slides, but sliding_window=5"),
        ({"sliding_window": None}, "layers that slide, but sliding_window=None"),
        ({"norm": "layernorm"}, "qk_norm is for norm='rmsnorm', not 'layernorm'"),
        ({"position_embedding": "learned"}, "rope_local_theta=10.0 is for rotary positions, but"),
    ],
    ids=str,
)
def test_features_that_contradict_each_other_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sliding_model(**change)


def test_transformer_engine_is_refused_what_its_attention_is_not_told() -> None:
    faults = te_faults(StageOptions(backend="te"), sliding_model(), ParallelLayout())
    named = {fault.split("model.")[1].split(":")[0] for fault in faults}
    assert named == {"sliding_window=5", "query_pre_attn_scalar=5", "attn_logit_softcapping=1.5"}


def _stage(model: ModelConfig) -> DecoderStage:
    built = build_stage(model, Mesh.single(), dtype=torch.float64)
    initialise(built.parameters, model, seed=7)
    perturb(built.parameters)
    return built.module
