"""Sequence parallelism: what the gathered product keeps, and that its parts are those of a plain product."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.models import biased_model, gated_model
from tests.helpers.parity import boxes_of
from tests.helpers.ranks import run_ranks
from workbench.models.batch import Batch
from workbench.models.build import StageOptions, build_stage, initialise
from workbench.parallel.gradients import complete_gradients
from workbench.parallel.mesh import Mesh
from workbench.spec.layout import ParallelLayout
from workbench.spec.model import ModelConfig
from workbench.spec.schema import parameter_specs

LAYOUT = ParallelLayout(tp=2, sequence_parallel=True)


@pytest.mark.parametrize("model", [gated_model(), biased_model(tie_word_embeddings=True)])
def test_products_that_wait_give_the_gradients_of_those_that_do_not(model: ModelConfig) -> None:
    for at_once, waiting in run_ranks(2, _both_ways, model):
        for (name, _, one), (_, _, other) in zip(at_once, waiting, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12, msg=name)


def test_between_the_cut_layers_each_rank_keeps_its_tokens_only() -> None:
    assert run_ranks(2, _kept_tokens, gated_model()) == [{6}, {6}]


def test_gradients_of_what_acts_between_the_cut_layers_are_partial_and_no_others() -> None:
    model = biased_model()
    specs = {spec.path: spec for spec in parameter_specs(model, LAYOUT)}
    partial = {path for path, spec in specs.items() if any(part.partial_grad for part in spec.parts)}
    expected = {"norm.weight", "norm.bias", "embed_positions.weight"}
    for layer in range(model.num_hidden_layers):
        norms = ("input_layernorm.weight", "input_layernorm.bias")
        norms += ("post_attention_layernorm.weight", "post_attention_layernorm.bias")
        for name in (*norms, "self_attn.o_proj.bias", "mlp.down_proj.bias"):
            expected.add(f"layers.{layer}.{name}")
    assert partial == expected
    assert not any(part.partial_grad for spec in parameter_specs(model, ParallelLayout(tp=2)) for part in spec.parts)


def _both_ways(model: ModelConfig) -> tuple:
    return _gradients(model, split=False), _gradients(model, split=True)


def _gradients(model: ModelConfig, *, split: bool) -> list:
    mesh = Mesh.create(LAYOUT, torch.device("cpu"))
    built = build_stage(model, mesh, dtype=torch.float64, options=StageOptions(split_backward=split))
    initialise(built.parameters, model, seed=7)
    built.module(None, _batch(model), "loss").backward()
    assert bool(built.gemm.waiting) == split
    with torch.no_grad():
        for product in built.gemm.waiting or ():
            product.add()
    complete_gradients(built.parameters, mesh)
    return boxes_of(built.parameters, gradients=True)


def _kept_tokens(model: ModelConfig) -> set[int]:
    """The tokens of every saved tensor that is as wide as the hidden states; weights apart."""
    built = build_stage(model, Mesh.create(LAYOUT, torch.device("cpu")))
    initialise(built.parameters, model, seed=7)
    found: set[int] = set()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 3 and tensor.shape[-1] == model.hidden_size:
            found.add(tensor.shape[1])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        built.module(None, _batch(model), "loss")
    return found


def _batch(model: ModelConfig) -> Batch:
    ids = torch.randint(0, model.vocab_size, (2, 12), generator=torch.Generator().manual_seed(3))
    return Batch(ids, ids)
