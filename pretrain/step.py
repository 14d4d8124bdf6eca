"""One training step: agree, forward and backward through the pipeline, update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pretrain.loss_scale import LossScale
from pretrain.objective import Rows, to_batch
from pretrain.optimizer import Optimizer
from pretrain.pipeline import Pipeline
from workbench.models.balance import ExpertLoad, balance_experts, take_load
from workbench.parallel.mesh import Mesh


@dataclass(frozen=True)
class Agreement:
    """What all ranks know before a step: its labels, those of pairs of segments and tokens over all of them, and
    whether one wants to stop."""

    num_labels: int
    num_pairs: int
    num_tokens: int
    stop: bool


@dataclass(frozen=True)
class StepResult:
    """What a step did. `loss_sum` is this rank's part; `gradient_norm` is the same on every rank, before clipping.

    `skipped`: the gradient overflowed in fp16, so that nothing was updated. `expert_load`: where a model has experts.
    """

    loss_sum: torch.Tensor
    gradient_norm: torch.Tensor
    num_labels: int
    skipped: bool
    expert_load: ExpertLoad | None = None

    def mean_loss(self, mesh: Mesh) -> float:
        """The loss per label over the whole step; communicates over the world."""
        # Tensor ranks hold copies of the same loss, and stages where the network does not end hold zero.
        part = self.loss_sum if mesh.tp.rank == 0 else torch.zeros_like(self.loss_sum)
        return mesh.world.all_reduce(part.clone()).item() / max(self.num_labels, 1)


def agree(rows: Sequence[Rows], mesh: Mesh, *, stop: bool) -> Agreement:
    """Sums labels and tokens over data-parallel ranks, wishes to stop over all: one small all-reduce on the CPU."""
    counts_here = mesh.tp.rank == 0 and mesh.cp.rank == 0 and mesh.pp.rank == 0
    counted = [(r.num_labels, r.num_pairs, r.num_tokens) for r in rows] if counts_here else []
    counts = [sum(column) for column in zip(*counted, strict=True)] or [0, 0, 0]
    total = mesh.world.all_reduce(torch.tensor([*counts, int(stop)], dtype=torch.int64)).tolist()
    labels, pairs, tokens, wishes = total
    return Agreement(labels, pairs, tokens, bool(wishes))


def train_step(
    pipeline: Pipeline,
    optimizer: Optimizer,
    rows: Sequence[Rows],
    *,
    agreed: Agreement,
    lr: float,
    seed: int,
    step: int,
    loss_scale: LossScale | None = None,
) -> StepResult:
    """Updates the parameters by the gradient of the mean loss of the step's labels, of all ranks; where there are pairs
    of segments, plus that of their labels.

    A mean is a global sum over a global count, so it does not depend on how rows lie in microbatches and ranks.
    """
    num_labels = agreed.num_labels
    device = pipeline.mesh.device
    # The loss of all labels is divided by the number of those of tokens.
    pair_weight = num_labels / max(agreed.num_pairs, 1)
    batches = [to_batch(microbatch, device, seed=seed, step=step, pair_weight=pair_weight) for microbatch in rows]
    factor = (1.0 if loss_scale is None else loss_scale.value) / max(num_labels, 1)
    updates = optimizer.step_count
    loss_sum = pipeline.train(batches, torch.tensor(factor, dtype=torch.float64, device=device))
    norm = optimizer.update(lr, loss_scale)
    skipped, stage = optimizer.step_count == updates, pipeline.stage
    load = take_load(stage, pipeline.mesh)
    if load is not None and not skipped:
        balance_experts(stage, load)
    return StepResult(loss_sum, norm, num_labels, skipped, load)
