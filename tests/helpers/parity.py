"""Three training steps at any layout, and everything about them that must not depend on it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from _pytest.mark import ParameterSet

from pretrain.config import OptimTable
from pretrain.optimizer import Optimizer
from pretrain.pipeline import Pipeline
from pretrain.schedules import schedule_named
from workbench.models.balance import balance_experts, take_load
from workbench.models.batch import Batch
from workbench.models.build import build_stage, initialise
from workbench.parallel.dropout import DropoutKey
from workbench.parallel.gradients import complete_gradients, gradient_norm
from workbench.parallel.initial import normal
from workbench.parallel.live import LiveParameter, shard_views
from workbench.parallel.loss import IGNORE
from workbench.parallel.mesh import Mesh
from workbench.spec.execution import StageOptions
from workbench.spec.geometry import Box
from workbench.spec.layout import ParallelLayout
from workbench.spec.model import ModelConfig

STEPS, SAMPLES, TOKENS = 3, 4, 12
TOLERANCE = 1e-10
ADAMW = OptimTable(lr=1e-2, weight_decay=0.1, clip=1.0)
# The documents of each row: of one token, of many, across the chunks of every layout.
DOCUMENTS = torch.tensor([[0] * 12, [0] + [1] * 11, [0] * 5 + [1] * 4 + [2] * 3, [0, 0, 1, 2, 2, 2, 2, 3, 3, 3, 4, 4]])
POSITIONS = torch.stack([torch.cat([torch.arange(n) for n in row.unique(return_counts=True)[1]]) for row in DOCUMENTS])
# Of a model whose tokens see all others: the tokens of each row, and whether its second half follows its first.
LENGTHS, PAIRS = torch.tensor([12, 9, 1, 6]), torch.tensor([0, 1, IGNORE, 1])
Boxes = list[tuple[str, Box, torch.Tensor]]


@dataclass
class Observed:
    """What one rank saw: per step loss and gradient norm, the first step's gradients, the last weights."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: Boxes = field(default_factory=list)
    weights: Boxes = field(default_factory=list)


def train_three_steps(
    model: ModelConfig,
    layout: ParallelLayout,
    schedule: str,
    micro_size: int,
    documents: bool = False,
    options: StageOptions | None = None,
    samples: int = SAMPLES,
    optim: OptimTable = ADAMW,
) -> Observed:
    """What this rank saw of three steps in float64 on `samples` rows of data that depend on the step alone.

    With `documents` each row is several, whose positions begin anew.
    """
    mesh = Mesh.create(layout, torch.device("cpu"))
    rule = schedule_named(schedule)
    options = replace(options or StageOptions(), split_backward=rule.splits_backward)
    built = build_stage(model, mesh, dtype=torch.float64, options=options)
    initialise(built.parameters, model, seed=7)
    perturb(built.parameters)
    pipeline = Pipeline(built, mesh, rule)
    seen = Observed()
    _train(pipeline, model, 0, micro_size, samples, documents)
    complete_gradients(built.parameters, mesh)
    seen.norms.append(float(gradient_norm(built.parameters, mesh)))
    seen.gradients = boxes_of(built.parameters, gradients=True)
    for parameter in built.parameters:
        parameter.parameter.grad = None
    take_load(built.module, mesh)
    optimizer = Optimizer(built.parameters, mesh, optim)
    for step in range(STEPS):
        seen.losses.append(_train(pipeline, model, step, micro_size, samples, documents))
        seen.norms.append(float(optimizer.update(optim.lr)))
        if (load := take_load(built.module, mesh)) is not None:
            balance_experts(built.module, load)
    seen.weights = boxes_of(built.parameters)
    return seen


def boxes_of(parameters: list[LiveParameter], *, gradients: bool = False) -> Boxes:
    """Every logical box that this rank holds, copies included."""
    return [
        (shard.name, shard.box, view.to("cpu", copy=True))
        for parameter in parameters
        if parameter.trainable or not gradients
        for shard, view in shard_views(parameter, parameter.require_grad() if gradients else parameter.data)
    ]


