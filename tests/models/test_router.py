"""Routers, their losses and experts against transformers' own modules, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import DeepseekV3Config, MixtralConfig, MixtralForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from pretrain.pipeline import Pipeline
from pretrain.schedules import schedule_named
from tests.helpers.models import grouped_model, sparse_model
from workbench.models.balance import balance_experts, take_load
from workbench.models.batch import Batch, local_batch
from workbench.models.build import BuiltStage, build_stage, initialise
from workbench.models.moe import Experts, SparseMLP
from workbench.parallel.grouped import grouped_product, grouped_weight_gradient
from workbench.parallel.live import shard_views
from workbench.parallel.mesh import Mesh
from workbench.spec.model import ModelConfig

ROWS, TOKENS = 3, 10
MIXTRAL = {"num_hidden_layers": 1, "intermediate_size": 24, "hidden_size": 32}


def built(model: ModelConfig) -> BuiltStage:
    stage = build_stage(model, Mesh.single(), dtype=torch.float64)
    initialise(stage.parameters, model, seed=3)
    return stage


def whole_tensors(stage: BuiltStage, *, gradients: bool = False) -> dict[str, torch.Tensor]:
    return {
        shard.name: view
        for parameter in stage.parameters
        for shard, view in shard_views(parameter, parameter.require_grad() if gradients else parameter.data)
    }


def stacked(tensors: dict[str, torch.Tensor], layer: int, experts: int) -> dict[str, torch.Tensor]:
    """The experts of a layer as transformers has them in memory."""

    def named(expert: int, name: str) -> torch.Tensor:
        return tensors[f"layers.{layer}.mlp.experts.{expert}.{name}.weight"]

    up = [torch.cat((named(e, "gate_proj"), named(e, "up_proj"))) for e in range(experts)]
    return {"gate_up_proj": torch.stack(up), "down_proj": torch.stack([named(e, "down_proj") for e in range(experts)])}


def batch_of(model: ModelConfig, scale: float = 1.0, lengths: list[int] | None = None) -> Batch:
    ids = torch.randint(0, model.vocab_size, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))
    return Batch(
        ids,
        ids.roll(-1, 1),
        lengths=None if lengths is None else torch.tensor(lengths),
        loss_scale=torch.tensor(scale, dtype=torch.float64),
    )


def test_groups_biases_and_shared_experts_compute_and_learn_as_in_deepseek_v3() -> None:
    model = grouped_model(moe={"shared_expert_gate": False, "shared_expert_intermediate_size": 24}, num_hidden_layers=2)
    moe = model.moe
    assert moe is not None
    stage = built(model)
    ours = stage.module.layers["1"].mlp
    assert isinstance(ours, SparseMLP)
    theirs = DeepseekV3MoE(
        DeepseekV3Config(
            hidden_size=32,
            moe_intermediate_size=24,
            n_routed_experts=8,
            n_shared_experts=1,
            num_experts_per_tok=3,
            n_group=4,
            topk_group=2,
            routed_scaling_factor=1.7,
            norm_topk_prob=True,
        )
    ).double()
    tensors = whole_tensors(stage)
    tensors["layers.1.mlp.gate.e_score_correction_bias"].copy_(torch.linspace(-0.2, 0.2, 8))
    copied = {f"experts.{name}": value for name, value in stacked(tensors, 1, 8).items()}
    copied["gate.weight"] = tensors["layers.1.mlp.gate.weight"]
    copied["gate.e_score_correction_bias"] = tensors["layers.1.mlp.gate.e_score_correction_bias"]
    for name in ("gate_proj", "up_proj", "down_proj"):
        copied[f"shared_experts.{name}.weight"] = tensors[f"layers.1.mlp.shared_expert.{name}.weight"]
    theirs.load_state_dict(copied)
    x = torch.randn(2, 7, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    batch = local_batch(Batch(torch.zeros(2, 7, dtype=torch.int64)), Mesh.single())
    outputs = ours(inputs[0], batch), theirs(inputs[1])
    # transformers computes the router in fp32 whatever the model's type.
    assert (outputs[0] - outputs[1]).abs().max() < 1e-6
    for output in outputs:
        output.square().sum().backward()
    assert inputs[0].grad is not None and inputs[1].grad is not None
    assert (inputs[0].grad - inputs[1].grad).abs().max() < 1e-5
    gradients = whole_tensors(stage, gradients=True)
    for name, gradient in stacked(gradients, 1, 8).items():
        assert (gradient - theirs.experts.get_parameter(name).grad).abs().max() < 1e-5
    assert (gradients["layers.1.mlp.gate.weight"] - theirs.gate.weight.grad).abs().max() < 1e-5


@pytest.mark.parametrize("lengths", [None, [10, 4, 7]], ids=["full rows", "padded rows"])
def test_the_balancing_loss_of_a_microbatch_is_that_of_transformers(lengths: list[int] | None) -> None:
    model = sparse_model(num_hidden_layers=2, moe={"router_z_loss_coef": 0.0})
    stage = built(model)
    seen: list[torch.Tensor] = []
    router = stage.module.layers["1"].mlp.gate
    router.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].detach().flatten(0, 1)))
    batch = batch_of(model, lengths=lengths)
    stage.module(None, batch).backward()
    mask = None if lengths is None else torch.arange(TOKENS) < torch.tensor(lengths).unsqueeze(1)
    logits = (seen[0] @ router.weight.t(),)
    theirs = load_balancing_loss_func(logits, 4, 2, None if mask is None else mask.long())
    load = take_load(stage.module, Mesh.single())
    assert load is not None
    found = load.metrics(Mesh.single(), num_labels=ROWS * TOKENS)
    assert found["router_aux_loss"] == pytest.approx(theirs.item(), rel=1e-6)
    assert load.tokens_LE.sum() == 2 * (sum(lengths) if lengths else ROWS * TOKENS)


def test_the_gradient_of_the_whole_loss_is_that_of_transformers() -> None:
    config = MixtralConfig(
        vocab_size=101,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        router_aux_loss_coef=0.5,
        output_router_logits=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        **MIXTRAL,
    )
    config._experts_implementation = "eager"  # the others know no float64
    theirs = MixtralForCausalLM(config).double()
    moe: dict[str, Any] = {"mlp_only_layers": (), "router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.0}
    model = sparse_model(moe=moe, **MIXTRAL)
    stage = built(model)
    tensors = whole_tensors(stage)
    names = {name: name.removeprefix("model.") for name, _ in theirs.named_parameters() if "experts" not in name}
    with torch.no_grad():
        for name, ours in names.items():
            theirs.get_parameter(name).copy_(tensors[ours])
        for name, value in stacked(tensors, 0, 4).items():
            theirs.get_parameter(f"model.layers.0.mlp.experts.{name}").copy_(value)
    ids = batch_of(model).input_ids
    labels = torch.cat((ids[:, 1:], torch.full((ROWS, 1), -100)), dim=1)
    theirs(ids, labels=ids).loss.backward()
    pipeline = Pipeline(stage, Mesh.single(), schedule_named("gpipe"))
    pipeline.train([Batch(ids, labels)], torch.tensor(1 / int((labels != -100).sum()), dtype=torch.float64))
    gradients = whole_tensors(stage, gradients=True)
    for name, ours in names.items():
        assert (gradients[ours] - theirs.get_parameter(name).grad).abs().max() < 1e-6, name
    for name, value in stacked(gradients, 0, 4).items():
        assert (value - theirs.get_parameter(f"model.layers.0.mlp.experts.{name}").grad).abs().max() < 1e-6, name


def test_biases_of_experts_move_against_their_load_and_nothing_else_moves_them() -> None:
    model = grouped_model()
    stage = built(model)
    stage.module(None, batch_of(model)).backward()
    bias = stage.module.layers["3"].mlp.gate.e_score_correction_bias
    assert bias is not None and bias.grad is None
    load = take_load(stage.module, Mesh.single())
    assert load is not None
    balance_experts(stage.module, load)
    tokens = load.tokens_LE[load.layers.index(3)]
    assert torch.equal(bias.detach(), 0.01 * (tokens.mean() - tokens).sign())
    again = take_load(stage.module, Mesh.single())
    assert again is not None and not again.tokens_LE.any()


@pytest.mark.parametrize("sizes", [[3, 0, 4], [0, 0, 7], [7, 0, 0]])
def test_a_grouped_product_is_that_of_each_expert(sizes: list[int]) -> None:
    x, weight = torch.randn(7, 4, dtype=torch.float64), torch.randn(3, 5, 4, dtype=torch.float64)
    counts = torch.tensor(sizes)
    expert = torch.arange(3).repeat_interleave(counts)
    expected = torch.einsum("ni,noi->no", x, weight[expert])
    assert torch.allclose(grouped_product(x, weight, counts), expected)
    grad = torch.randn(7, 5, dtype=torch.float64)
    weight.requires_grad_()
    grouped_product(x, weight, counts).backward(grad)
    assert torch.allclose(grouped_weight_gradient(x, grad, counts), weight.grad)


def test_torchs_grouped_gemm_means_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workbench.parallel.grouped.has_grouped_gemm", lambda *_: True)
    x, weight = torch.randn(9, 8, requires_grad=True), torch.randn(3, 16, 8, requires_grad=True)
    counts, grad = torch.tensor([4, 0, 5]), torch.randn(9, 16)
    y = grouped_product(x, weight, counts)
    found = torch.autograd.grad(y, (x, weight), grad)
    monkeypatch.undo()
    expected = torch.autograd.grad(grouped_product(x, weight, counts), (x, weight), grad)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_an_expert_that_drops_its_tokens_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sparse_model()
    stage = built(model).module
    right = stage(None, batch_of(model), "logits")
    compute = Experts.forward

    def dropping(self: Experts, x: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        y = compute(self, x, sizes)
        kept = torch.cat((torch.zeros(int(sizes[0])), torch.ones(len(y) - int(sizes[0]))))
        return y * kept.unsqueeze(-1)

    monkeypatch.setattr(Experts, "forward", dropping)
    assert (stage(None, batch_of(model), "logits") - right).abs().max() > 1e-4


def test_routers_are_computed_in_fp32_whatever_the_model_is_computed_in() -> None:
    model = sparse_model()
    stage = build_stage(model, Mesh.single(), compute_dtype=torch.bfloat16)
    initialise(stage.parameters, model, seed=3)
    router = stage.module.layers["1"].mlp.gate
    assert isinstance(router, nn.Module)
    x = torch.randn(2, 5, 32, dtype=torch.bfloat16)
    routing = router(x, local_batch(Batch(torch.zeros(2, 5, dtype=torch.int64)), Mesh.single()))
    assert routing.weights_Nk.dtype == torch.float32
