"""What replicas share, counted: collectives of a step, and bytes that a rank holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.pipeline import Pipeline
from pretrain.schedules import schedule_named
from tests.helpers.models import gated_model
from tests.helpers.ranks import run_ranks
from workbench.models.batch import Batch
from workbench.models.build import build_stage, initialise
from workbench.parallel.mesh import Mesh
from workbench.spec.layout import ParallelLayout

MICROBATCHES = 3
GROUPS = 4 + 1  # each of the model's four layers, and the rest of it
COLLECTIVES = {
    torch.ops.c10d._allgather_base_.default: "gathered",
    torch.ops.c10d._reduce_scatter_base_.default: "scattered",
    torch.ops.c10d.allreduce_.default: "reduced",
}


class Counter(TorchDispatchMode):
    """Counts collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.found = dict.fromkeys(COLLECTIVES.values(), 0)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in COLLECTIVES:
            self.found[COLLECTIVES[function]] += 1
        return function(*args, **(kwargs or {}))


def count_collectives(layout: dict[str, Any]) -> dict[str, int]:
    """The collectives of one step of a few microbatches on this rank."""
    model = gated_model()
    mesh = Mesh.create(ParallelLayout(**layout), torch.device("cpu"))
    built = build_stage(model, mesh)
    initialise(built.parameters, model, seed=1)
    ids = torch.zeros(1, 8, dtype=torch.int64)
    pipeline = Pipeline(built, mesh, schedule_named("gpipe"))
    with Counter() as counter:
        pipeline.train([Batch(ids, ids)] * MICROBATCHES, torch.tensor(1.0))
    return counter.found


@pytest.mark.parametrize(
    ("layout", "gathered", "scattered", "reduced"),
    [
        ({"dp": 2, "shard": "none"}, 0, 0, GROUPS),
        ({"dp": 2, "shard": "zero1"}, GROUPS, GROUPS, 0),
        ({"dp": 2, "shard": "zero2"}, GROUPS, MICROBATCHES * GROUPS, 0),
        # Forward and backward of each microbatch gather each layer anew, and the rest once for both.
        ({"dp": 2, "shard": "zero3"}, MICROBATCHES * (2 * (GROUPS - 1) + 1), MICROBATCHES * GROUPS, 0),
        ({"dp": 4, "shard": "zero1", "shard_size": 2}, GROUPS, GROUPS, GROUPS),
        ({"dp": 4, "shard": "zero2", "shard_size": 2}, GROUPS, MICROBATCHES * GROUPS, GROUPS),
    ],
    ids=str,
)
def test_replicas_communicate_as_often_as_their_sharding_says(
    layout: dict[str, Any], gathered: int, scattered: int, reduced: int
) -> None:
    for found in run_ranks(layout["dp"], count_collectives, layout):
        assert found == {"gathered": gathered, "scattered": scattered, "reduced": reduced}
