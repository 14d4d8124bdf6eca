"""Every method trains the same weights at every layout: loss, gradients, and what it has trained after five steps."""

from __future__ import annotations

from functools import cache
from itertools import product

import pytest
import torch

from finetune.adapters.freeze import FreezeTable
from finetune.adapters.full import FullTable
from finetune.adapters.lora import LoraTable
from finetune.config import adapters
from pretrain.engine import Pipeline, schedule_named
from pretrain.optimizer import Optimizer
from tests.finetune.test_lora_parity import ADAMW, backward, whole
from tests.helpers.models import gated_model, sparse_model
from tests.helpers.parity import Boxes, boxes_of, largest_difference
from tests.helpers.ranks import run_ranks
from tests.pretrain.models import VOCAB
from workbench.config import Config
from workbench.models.build import build_stage, initialise
from workbench.parallel.gradients import complete_gradients, gradient_norm
from workbench.parallel.initial import normal
from workbench.parallel.live import shard_views
from workbench.parallel.mesh import Mesh
from workbench.spec.layout import ParallelLayout
from workbench.spec.lora import is_factor
from workbench.spec.model import ModelConfig

TOLERANCE = 1e-10
STEPS = 5
pytestmark = pytest.mark.parity

METHODS: dict[str, Config] = {
    "full": FullTable(layer_decay=0.7),
    "freeze": FreezeTable(first=3, layer_decay=0.9),
    "lora": LoraTable(r=3, dropout=0.3),
    "rslora": LoraTable(r=5, rslora=True, targets=("q_proj", "v_proj", "down_proj")),
    "dora": LoraTable(r=3, dora=True, dropout=0.2),
    "dora of some": LoraTable(r=2, dora=True, rslora=True, targets=("k_proj", "o_proj", "gate_proj", "lm_head")),
    "lora+": LoraTable(r=4, b_lr_ratio=4.0, rank_pattern={"q_proj": 2, "down_proj": 7}, alpha_pattern={"v_proj": 3.0}),
    "embedding": LoraTable(r=3, targets=("embed_tokens", "layers.[23].*"), b_lr_ratio=2.0),
    "head": LoraTable(r=3, targets=("lm_head", "layers.0.*.o_proj", "v_proj")),
    "tied": LoraTable(r=3, targets=("embed_tokens", "lm_head", "v_proj"), rank_pattern={"lm_head": 2}),
    "experts": LoraTable(r=3, targets=("*.mlp.*", "q_proj"), rank_pattern={"gate_proj": 2}),
}


def model_of(method: str) -> ModelConfig:
    if method == "experts":
        return sparse_model(vocab_size=VOCAB, num_hidden_layers=4)
    return gated_model(vocab_size=VOCAB, num_hidden_layers=4, tie_word_embeddings=method in ("freeze", "tied"))


def observe(name: str, layout: ParallelLayout) -> tuple[list[float], Boxes, Boxes]:
    """Losses and norms of all steps, the gradients of the first, what was trained after the last."""
    model, table = model_of(name), METHODS[name]
    adapter = adapters()[table.model_dump()["kind"]]
    mesh = Mesh.create(layout, torch.device("cpu"))
    built = build_stage(model, mesh, dtype=torch.float64, adapt=lambda stage: adapter.attach(table, stage))
    initialise(built.parameters, model, seed=7)
    for parameter in built.parameters:
        shapes = {part.name: part.shape for part in parameter.spec.parts}
        for shard, view in shard_views(parameter, parameter.data):
            if is_factor(shard.name) and parameter.spec.init in ("zeros", "ones"):
                view.add_(normal(shard.name, shapes[shard.name], shard.box, seed=11, std=0.3).to(view.dtype))
    trainable = [parameter for parameter in built.parameters if parameter.trainable]
    pipeline = Pipeline(built, mesh, schedule_named("1f1b"))
    numbers = [backward(pipeline, model, 0)]
    complete_gradients(trainable, mesh)
    numbers.append(float(gradient_norm(built.parameters, mesh)))
    gradients = boxes_of(trainable, gradients=True)
    for parameter in trainable:
        parameter.parameter.grad = None
    optimizer = Optimizer(built.parameters, mesh, ADAMW, rate=lambda spec: adapter.rate(table, model, spec))
    for step in range(STEPS):
        numbers += [backward(pipeline, model, step), float(optimizer.update(1e-2))]
    return numbers, gradients, boxes_of(trainable)


@cache
def reference(method: str) -> tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    numbers, gradients, weights = observe(method, ParallelLayout())
    return numbers, whole(gradients), whole(weights)


def assert_parity(method: str, layout: ParallelLayout) -> None:
    numbers, gradients, weights = reference(method)
    seen = set()
    for there, gradients_there, weights_there in run_ranks(layout.world_size, observe, method, layout):
        assert there == pytest.approx(numbers, rel=TOLERANCE)
        if gradients_there:
            assert largest_difference(gradients_there, gradients) < TOLERANCE
            assert largest_difference(weights_there, weights) < TOLERANCE
        seen |= {name for name, _, _ in weights_there}
    assert seen == set(weights)


CASES = [
    ("full", ParallelLayout(tp=2, pp=2)),
    ("freeze", ParallelLayout(pp=2, dp=2)),
    ("lora", ParallelLayout(tp=2)),
    ("rslora", ParallelLayout(cp=2)),
    ("dora", ParallelLayout(tp=2, cp=2, sequence_parallel=True)),
    ("dora of some", ParallelLayout(dp=2, shard="zero3")),
    ("lora+", ParallelLayout(tp=2)),
    ("embedding", ParallelLayout(tp=2, dp=2, shard="zero3", sequence_parallel=True)),
    ("head", ParallelLayout(tp=2, pp=2)),
    ("tied", ParallelLayout(tp=2, pp=2)),
    ("experts", ParallelLayout(tp=2, dp=2, ep=2, shard="zero2", sequence_parallel=True)),
]
DEGREES = tuple(product((1, 2, 4), (1, 2), (1, 2), (1, 2)))


@pytest.mark.parametrize(("method", "layout"), CASES, ids=str)
def test_a_method_trains_what_one_process_trains(method: str, layout: ParallelLayout) -> None:
    assert_parity(method, layout)


@pytest.mark.exhaustive
@pytest.mark.parametrize("degrees", DEGREES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_at_every_layout(method: str, degrees: tuple[int, int, int, int]) -> None:
    tp, pp, dp, cp = degrees
    assert_parity(method, ParallelLayout(tp=tp, pp=pp, dp=dp, cp=cp))
