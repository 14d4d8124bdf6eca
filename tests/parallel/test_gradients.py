"""Known ways to get gradients wrong without failing, each held to one process."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch

from pretrain.pipeline import Pipeline
from pretrain.schedules import schedule_named
from tests.helpers.models import biased_model, gated_model
from tests.helpers.parity import boxes_of, largest_difference, train_three_steps
from tests.helpers.ranks import run_ranks
from workbench.errors import LaunchError
from workbench.models.batch import Batch
from workbench.models.build import build_stage, initialise
from workbench.parallel.data import _sum_unused
from workbench.parallel.gradients import clip_gradients, complete_gradients, gradient_norm
from workbench.parallel.live import shard_views
from workbench.parallel.loss import IGNORE
from workbench.parallel.mesh import Mesh
from workbench.spec.execution import StageOptions
from workbench.spec.layout import ParallelLayout
from workbench.spec.model import ModelConfig
from workbench.spec.schema import num_parameters

MODELS = {
    "tied": gated_model(tie_word_embeddings=True),
    "untied": biased_model(tie_word_embeddings=False),
}
LAYOUTS: list[dict[str, Any]] = [
    {"tp": 2},
    {"tp": 4},
    {"pp": 2},
    {"dp": 2},
    {"tp": 2, "dp": 2, "shard": "zero1"},
    {"pp": 2, "dp": 2, "shard": "zero3"},
    {"dp": 4, "shard": "zero2", "shard_size": 2},
]


def norm_of_ones(model: ModelConfig, layout: dict[str, Any]) -> tuple[float, float, set[float]]:
    """The norm when every logical element has gradient 1, the norm after clipping to 2, and the clipped values."""
    mesh = Mesh.create(ParallelLayout(**layout), torch.device("cpu"))
    parameters = build_stage(model, mesh, dtype=torch.float64).parameters
    for parameter in parameters:
        grad = parameter.require_grad().fill_(1000.0)  # in padding as well, which must not count
        for _, view in shard_views(parameter, grad):
            view.fill_(1.0)
    norm = gradient_norm(parameters, mesh)
    clip_gradients(parameters, norm, 2.0)
    values = {float(v) for p in parameters for _, view in shard_views(p, p.require_grad()) for v in view.unique()}
    return float(norm), float(gradient_norm(parameters, mesh)), values


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_norm_that_clips_counts_each_element_of_each_parameter_once(name: str, layout: dict[str, Any]) -> None:
    whole = math.sqrt(num_parameters(MODELS[name]))
    for norm, clipped, values in run_ranks(ParallelLayout(**layout).world_size, norm_of_ones, MODELS[name], layout):
        assert norm == pytest.approx(whole, rel=1e-12)
        assert clipped == pytest.approx(2.0, rel=1e-6)
        assert max(values) - min(values) < 1e-12


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_gradient_norm_of_a_step_with_tied_weights_is_that_of_one_process(layout: dict[str, Any]) -> None:
    cut = ParallelLayout(**layout)
    reference = train_three_steps(MODELS["tied"], ParallelLayout(), "gpipe", 4)
    for seen in run_ranks(cut.world_size, train_three_steps, MODELS["tied"], cut, "1f1b", 1):
        assert seen.norms == pytest.approx(reference.norms, rel=1e-10)


@pytest.mark.parametrize(
    "layout",
    [{"tp": 2, "shard": "zero2"}, {"tp": 2, "shard": "zero3"}, {"dp": 2, "shard": "zero2", "shard_size": 1}],
    ids=str,
)
def test_a_data_parallel_group_of_one_rank_does_not_amplify_gradients(layout: dict[str, Any]) -> None:
    cut = ParallelLayout(**layout)
    reference = {
        name: values for name, _, values in train_three_steps(MODELS["tied"], ParallelLayout(), "gpipe", 4).gradients
    }
    for seen in run_ranks(cut.world_size, train_three_steps, MODELS["tied"], cut, "1f1b", 1):
        assert largest_difference(seen.gradients, reference) < 1e-10


def uneven_batches() -> tuple[list[Batch], int]:
    """Microbatches of which one has a single label and the other all of them, and the number of labels."""
    ids = torch.randint(0, 101, (2, 9), generator=torch.Generator().manual_seed(1))
    labels = ids[:, 1:].clone()
    labels[0, 1:] = IGNORE
    return [Batch(ids[row : row + 1, :-1], labels[row : row + 1]) for row in (0, 1)], int((labels != IGNORE).sum())


def accumulate(scales: list[float], layout: dict[str, Any]) -> Any:
    """Gradients of the uneven microbatches, one pass for each of `scales`; on several replicas each takes one."""
    model, mesh = MODELS["tied"], Mesh.create(ParallelLayout(**layout), torch.device("cpu"))
    built = build_stage(model, mesh, dtype=torch.float64)
    initialise(built.parameters, model, seed=7)
    pipeline = Pipeline(built, mesh, schedule_named("gpipe"))
    batches, _ = uneven_batches()
    if len(scales) == 1:
        mine = batches if mesh.dp.size == 1 else [batches[mesh.dp.rank]]
        pipeline.train(mine, torch.tensor(scales[0], dtype=torch.float64))
    else:
        for batch, scale in zip(batches, scales, strict=True):
            pipeline.train([batch], torch.tensor(scale, dtype=torch.float64))
    complete_gradients(built.parameters, mesh)
    return boxes_of(built.parameters, gradients=True)


@pytest.mark.parametrize("layout", [{}, {"dp": 2}, {"dp": 2, "shard": "zero2"}], ids=str)
def test_accumulated_gradients_are_of_the_mean_over_labels_and_no_mean_of_means(layout: dict[str, Any]) -> None:
    _, count = uneven_batches()
    by_labels = {name: values for name, _, values in accumulate([1 / count, 1 / count], {})}
    of_means = {name: values for name, _, values in accumulate([1 / 2, 1 / (2 * (count - 1))], {})}
    for gradients in run_ranks(ParallelLayout(**layout).world_size, accumulate, [1 / count], layout):
        assert largest_difference(gradients, by_labels) < 1e-10
        assert largest_difference(gradients, of_means) > 0.1


def reduced_in(kind: Literal["fp32", "bf16"]) -> Any:
    """The gradients of two replicas, summed in `kind`."""
    model, mesh = MODELS["tied"], Mesh.create(ParallelLayout(dp=2, shard="zero2"), torch.device("cpu"))
    built = build_stage(model, mesh, options=StageOptions(grad_reduce=kind))
    initialise(built.parameters, model, seed=7)
    batches, count = uneven_batches()
    Pipeline(built, mesh, schedule_named("gpipe")).train([batches[mesh.dp.rank]], torch.tensor(1.0 / count))
    return boxes_of(built.parameters, gradients=True)


def test_gradients_summed_in_bf16_differ_by_its_rounding_and_accumulate_in_fp32() -> None:
    exact, rounded = run_ranks(2, reduced_in, "fp32"), run_ranks(2, reduced_in, "bf16")
    for there, here in zip(rounded, exact, strict=True):
        for (name, box, values), (_, _, expected) in zip(there, here, strict=True):
            assert values.dtype == torch.float32
            # Two numbers and their sum are rounded to 8 bits each.
            assert float((values - expected).abs().max()) <= 2**-6 * float(expected.abs().max()), (name, box)
    assert any(not torch.equal(v, e) for (_, _, v), (_, _, e) in zip(rounded[0], exact[0], strict=True))


def test_hybrid_sharding_of_gradients_is_refused_where_torch_cannot_sum_them() -> None:
    with pytest.raises(LaunchError, match=r"shard_size with shard='zero2' needs torch 2.13 or newer, not .*zero1"):
        _sum_unused(torch.nn.Linear(1, 1), "zero2")  # type: ignore[arg-type]
