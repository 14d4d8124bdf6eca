"""Adapters as geometry: boxes of every rank make up each factor, and initial values do not know the layout."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.models import biased_model, gated_model, latent_model
from workbench.parallel.initial import uniform
from workbench.spec.geometry import Box, coverage_fault
from workbench.spec.layout import ParallelLayout
from workbench.spec.lora import (
    LoraSpec,
    adaptable_modules,
    adapter_specs,
    adapter_tensors,
    factor_names,
    projections,
    resolved_targets,
)
from workbench.spec.model import ModelConfig
from workbench.spec.schema import logical_tensors, parameter_specs
from workbench.spec.stored import stored_tensors

MODELS = [gated_model(num_labels=2), biased_model(), gated_model(num_key_value_heads=1)]
EVERY = [*MODELS, latent_model(), latent_model(None)]


@given(
    model=st.sampled_from(EVERY),
    layout=st.builds(ParallelLayout, tp=st.sampled_from([1, 2, 4]), pp=st.sampled_from([1, 2, 4])),
    r=st.integers(1, 7),
    data=st.data(),
)
def test_what_ranks_store_covers_every_factor_once_at_any_rank_and_layout(
    model: ModelConfig, layout: ParallelLayout, r: int, data: st.DataObject
) -> None:
    targets = data.draw(st.lists(st.sampled_from(projections(model)), min_size=1, unique=True))
    dora = data.draw(st.booleans()) and "embed_tokens" not in targets
    lora = LoraSpec(r=r, dora=dora, targets=tuple(targets), rank_pattern={targets[0]: r + 1})
    stored = stored_tensors(model, layout, adapter_specs(model, lora, layout))
    tensors = adapter_tensors(model, lora, "F32")
    assert set(stored) == set(tensors)
    for name, held in stored.items():
        assert coverage_fault(tensors[name].shape, held.boxes) is None


@pytest.mark.parametrize("model", MODELS, ids=["grouped", "biased", "one key head"])
@pytest.mark.parametrize("tp", [2, 4])
def test_a_factor_is_cut_like_its_base_or_whole_with_a_partial_gradient(model: ModelConfig, tp: int) -> None:
    weights = {
        shard.name: shard
        for spec in parameter_specs(model, ParallelLayout())
        for shard in spec.shards(tp, 1)
        if shard.name.endswith("_proj.weight")
    }
    factors = {
        shard.name: shard
        for spec in adapter_specs(model, LoraSpec(r=3), ParallelLayout(tp=tp))
        for shard in spec.shards(tp, 1)
    }
    for name, base in weights.items():
        a, b = (factors[factor] for factor in factor_names(name))
        row_parallel = name.split(".")[-2] in ("o_proj", "down_proj")
        cut, whole = (a, b) if row_parallel else (b, a)
        dim = 1 if row_parallel else 0
        assert (cut.box.offset[dim], cut.box.size[dim]) == (base.box.offset[dim], base.box.size[dim])
        assert (cut.copies, cut.partial_grad) == (base.copies, base.partial_grad)
        assert whole.box.offset == (0, 0) and whole.copies == tp and whole.partial_grad


def test_the_first_factor_is_drawn_whole_and_then_cut_so_its_spread_does_not_depend_on_tp() -> None:
    shape, bound = (8, 512), 1 / math.sqrt(512)
    whole = uniform("a", shape, Box.whole(shape), seed=1, bound=bound)
    parts = [uniform("a", shape, Box((0, at), (8, 128)), seed=1, bound=bound) for at in range(0, 512, 128)]
    assert torch.equal(torch.cat(parts, dim=1), whole)
    assert float(whole.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05) and float(whole.abs().max()) <= bound


def test_names_are_those_of_the_weights_with_the_factor_behind() -> None:
    found = adapter_tensors(gated_model(), LoraSpec(r=3, targets=("q_proj",)), "F32")
    assert list(found)[:2] == ["layers.0.self_attn.q_proj.lora_A.weight", "layers.0.self_attn.q_proj.lora_B.weight"]
    weights = logical_tensors(gated_model(), "F32")
    assert all(name.replace("lora_A.", "").replace("lora_B.", "") in weights for name in found)


def test_scaling_and_all_targets() -> None:
    assert LoraSpec(r=4, alpha=8).scaling == 2 and LoraSpec(r=4, alpha=8, rslora=True).scaling == 4
    leaves = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
    assert projections(biased_model()) == ("embed_tokens", *leaves, "lm_head")
    layers = [name for name in adaptable_modules(biased_model()) if name.startswith("layers.")]
    assert resolved_targets(biased_model(), LoraSpec()) == tuple(layers)
