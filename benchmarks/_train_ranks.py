"""The engine on two ranks of one thread each, beside one process on two threads: what parallelism costs on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch

from _common import Claim, claim, say
from pretrain.config import OptimTable
from pretrain.optimizer import Optimizer
from pretrain.pipeline import Pipeline
from pretrain.schedules import schedule_named
from tests.helpers.ranks import RankPool
from workbench.models.batch import Batch
from workbench.models.build import build_stage, initialise
from workbench.parallel.host_memory import keep_freed_memory
from workbench.parallel.host_products import quicken_products
from workbench.parallel.mesh import Mesh
from workbench.spec.layout import ParallelLayout
from workbench.spec.model import ModelConfig

Result = TypeVar("Result")
LAYOUTS = {
    "tp=2 with sequence parallelism": (ParallelLayout(tp=2, sequence_parallel=True), 4, 0.85),
    # The head is as much work as one and a half layers, so the last stage holds fewer.
    "pp=2, 1f1b, 8 microbatches": (ParallelLayout(pp=2, pp_layout=(5, 3)), 1, 0.8),
}
ONE = (ParallelLayout(), 4)


def quickened(work: Callable[[], Result]) -> Callable[[], Result]:
    """`work` with the products that pretraining asks for; what runs beside it keeps torch's own."""

    def run() -> Result:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(_quick_precision())
        try:
            return work()
        finally:
            torch.set_float32_matmul_precision(before)

    return run


@cache
def _quick_precision() -> str:
    before = torch.get_float32_matmul_precision()
    quicken_products()
    found = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(before)
    return found


def seconds_a_step(
    model: ModelConfig, layout: ParallelLayout, dtype: torch.dtype, ids: torch.Tensor, micro_size: int
) -> float:
    """The faster of two steps over all rows of `ids` [B, T + 1], after one that warms up; called on every rank."""
    keep_freed_memory()
    mesh = Mesh.create(layout, torch.device("cpu"))
    built = build_stage(model, mesh, compute_dtype=dtype)
    initialise(built.parameters, model, seed=1)
    optimizer = Optimizer(built.parameters, mesh, OptimTable())
    pipeline = Pipeline(built, mesh, schedule_named("1f1b"))
    rows = [part.contiguous() for part in ids.split(micro_size)]
    batches = [Batch(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in rows]
    scale = torch.tensor(1.0 / ids[:, 1:].numel(), dtype=torch.float64)

    def train() -> None:
        pipeline.train(batches, scale)
        optimizer.update(1e-4)

    step, found = quickened(train), []
    for _ in range(3):
        mesh.world.barrier()
        started = time.perf_counter()
        step()
        mesh.world.barrier()
        found.append(time.perf_counter() - started)
    return min(found[1:])


def measure(
    pool: RankPool, model: ModelConfig, dtype: torch.dtype, *, short: str, rounds: int, sequences: int
) -> list[Claim]:
    """Claims of each layout against one process, by the medians of the ratios within a round."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.vocab_size, (sequences, model.max_position_embeddings + 1), generator=generator)
    layouts = {
        name: value for name, value in LAYOUTS.items() if value[0].pp_layout is None or model.num_hidden_layers == 8
    }
    ratios: dict[str, list[float]] = {name: [] for name in layouts}
    rates: dict[str, list[float]] = {name: [] for name in ("one process", *layouts)}
    for turn in range(rounds):
        alone = seconds_a_step(model, ONE[0], dtype, ids, ONE[1])
        rates["one process"].append(ids[:, 1:].numel() / alone)
        for name, (layout, micro_size, _) in layouts.items():
            taken = max(pool.run(seconds_a_step, model, layout, dtype, ids, micro_size))
            ratios[name].append(alone / taken)
            rates[name].append(ids[:, 1:].numel() / taken)
        say(f"{short}, two ranks: round {turn + 1} of {rounds}")
    found = [
        claim(f"{short}: {name} / one process", statistics.median(ratios[name]), at_least=bar)
        for name, (_, _, bar) in layouts.items()
    ]
    return found + [
        claim(f"{short}: engine, {name}, 8 sequences", statistics.median(values), unit="tokens/s")
        for name, values in rates.items()
    ]
