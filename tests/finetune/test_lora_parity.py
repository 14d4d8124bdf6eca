"""Low-rank adapters give the same numbers at every layout, and nothing at all before they are trained."""

from __future__ import annotations

import pytest
import torch

from finetune.adapters._lora_layers import attach
from finetune.objective import pad
from finetune.task import IGNORE, Example
from pretrain.config import OptimTable
from pretrain.engine import Pipeline, to_batch
from pretrain.optimizer import Optimizer
from pretrain.schedules import schedule_named
from tests.helpers.models import latent_model
from tests.helpers.parity import Boxes, boxes_of, largest_difference
from tests.helpers.ranks import run_ranks
from tests.pretrain.models import VOCAB, tiny_model
from workbench.models.build import BuiltStage, build_stage, initialise
from workbench.parallel.gradients import complete_gradients, gradient_norm
from workbench.parallel.initial import normal
from workbench.parallel.live import LiveParameter, shard_views
from workbench.parallel.mesh import Mesh
from workbench.spec.execution import StageOptions
from workbench.spec.layout import ParallelLayout
from workbench.spec.lora import LoraSpec
from workbench.spec.model import ModelConfig

TOLERANCE = 1e-10
SAMPLES = 8
ADAMW = OptimTable(lr=1e-2, clip=1.0)

pytestmark = pytest.mark.parity


def examples(model: ModelConfig, step: int) -> list[Example]:
    """Rows of uneven length: answers after a prompt, or class numbers."""
    generator = torch.Generator().manual_seed(step)
    found = []
    for row in range(SAMPLES):
        tokens = 4 + (row * 5 + step) % 9
        ids = torch.randint(0, VOCAB, (tokens + 1,), generator=generator).numpy()
        labels = ids[1:].copy()
        labels[: 1 + row % 3] = IGNORE
        if model.num_labels:
            labels = ids[-1] % model.num_labels
        found.append(Example(ids[:-1].copy(), labels))
    return found


def built_with_adapter(model: ModelConfig, lora: LoraSpec | None, mesh: Mesh) -> BuiltStage:
    """A stage with trained-looking adapters: B is not zero."""
    adapt = None if lora is None else lambda stage: attach(stage, lora)
    options = StageOptions(split_backward=mesh.layout.placement == "vee")
    built = build_stage(model, mesh, dtype=torch.float64, adapt=adapt, options=options)
    initialise(built.parameters, model, seed=7)
    if lora is not None:
        train_b(built.parameters)
    return built


def train_b(parameters: list[LiveParameter]) -> None:
    for parameter in parameters:
        if parameter.path.endswith("lora_B"):
            shapes = {part.name: part.shape for part in parameter.spec.parts}
            for shard, view in shard_views(parameter, parameter.data):
                noise = normal(shard.name, shapes[shard.name], shard.box, seed=11, std=0.3)
                view.copy_(noise.to(view.dtype))


def backward(pipeline: Pipeline, model: ModelConfig, step: int) -> float:
    mesh, rows = pipeline.mesh, examples(model, step)
    count = sum(example.num_labels for example in rows)
    batches = []
    for first in range(2 * mesh.dp.rank, SAMPLES, 2 * mesh.dp.size):
        ids = range(first, first + 2)
        batches.append(to_batch(pad([rows[n] for n in ids], ids, 0), mesh.device, seed=3, step=step))
    loss = pipeline.train(batches, torch.tensor(1.0 / count, dtype=torch.float64))
    return float(mesh.pp.all_reduce(mesh.data.all_reduce(loss.clone()))) / count


def observe(
    model: ModelConfig, lora: LoraSpec | None, layout: ParallelLayout, optim: OptimTable = ADAMW
) -> tuple[list[float], Boxes, Boxes]:
    """Losses and norms of three steps, the trainable gradients of the first, the trainable weights after the last."""
    mesh = Mesh.create(layout, torch.device("cpu"))
    built = built_with_adapter(model, lora, mesh)
    trainable = [parameter for parameter in built.parameters if parameter.trainable]
    pipeline = Pipeline(built, mesh, schedule_named("zbv" if layout.placement == "vee" else "1f1b"))
    numbers = [backward(pipeline, model, 0)]
    complete_gradients(trainable, mesh)
    numbers.append(float(gradient_norm(built.parameters, mesh)))
    gradients = boxes_of(trainable, gradients=True)
    assert all(p.grad is None for p in built.parameters if not p.trainable)
    for parameter in trainable:
        parameter.parameter.grad = None
    optimizer = Optimizer(built.parameters, mesh, optim)
    for step in range(3):
        numbers.append(backward(pipeline, model, step))
        numbers.append(float(optimizer.update(1e-2)))
    return numbers, gradients, boxes_of(trainable)


def whole(boxes: Boxes) -> dict[str, torch.Tensor]:
    return {name: values for name, _, values in boxes}


