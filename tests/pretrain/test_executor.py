"""What the executor costs and keeps: products, memory, sums in the right type; and batches that change their shape."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pretrain.pipeline import Pipeline
from pretrain.schedules import schedule_named
from tests.helpers.models import biased_model, gated_model
from tests.helpers.ranks import run_ranks
from tests.pretrain.models import mesh_of
from workbench.models.batch import Batch
from workbench.models.build import build_stage, initialise
from workbench.parallel.live import shard_views
from workbench.spec.execution import StageOptions
from workbench.spec.layout import ParallelLayout
from workbench.spec.model import ModelConfig

ONE_STAGE = [("1f1b", 1), ("interleaved", 2), ("zb_h1", 1), ("interleaved_zb", 4), ("zbv", 2), ("dualpipev", 2)]
ONE = torch.tensor(1.0, dtype=torch.float64)


def pipeline_of(
    model: ModelConfig, schedule: str, *, compute: torch.dtype | None = None, dtype: torch.dtype, **degrees: Any
) -> Pipeline:
    rule = schedule_named(schedule)
    mesh = mesh_of(ParallelLayout.model_validate({**degrees, "placement": rule.placement}))
    options = StageOptions(split_backward=rule.splits_backward)
    built = build_stage(model, mesh, dtype=dtype, compute_dtype=compute, options=options)
    initialise(built.parameters, model, seed=4)
    return Pipeline(built, mesh, rule)


def batches_of(model: ModelConfig, count: int, tokens: int, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, model.vocab_size, (count, tokens + 1), generator=generator)
    return [Batch(ids[i : i + 1, :-1].contiguous(), ids[i : i + 1, 1:].contiguous()) for i in range(count)]


@pytest.mark.parametrize(("schedule", "vpp"), ONE_STAGE)
@pytest.mark.parametrize("make", [gated_model, biased_model])
def test_a_step_multiplies_exactly_three_times_as_much_as_its_forwards(schedule: str, vpp: int, make: Any) -> None:
    """Products of weights alone: attention multiplies activations, and recomputes."""
    model = make()
    pipeline = pipeline_of(model, schedule, vpp=vpp, dtype=torch.float32)
    batches = batches_of(model, 5, 12)

    def products(counter: FlopCounterMode) -> int:
        counts = counter.get_flop_counts()["Global"]
        return sum(counts.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))

    with FlopCounterMode(display=False) as forward:
        pipeline.evaluate(batches, "loss", lambda batch, loss: None)
    with FlopCounterMode(display=False) as step:
        pipeline.train(batches, ONE)
    assert products(forward) > 0
    assert products(step) == 3 * products(forward)


class _Kept:
    """A tensor that autograd keeps for a backward."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def test_once_inputs_have_their_gradients_only_the_factors_of_weights_are_kept() -> None:
    model = gated_model()
    pipeline = pipeline_of(model, "zb_h1", dtype=torch.float32)
    kept: weakref.WeakSet[_Kept] = weakref.WeakSet()
    factors: list[weakref.ref[torch.Tensor]] = []
    seen: list[tuple[int, int]] = []
    gemm = pipeline.built.gemm
    compute = gemm.weight_gradient

    def spy(x_NI: torch.Tensor, grad_NO: torch.Tensor) -> torch.Tensor:
        gc.collect()
        factors.append(weakref.ref(grad_NO))
        seen.append((len(kept), sum(factor() is not None for factor in factors)))
        return compute(x_NI, grad_NO)

    gemm.weight_gradient = spy  # type: ignore[method-assign]

    def pack(tensor: torch.Tensor) -> _Kept:
        kept.add(found := _Kept(tensor))
        return found

    gc.freeze()  # so that `spy` looks through what is made here, and not through all that the tests have imported
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda found: found.tensor):
        pipeline.train(batches_of(model, 2, 12), ONE)
    gc.unfreeze()
    assert len(seen) == 2 * (4 * model.num_hidden_layers + 1)
    assert {graph for graph, _ in seen} == {0}
    assert {waiting for _, waiting in seen} == {1}  # each product lets go of its factors
    assert gemm.waiting == []


def losses_of_lengths(schedule: str, degrees: dict[str, Any]) -> list[float]:
    model = gated_model()
    pipeline = pipeline_of(model, schedule, dtype=torch.float64, **degrees)
    found = []
    for step, tokens in enumerate((12, 5, 16)):
        pipeline.train(batches_of(model, 4, tokens, step), ONE)
        total = torch.zeros((), dtype=torch.float64)
        pipeline.evaluate(batches_of(model, 3, tokens + 1, step), "loss", lambda _, loss, total=total: total.add_(loss))
        found.append(float(pipeline.mesh.world.all_reduce(total)))
        for parameter in pipeline.built.parameters:
            parameter.data.sub_(1e-3 * parameter.require_grad())
            parameter.parameter.grad = None
    return found


@pytest.mark.parity
@pytest.mark.parametrize(("schedule", "vpp"), [("1f1b", 1), ("interleaved", 2), ("zb_h1", 1), ("zbv", 2)])
def test_the_length_of_sequences_may_change_between_steps(schedule: str, vpp: int) -> None:
    expected = losses_of_lengths("gpipe", {})
    for rank in run_ranks(2, losses_of_lengths, schedule, {"pp": 2, "vpp": vpp}):
        assert rank == pytest.approx(expected, rel=1e-10)


def gradients_in_bf16(schedule: str, vpp: int) -> dict[str, torch.Tensor]:
    model = gated_model()
    pipeline = pipeline_of(model, schedule, compute=torch.bfloat16, dtype=torch.float32, pp=2, dp=2, vpp=vpp)
    pipeline.train(batches_of(model, 16, 12, seed=pipeline.mesh.dp.rank), ONE)
    return {
        shard.name: view.clone()
        for parameter in pipeline.built.parameters
        for shard, view in shard_views(parameter, parameter.require_grad())
    }


@pytest.mark.parity
@pytest.mark.parametrize(("schedule", "vpp"), [("zb_h1", 1), ("zbv", 2)])
def test_gradients_of_bf16_layers_are_summed_in_fp32_under_data_parallelism(schedule: str, vpp: int) -> None:
    def whole(found: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {name: tensor for rank in found for name, tensor in rank.items()}

    expected = whole(run_ranks(4, gradients_in_bf16, "1f1b", 1))
    found = whole(run_ranks(4, gradients_in_bf16, schedule, vpp))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        error = (tensor - expected[name]).norm() / expected[name].norm()
        assert error < 1e-6, (name, float(error))
