"""The bubble of every pipeline schedule at 2 and 4 stages: its formula, the simulator and the executor on gloo.

python benchmarks/pipeline.py [--quick] [--json]

The stages are equal and compute nothing: forward, the gradient of the input and that of the weights are sleeps of one
length, so that four ranks on two cores do not take time from each other, and everything else is the real executor.
Busy is what a stage has slept; the bubble is the rest of the time from the first stage's start to the last one's end.
At two stages real layers are timed too (busy is the CPU time of the rank's thread), for context.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from _common import Claim, claim, main, say
from pretrain.pipeline import Pipeline
from pretrain.schedules import Schedule, schedule_named, schedules
from pretrain.simulate import simulate
from tests.helpers.ranks import run_ranks
from workbench.models.batch import Batch
from workbench.models.build import BuiltStage, StageOptions, build_stage, initialise
from workbench.parallel.data import DataParallel
from workbench.parallel.gemm import Gemm
from workbench.parallel.mesh import Mesh
from workbench.spec.layout import ParallelLayout, virtual_stage
from workbench.spec.model import ModelConfig

MAX_POINTS = 10.0
"""How far, in percentage points, a measured bubble may be from its formula."""
TOKENS, HIDDEN = 16, 8


@dataclass
class Nap:
    """What a product of a chunk takes, and how long all of them have taken."""

    seconds: float
    slept: float = field(default=0.0)

    def take(self, times: int = 1) -> None:
        """Sleeps for `times` products."""
        started = time.perf_counter()
        time.sleep(times * self.seconds)
        self.slept += time.perf_counter() - started


@dataclass(frozen=True)
class WaitingNap:
    """A gradient of weights that is still to be slept."""

    nap: Nap

    def add(self) -> None:
        """Sleeps it."""
        self.nap.take()


class _Layer(torch.autograd.Function):
    """Passes through; sleeps one product forward and, apart or at once, two backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, nap: Nap, gemm: Gemm) -> torch.Tensor:
        nap.take()
        ctx.nap, ctx.gemm = nap, gemm
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        if ctx.gemm.waiting is None:
            ctx.nap.take(2)
        else:
            ctx.nap.take()
            ctx.gemm.waiting.append(WaitingNap(ctx.nap))
        return grad.clone(), None, None


class SleepingStage(nn.Module):
    """What the executor needs of a stage, with a sleep for each of its chunks."""

    def __init__(self, mesh: Mesh, nap: Nap, gemm: Gemm) -> None:
        super().__init__()
        layout = mesh.layout
        self.model, self.compute_dtype, self._nap, self._gemm = (
            SimpleNamespace(hidden_size=HIDDEN),
            torch.float32,
            nap,
            gemm,
        )
        self.virtual = [virtual_stage(layout.placement, layout.pp, mesh.pp.rank, c) for c in range(layout.vpp)]
        self._end = layout.num_virtual - 1

    def is_last(self, chunk: int) -> bool:
        """Whether the network ends in this chunk."""
        return self.virtual[chunk] == self._end

    def forward(self, hidden: torch.Tensor | None, batch: Batch, output: str, *, chunk: int) -> torch.Tensor:
        """Hidden states after the sleep; their sum at the end of the network."""
        x = torch.ones(*batch.input_ids.shape, HIDDEN, requires_grad=True) if hidden is None else hidden
        y = _Layer.apply(x, self._nap, self._gemm)
        return y.sum() if self.is_last(chunk) else y


def mesh_of(schedule: Schedule, stages: int) -> Mesh:
    """The mesh of `stages` stages of the schedule's chunks."""
    layout = ParallelLayout(pp=stages, vpp=schedule.num_chunks or 2, placement=schedule.placement)
    return Mesh.create(layout, torch.device("cpu"))


def asleep(name: str, stages: int, microbatches: int, seconds: float, repeat: int) -> list[tuple[float, float, float]]:
    """Start, end and busy seconds of each of `repeat` steps on this rank; `seconds` is a product of a whole stage."""
    schedule = schedule_named(name)
    mesh, gemm = mesh_of(schedule, stages), Gemm()
    gemm.waiting = [] if schedule.splits_backward else None
    nap = Nap(seconds / mesh.layout.vpp)
    stage: Any = SleepingStage(mesh, nap, gemm)
    pipeline = Pipeline(BuiltStage(stage, gemm, DataParallel(stage, [], mesh, torch.float32), []), mesh, schedule)
    batches = [Batch(torch.zeros(1, TOKENS, dtype=torch.int64)) for _ in range(microbatches)]
    return timed_steps(pipeline, batches, lambda: nap.slept, repeat)