NORMED = {"qk_norm": "head", "norm_placement": "post", "sliding_window": 3, "attn_logit_softcapping": 1.5}
CASES = [
    (ParallelLayout(tp=2), LoraSpec(r=3), {}),
    (ParallelLayout(tp=4), LoraSpec(r=3, rslora=True), {}),
    (ParallelLayout(tp=4), LoraSpec(r=2, targets=("v_proj", "up_proj", "down_proj")), {}),
    (ParallelLayout(tp=2, dp=2), LoraSpec(r=3), {"num_labels": 3}),
    (ParallelLayout(dp=2, shard="zero3"), LoraSpec(r=3), {}),
    (ParallelLayout(tp=2, dp=2, shard="zero2"), LoraSpec(r=5), {}),
    (ParallelLayout(tp=2, dp=2, shard="zero1"), LoraSpec(r=3), {}),
    (ParallelLayout(dp=4, shard="zero2", shard_size=2), LoraSpec(r=3), {}),
    (ParallelLayout(pp=2), LoraSpec(r=3), {"num_labels": 3}),
    (ParallelLayout(tp=2, pp=2), LoraSpec(r=3), {"tie_word_embeddings": False}),
    (ParallelLayout(pp=2, vpp=2, placement="vee"), LoraSpec(r=3), {}),
    (ParallelLayout(pp=2, vpp=2, dp=2, placement="vee", shard="zero3"), LoraSpec(r=3), {"num_labels": 3}),
    (ParallelLayout(tp=2, dp=2), None, {"num_labels": 3}),
    (ParallelLayout(tp=2, sequence_parallel=True), LoraSpec(r=3), {}),
    (ParallelLayout(tp=4, sequence_parallel=True), LoraSpec(r=2, targets=("v_proj", "o_proj", "up_proj")), {}),
    (ParallelLayout(tp=2, sequence_parallel=True), LoraSpec(r=3), {"num_labels": 3}),
    (ParallelLayout(cp=2), LoraSpec(r=3), {"num_labels": 3}),
    (ParallelLayout(cp=2, context="ring"), LoraSpec(r=3), {}),
    (ParallelLayout(tp=2, cp=2, sequence_parallel=True), None, {"num_labels": 3}),
    (ParallelLayout(tp=2, cp=2, sequence_parallel=True, context="ring"), LoraSpec(r=3), {}),
    (ParallelLayout(tp=2, pp=2), None, {}),
    (ParallelLayout(tp=4, sequence_parallel=True), LoraSpec(r=3), NORMED | {"qk_norm": "full"}),
    (ParallelLayout(tp=2, cp=2), LoraSpec(r=3), NORMED | {"norm_unit_offset": True, "num_labels": 3}),
]


@pytest.mark.parametrize(("layout", "lora", "changes"), CASES, ids=str)
def test_loss_gradients_norm_and_steps_are_those_of_one_process(
    layout: ParallelLayout, lora: LoraSpec | None, changes: dict[str, object]
) -> None:
    model = tiny_model(**changes)
    numbers, gradients, weights = observe(model, lora, ParallelLayout())
    assert any(values.abs().max() > 0 for _, _, values in gradients)
    for there, gradients_there, weights_there in run_ranks(layout.world_size, observe, model, lora, layout):
        assert there == pytest.approx(numbers, rel=TOLERANCE)
        assert largest_difference(gradients_there, whole(gradients)) < TOLERANCE
        assert largest_difference(weights_there, whole(weights)) < 1e-9


LATENT_CASES = [
    (ParallelLayout(tp=2), LoraSpec(r=3), 12),
    (ParallelLayout(tp=2, sequence_parallel=True), LoraSpec(r=3), 12),
    (ParallelLayout(tp=2, cp=2, sequence_parallel=True), LoraSpec(r=2, targets=("q_a_proj", "kv_b_proj")), 12),
    (ParallelLayout(tp=2, sequence_parallel=True), LoraSpec(r=3, targets=("q_proj", "kv_a_proj_with_mqa")), None),
]


@pytest.mark.parametrize(("layout", "lora", "q_lora_rank"), LATENT_CASES, ids=str)
def test_adapters_of_projections_to_and_from_latents_are_those_of_one_process(
    layout: ParallelLayout, lora: LoraSpec, q_lora_rank: int | None
) -> None:
    model = latent_model(q_lora_rank, vocab_size=VOCAB)
    numbers, gradients, weights = observe(model, lora, ParallelLayout())
    for there, gradients_there, weights_there in run_ranks(layout.world_size, observe, model, lora, layout):
        assert there == pytest.approx(numbers, rel=TOLERANCE)
        assert largest_difference(gradients_there, whole(gradients)) < TOLERANCE
        assert largest_difference(weights_there, whole(weights)) < 1e-9


@pytest.mark.parametrize(
    "layout", [ParallelLayout(tp=4), ParallelLayout(tp=2, dp=2, shard="zero3"), ParallelLayout(pp=2, dp=2)], ids=str
)
def test_muon_orthogonalises_whole_factors_at_every_layout(layout: ParallelLayout) -> None:
    model, lora, muon = tiny_model(), LoraSpec(r=3), ADAMW.model_copy(update={"name": "muon"})
    numbers, _, weights = observe(model, lora, ParallelLayout(), muon)
    for there, _, weights_there in run_ranks(layout.world_size, observe, model, lora, layout, muon):
        assert there == pytest.approx(numbers, rel=TOLERANCE)
        assert largest_difference(weights_there, whole(weights)) < TOLERANCE