def perturb(parameters: list[LiveParameter]) -> None:
    """Gives norms and biases values of their own, so that a swapped or forgotten one is seen."""
    for parameter in parameters:
        if parameter.spec.init in ("ones", "zeros"):
            shapes = {part.name: part.shape for part in parameter.spec.parts}
            for shard, view in shard_views(parameter, parameter.data):
                noise = normal(shard.name, shapes[shard.name], shard.box, seed=11, std=0.3)
                view.add_(noise.to(view))


def largest_difference(boxes: Boxes, reference: dict[str, torch.Tensor]) -> float:
    """The largest difference of any box from the whole tensors, relative to the largest element of its tensor.

    A gradient that is zero but for rounding (a key's bias moves all scores of a row alike) is measured against a
    millionth of the largest element of all.
    """
    floor = 1e-6 * max(float(whole.abs().max()) for whole in reference.values())
    return max(
        float((reference[name][box.slices] - values).abs().max()) / max(float(reference[name].abs().max()), floor)
        for name, box, values in boxes
    )


def exhaustive(*cases: tuple[Any, ...]) -> list[ParameterSet]:
    """The cases as parameters that only `make parity` runs; the matrix shows their pairs as well."""
    return [pytest.param(*case, marks=pytest.mark.exhaustive) for case in cases]


def assert_observed(observed: list[Observed], reference: Observed) -> None:
    """Fails unless every rank saw what one process saw, and together they hold everything."""
    gradients = {name: values for name, _, values in reference.gradients}
    weights = {name: values for name, _, values in reference.weights}
    for rank, seen in enumerate(observed):
        assert seen.losses == pytest.approx(reference.losses, rel=TOLERANCE), f"losses on rank {rank}"
        assert seen.norms == pytest.approx(reference.norms, rel=TOLERANCE), f"norms on rank {rank}"
        assert largest_difference(seen.gradients, gradients) < TOLERANCE, f"gradients on rank {rank}"
        assert largest_difference(seen.weights, weights) < TOLERANCE, f"weights on rank {rank}"
    assert {name for seen in observed for name, _, _ in seen.weights} == set(weights)


def _train(pipeline: Pipeline, model: ModelConfig, step: int, micro_size: int, samples: int, documents: bool) -> float:
    """Adds the gradient of the step's mean loss; returns that loss, equal on all ranks."""
    mesh = pipeline.mesh
    ids, labels, count = _samples(model, step, samples)
    across = mesh.dp.size * micro_size
    batches = []
    for first in range(mesh.dp.rank * micro_size, samples, across):
        rows = torch.arange(first, first + micro_size)
        batch = Batch(ids[rows], labels[rows], dropout=DropoutKey(3, step, rows))
        if model.num_encoder_layers:
            batch = replace(batch, input_ids=_samples(model, step + 50, samples)[0][rows], lengths=LENGTHS[rows])
            batch = replace(batch, decoder_ids=ids[rows, :9], labels=labels[rows, :9])
        if not model.causal:
            pairs = PAIRS[rows] if model.next_sentence else None
            segments = (torch.arange(TOKENS) >= 5).long().expand(len(rows), -1) if model.type_vocab_size else None
            batch = replace(batch, lengths=LENGTHS[rows], segments=segments, pair_labels=pairs, pair_weight=2.5)
        if documents:
            batch = replace(batch, positions=POSITIONS[rows], documents=DOCUMENTS[rows])
        batches.append(batch)
    loss = pipeline.train(batches, torch.tensor(1.0 / count, dtype=torch.float64))
    return float(mesh.pp.all_reduce(mesh.data.all_reduce(loss.clone()))) / count


def _samples(model: ModelConfig, step: int, samples: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Random tokens, labels of which each row ignores another number, and the count of those that are left."""
    generator = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(0, model.vocab_size, (samples, TOKENS + 1), generator=generator)
    labels = ids[:, 1:].clone()
    for row in range(samples):
        labels[row, : row % 5] = IGNORE
    if not model.causal:
        labels[torch.arange(TOKENS) >= LENGTHS.unsqueeze(-1)] = IGNORE
    return ids[:, :-1].contiguous(), labels, int((labels != IGNORE).sum())