def awake(name: str, microbatches: int, layers: int, hidden: int, repeat: int) -> list[tuple[float, float, float]]:
    """As `asleep`, of real layers on two stages."""
    schedule = schedule_named(name)
    mesh = mesh_of(schedule, 2)
    model = ModelConfig(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
    )
    built = build_stage(model, mesh, options=StageOptions(split_backward=schedule.splits_backward))
    initialise(built.parameters, model, seed=1)
    ids = torch.arange(96).view(1, -1) % model.vocab_size
    return timed_steps(Pipeline(built, mesh, schedule), [Batch(ids, ids)] * microbatches, time.thread_time, repeat)


def timed_steps(pipeline: Pipeline, batches: list[Batch], busy: Any, repeat: int) -> list[tuple[float, float, float]]:
    """Start, end and what `busy()` has grown by, of each step after a first one that does not count."""
    found = []
    for _ in range(repeat + 1):
        pipeline.mesh.world.barrier()
        started, before = time.perf_counter(), busy()
        pipeline.train(batches, torch.tensor(1.0))
        found.append((started, time.perf_counter(), busy() - before))
    return found[1:]


def bubble_of(ranks: list[list[tuple[float, float, float]]]) -> float:
    """The share of the time in which a rank was not busy, in the best step: other programs only add to it.

    All ranks have one clock."""
    found = []
    for step in zip(*ranks, strict=True):
        span = max(end for _, end, _ in step) - min(start for start, _, _ in step)
        found.append(1 - sum(busy for _, _, busy in step) / (span * len(step)))
    return min(found)


def formula(schedule: Schedule, stages: int, microbatches: int) -> float:
    """Idle time over all time, in products of a chunk: p - 1 stages hand down one forward, without zero bubble also two
    backward products; busy are three products of each chunk for each microbatch."""
    idle = (stages - 1) * (1 if schedule.splits_backward else 3)
    return idle / (3 * microbatches * (schedule.num_chunks or 2) + idle)


def run(quick: bool) -> list[Claim]:
    """Each schedule's bubble, and zero bubble against 1F1B."""
    claims: list[Claim] = []
    seconds, repeat = (0.016, 2) if quick else (0.04, 5)
    for stages in (2, 4):
        microbatches = 2 * stages
        measured: dict[str, float] = {}
        for name, schedule in schedules().items():
            say(f"{name}, {stages} stages")
            expected = formula(schedule, stages, microbatches)
            played = simulate(schedule, stages, microbatches, schedule.num_chunks or 2).bubble
            measured[name] = bubble_of(run_ranks(stages, asleep, name, stages, microbatches, seconds, repeat))
            where = f"{name}, pp {stages}, {microbatches} microbatches"
            points = 100 * abs(measured[name] - expected)
            note = f"measured {measured[name]:.1%}, formula {expected:.1%}, simulated {played:.1%}"
            claims.append(
                claim(f"{where}: measured from formula", points, unit="points", at_most=MAX_POINTS, note=note)
            )
            claims.append(
                claim(f"{where}: simulated from formula", 100 * abs(played - expected), unit="points", at_most=1e-6)
            )
        for name, schedule in schedules().items():
            if schedule.splits_backward:
                gain = 100 * (measured["1f1b"] - measured[name])
                claims.append(claim(f"{name} below 1f1b, pp {stages}", gain, unit="points", at_least=0.0))
    for name, schedule in schedules().items():
        say(f"{name}, real layers")
        shape = (4, 64, 1) if quick else (8, 256, 5)
        found = bubble_of(run_ranks(2, awake, name, 4, *shape))
        note = f"formula {formula(schedule, 2, 4):.1%}; attention, norms and embedding are in no formula"
        claims.append(claim(f"{name}, pp 2, real layers: bubble", 100 * found, unit="%", note=note))
    return claims


if __name__ == "__main__":
    main(run, description=__doc__)
