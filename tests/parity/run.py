"""Three training steps of a case on this rank, through the trainer that users run, and what must equal one process."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from pretrain.objective import Share, to_batch
from pretrain.step import agree, train_step
from pretrain.trainer import Subject, Trainer
from tests.helpers.pairwise import Case
from tests.helpers.parity import Boxes, boxes_of, perturb
from tests.parity.case import SAMPLES, STEPS, TOKENS, config_of, model_of
from tests.pretrain.models import Noise
from workbench.models.balance import take_load
from workbench.models.build import initialise
from workbench.parallel.gradients import complete_gradients, gradient_norm
from workbench.parallel.live import LiveParameter
from workbench.parallel.mesh import Mesh
from workbench.spec.model import ModelConfig


@dataclass
class Seen:
    """What one rank saw: losses and gradient norms of each step, gradients of the first, weights after the last; of
    routers the mean losses and the load of experts at each step."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    routers: list[float] = field(default_factory=list)
    gradients: Boxes = field(default_factory=list)
    weights: Boxes = field(default_factory=list)


def train(case: Case, folder: str, ranks: int, device: str = "cpu") -> Seen:
    """What this rank sees of a case in float64."""
    model, config = model_of(case), config_of(case, folder)
    mesh = Mesh.create(config.resolve_layout(model, ranks), torch.device(device))
    subject = Subject(model, fill=lambda parameters: fill(parameters, model))
    objective = Noise(
        tokens=TOKENS,
        documents=case["documents"],
        classes=model.num_labels,
        answers=model.num_encoder_layers > 0,
        pairs=not model.causal,
    )
    trainer = Trainer(config, subject, objective, mesh, dtype=torch.float64)
    share = Share(config.batch.micro_size, mesh.dp.rank, mesh.dp.size)
    seen = Seen()
    parameters = trainer.built.parameters
    for step in range(-1, STEPS):
        rows = objective.train_rows(share, step=max(step, 0), first_sample=SAMPLES * max(step, 0), global_size=SAMPLES)
        agreed = agree(rows, mesh, stop=False)
        if step < 0:
            scale = torch.tensor(1.0 / agreed.num_labels, dtype=torch.float64, device=mesh.device)
            trainer.pipeline.train([to_batch(r, mesh.device, seed=7, step=0, pair_weight=2.5) for r in rows], scale)
            take_load(trainer.pipeline.stage, mesh)
            complete_gradients(parameters, mesh)
            seen.norms.append(float(gradient_norm(parameters, mesh)))
            seen.gradients = boxes_of(parameters, gradients=True)
            for parameter in parameters:
                parameter.parameter.grad = None
            continue
        result = train_step(trainer.pipeline, trainer.optimizer, rows, agreed=agreed, lr=1e-2, seed=7, step=step)
        seen.losses.append(result.mean_loss(mesh))
        seen.norms.append(float(result.gradient_norm))
        if result.expert_load is not None:
            seen.routers += result.expert_load.metrics(mesh, num_labels=agreed.num_labels).values()
    seen.weights = boxes_of(parameters)
    return seen


def fill(parameters: list[LiveParameter], model: ModelConfig) -> None:
    """Initial values, with norms and biases of their own."""
    initialise(parameters, model, seed=7)
    perturb(parameters)
