"""The rules of the optimizer against torch's own, and moments that rest in fewer bits or elsewhere."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config import OptimTable
from pretrain.moments import stochastic_bf16
from pretrain.muon import orthogonalised
from pretrain.optimizer import Optimizer
from tests.helpers.models import biased_model
from tests.helpers.ranks import run_ranks
from workbench.models.build import build_stage, initialise
from workbench.parallel.hashing import hash_grid
from workbench.parallel.initial import normal
from workbench.parallel.live import LiveParameter, shard_views
from workbench.parallel.mesh import Mesh
from workbench.spec.geometry import Box
from workbench.spec.layout import ParallelLayout

LR, STEPS = 1e-2, 3
Boxes = dict[tuple[str, tuple[int, ...]], torch.Tensor]


def gradient(name: str, shape: tuple[int, ...], box: Box, step: int) -> torch.Tensor:
    return normal(name, shape, box, seed=50 + step, std=1e-3)


def updated(optim: OptimTable, layout: ParallelLayout | None = None, **options: Any) -> tuple[Boxes, Boxes]:
    """The weights and the moments of this rank after a few updates by gradients that depend on the step alone."""
    model, layout = biased_model(), layout or ParallelLayout()
    mesh = Mesh.create(layout, torch.device("cpu"))
    parameters = build_stage(model, mesh).parameters
    initialise(parameters, model, seed=3)
    optimizer = Optimizer(parameters, mesh, optim, **options)
    for step in range(STEPS):
        for parameter in parameters:
            shapes = {part.name: part.shape for part in parameter.spec.parts}
            for shard, view in shard_views(parameter, parameter.require_grad()):
                # Of copies that are summed before the update, the first one has it all.
                view.copy_(gradient(shard.name, shapes[shard.name], shard.box, step))
        optimizer.update(LR)
    moments = {
        (f"{kind}/{name}", at): view
        for kind, values in optimizer.moments().items()
        for (name, at), view in boxes([p for p in parameters if p.path in values], values).items()
    }
    return boxes(parameters), moments


def boxes(parameters: list[LiveParameter], values: dict[str, torch.Tensor] | None = None) -> Boxes:
    """By name and offset."""
    return {
        (shard.name, shard.box.offset): view.clone()
        for parameter in parameters
        for shard, view in shard_views(parameter, parameter.data if values is None else values[parameter.path])
    }


def updated_by_torch(rule: Any, names: list[str]) -> dict[str, torch.Tensor]:
    """The weights `names` after the same updates by `rule(parameters)`, an optimizer of torch."""
    model = biased_model()
    parameters = build_stage(model, Mesh.single()).parameters
    initialise(parameters, model, seed=3)
    before = {name: value for (name, _), value in boxes(parameters).items()}
    weights = [torch.nn.Parameter(before[name]) for name in names]
    optimizer = rule(weights)
    for step in range(STEPS):
        for name, weight in zip(names, weights, strict=True):
            weight.grad = gradient(name, tuple(weight.shape), Box.whole(weight.shape), step)
        optimizer.step()
    return {name: weight.detach() for name, weight in zip(names, weights, strict=True)}


def is_matrix(name: str) -> bool:
    return "_proj.weight" in name


def test_muon_is_torchs_muon_for_matrices_and_torchs_adamw_for_the_rest() -> None:
    optim = OptimTable(name="muon", clip=0.0, weight_decay=0.1)
    weights = {name: value for (name, _), value in updated(optim, compute_dtype=torch.bfloat16)[0].items()}
    muon = updated_by_torch(
        lambda some: torch.optim.Muon(
            some, lr=LR, weight_decay=0.1, momentum=optim.momentum, adjust_lr_fn="match_rms_adamw"
        ),
        [name for name in weights if is_matrix(name)],
    )
    adamw = updated_by_torch(
        lambda some: torch.optim.AdamW(some, lr=LR, weight_decay=0.1, betas=optim.betas, eps=optim.eps),
        [name for name in weights if "embed" in name],
    )
    start = updated_by_torch(lambda some: torch.optim.SGD(some, lr=0.0), list(weights))
    assert len(muon) + len(adamw) == 4 * 6 + 2
    for name, expected in {**muon, **adamw}.items():
        moved = float((expected - start[name]).abs().max())
        # Both multiply in bf16 (8 bits) in the same order, but through kernels of their own (batched or not).
        assert float((weights[name] - expected).abs().max()) < 2**-7 * moved, name


def test_what_is_orthogonalised_keeps_its_singular_vectors_and_evens_out_their_values() -> None:
    matrix = torch.randn(2, 24, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for whole, near in zip(matrix, orthogonalised(matrix), strict=True):
        left, _, right = torch.linalg.svd(whole, full_matrices=False)
        values = left.T @ near @ right.T
        assert float((values - values.diagonal().diag()).abs().max()) < 1e-10
        assert 0.6 < float(values.diagonal().min()) <= float(values.diagonal().max()) < 1.3
    assert torch.equal(orthogonalised(matrix[0].T), orthogonalised(matrix[0]).T)


@given(st.floats(-(2.0**100), 2.0**100, width=32), st.integers(0, 2**32))
@settings(max_examples=30, derandomize=True)
def test_stochastic_rounding_has_the_exact_mean_and_goes_to_a_neighbour(value: float, seed: int) -> None:
    count = 1 << 16
    noise = hash_grid(torch.tensor(seed), [torch.arange(count)])
    rounded = stochastic_bf16(torch.full((count,), value), noise).double()
    step = torch.tensor(value, dtype=torch.float32).view(torch.int32) & -0x10000
    low = float(step.view(torch.float32))
    ulp = abs(float((step + 0x10000).view(torch.float32)) - low)
    assert set(rounded.tolist()) <= {low, low + math.copysign(ulp, value)}
    # Four standard errors of a coin that is thrown `count` times.
    assert abs(float(rounded.mean()) - value) <= 4 * 0.5 * ulp / math.sqrt(count)


def test_stochastic_rounding_hides_nothing_that_is_not_finite() -> None:
    nan = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    values = torch.cat((nan, torch.tensor([float("inf"), -float("inf")])))
    rounded = stochastic_bf16(values, torch.full((4,), 0xFFFF))
    assert rounded.isnan().tolist() == [True, True, False, False]
    assert rounded[2:].tolist() == [float("inf"), -float("inf")]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_in_bf16_follow_those_in_fp32_and_repeat_bit_for_bit(name: str) -> None:
    exact, _ = updated(OptimTable(name=name))
    weights, moments = updated(OptimTable(name=name, moments="bf16"), seed=4)
    again, same = updated(OptimTable(name=name, moments="bf16"), seed=4)
    _, others = updated(OptimTable(name=name, moments="bf16"), seed=5)
    assert {moment.dtype for moment in moments.values()} == {torch.bfloat16}
    assert all(torch.equal(weights[key], again[key]) for key in weights)
    assert all(torch.equal(moments[key], same[key]) for key in moments)
    assert any(not torch.equal(moments[key], others[key]) for key in moments)
    # A moment is off by at most one part in 2^7 each time, and an update by the two moments' shares of that.
    for key, value in weights.items():
        assert float((value - exact[key]).abs().max()) < 0.05 * LR * STEPS, key


@pytest.mark.parametrize("layout", [{"tp": 2}, {"dp": 2, "shard": "zero2"}, {"pp": 2}], ids=str)
def test_moments_in_bf16_round_alike_at_every_layout(layout: dict[str, Any]) -> None:
    optim = OptimTable(moments="bf16", clip=0.0)
    _, whole = updated(optim)
    wholes = {name: moment for (name, _), moment in whole.items()}
    for _, moments in run_ranks(2, updated, optim, ParallelLayout(**layout)):
        for (name, offset), moment in moments.items():
            assert torch.equal(wholes[name][Box(offset, tuple(moment.shape)).slices], moment), name


def test_offloaded_moments_make_no_difference_on_a_cpu() -> None:
    weights, _ = updated(OptimTable())
    offloaded, moments = updated(OptimTable(offload=True))
    assert all(torch.equal(weights[key], offloaded[key]) for key in weights)
    assert {moment.device.type for moment in moments.values()} == {"cpu"}
