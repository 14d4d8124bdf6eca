"""The parity matrix: which cases are run, how far each lies from one process, and the table of it in docs/parity.md."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.helpers.pairwise import Case, Pair, pairwise
from tests.helpers.parity import largest_difference
from tests.helpers.ranks import run_ranks
from tests.parity.case import DIMENSIONS, PLAIN, RANKS, name_of, reference_of, refusal
from tests.parity.run import Seen, train

TOLERANCE = 1e-10
"""Relative. float64 keeps about 1e-16 a sum, three updates divide by small moments; a wrong collective is off by far
more."""
SP: Case = {"tp": 2, "sp": True}
QUICK: tuple[Case, ...] = (
    {"model": "gated", **SP, "pp": 2, "schedule": "1f1b"},
    {"model": "biased", "cp": 2, "context": "ring", "documents": True, "dp": 2, "shard": "zero2", "tied": False},
    {"model": "sliding", "cp": 2, "recompute": "full", "documents": True},
    {
        "model": "post",
        "pp": 2,
        "schedule": "zbv",
        "vpp": 2,
        "tied": False,
        "optimizer": "muon",
        "recompute": "selective",
    },
    {"model": "parallel", "tp": 2, "dp": 2, "shard": "zero3", "loss_chunk": 5},
    {"model": "masked", **SP, "pp": 2, "schedule": "interleaved", "vpp": 2},
    {"model": "answering", "tp": 2, "pp": 2, "schedule": "zb_h1", "loss_chunk": 5},
    {"model": "sparse", **SP, "etp": 1, "dp": 2, "ep": 2, "shard": "zero1"},
    {"model": "grouped", "cp": 2, "dp": 2, "ep": 4, "head": "labels", "tied": False},
    {"model": "latent", "dp": 2, "ep": 2, "pp": 2, "schedule": "dualpipev", "vpp": 2},
)
"""Cases of four ranks at most in which every model and every schedule is seen; `make test` runs these."""
WHOLE: tuple[Case, ...] = (
    {"tp": 2, "pp": 2, "dp": 2},
    {"tp": 2, "pp": 2, "cp": 2, "sp": True},
    {"tp": 4, "sp": True, "dp": 2, "shard": "zero2"},
    {"cp": 4, "context": "ring", "documents": True, "model": "biased"},
    {"cp": 4, "tp": 2, "recompute": "full"},
    {"dp": 4, "shard": "zero3", "shard_size": 2, "optimizer": "muon"},
    {"model": "grouped", **SP, "pp": 2, "dp": 2, "ep": 2, "schedule": "1f1b"},
    {"model": "sparse", **SP, "etp": 1, "dp": 2, "cp": 2, "ep": 4, "context": "ring"},
    {"model": "latent", "cp": 4, "ep": 4, "dp": 2, "shard": "zero2"},
    {"model": "latent", **SP, "pp": 2, "cp": 2, "ep": 2, "schedule": "zb_h1"},
)
"""Cases that are run whatever the pairs need: every axis that 8 ranks have room for, and longer axes."""


@dataclass(frozen=True)
class Distance:
    """The largest relative difference of any rank from one process."""

    loss: float
    norm: float
    gradient: float
    weight: float
    router: float

    @property
    def largest(self) -> float:
        return max(self.loss, self.norm, self.gradient, self.weight, self.router)


@cache
def matrix() -> tuple[list[Case], set[Pair]]:
    """The cases, and the pairs of choices that no configuration allows."""
    begin = [{**PLAIN, **case} for case in QUICK + WHOLE]
    return pairwise(DIMENSIONS, lambda case: refusal(case) is None, begin=begin)


def ranks_of(case: Case) -> int:
    """How many processes a case takes."""
    found = 1
    for axis in ("tp", "pp", "cp", "dp"):
        found *= case.get(axis, 1)
    assert found <= RANKS, case
    return found


def distance(case: Case, device: str = "cpu") -> Distance:
    """Runs a case on its ranks and compares it with one process on the same kind of device."""
    ranks = ranks_of(case)
    with tempfile.TemporaryDirectory() as folder:
        return distance_of(case, run_ranks(ranks, train, case, folder, ranks, device, device=device), device)


def distance_of(case: Case, seen: list[Seen], device: str = "cpu") -> Distance:
    """How far what ranks saw of a case lies from one process on `device`."""
    expected = _reference(tuple(sorted(reference_of(case).items())), device)
    gradients = {name: values for name, _, values in expected.gradients}
    weights = {name: values for name, _, values in expected.weights}
    assert {name for one in seen for name, _, _ in one.weights} == set(weights), "a tensor is held by no rank"
    return Distance(
        loss=max(_relative(one.losses, expected.losses) for one in seen),
        norm=max(_relative(one.norms, expected.norms) for one in seen),
        gradient=max(largest_difference(one.gradients, gradients) for one in seen),
        weight=max(largest_difference(one.weights, weights) for one in seen),
        router=max(_relative(one.routers, expected.routers) for one in seen),
    )


@cache
def _reference(choices: tuple[tuple[str, object], ...], device: str) -> Seen:
    with tempfile.TemporaryDirectory() as folder:
        return train(dict(choices), folder, 1, device)


def _relative(these: list[float], those: list[float]) -> float:
    assert len(these) == len(those)
    return max((abs(a - b) / max(abs(b), 1e-9) for a, b in zip(these, those, strict=True)), default=0.0)


def table(found: Iterator[tuple[Case, Distance]]) -> Iterator[str]:
    """Lines of docs/parity.md, one a case as it is done."""
    names = list(DIMENSIONS)
    yield f"| {' | '.join(names)} | ranks | largest difference |"
    yield "|" + "---|" * (len(names) + 2)
    for case, off in found:
        yield f"| {' | '.join(str(case[name]) for name in names)} | {ranks_of(case)} | {off.largest:.0e} |"


PAGE = Path(__file__).parents[2] / "docs" / "parity.md"
HEAD = """# Parity

<!-- Written by `make parity`; a test keeps its cases current. -->

Each line is three optimizer steps of a small model in float64 over several processes, against the same on one process:
the loss and gradient norm of every step, every gradient of the first, every weight after the last; of routers their
losses and the load of experts at every step. The largest relative difference must stay below 1e-10. The cases are
chosen so that every two choices that a configuration allows meet in one of them; which it refuses, and why, stands in
[capabilities](capabilities.md).

Models stand for families by their features: gated for llama, qwen and phi3, biased for gpt2, sliding for gemma2 and
gemma3, post for olmo2, parallel for gpt_neox and stablelm, masked for bert, answering for t5, sparse for mixtral and
qwen's experts, grouped for sigmoid routers in groups, latent for deepseek_v3.

"""


def write() -> None:
    """Runs every case, prints its line, and writes the page when all agree."""
    cases, _ = matrix()
    lines = []
    worst = 0.0

    def run() -> Iterator[tuple[Case, Distance]]:
        nonlocal worst
        for case in cases:
            off = distance(case)
            worst = max(worst, off.largest)
            if off.largest > TOLERANCE:
                raise SystemExit(f"{name_of(case)}: {off}")
            yield case, off

    for line in table(run()):
        print(line, flush=True)
        lines.append(line)
    PAGE.write_text(HEAD + "\n".join(lines) + "\n")


if __name__ == "__main__":
    write()
