"""Pipeline schedules as data: what each stage computes, in which order. No torch.

One file a schedule; each exposes SCHEDULE. Sends and receives are not written down: they follow from the actions. The
executor (pretrain/pipeline.py) and the simulator (pretrain/simulate.py) read the same tuples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from workbench.registry import discover
from workbench.spec.layout import Placement

Kind = Literal["F", "B", "I", "W"]
Actions = Callable[[int, int, int, int], "tuple[Action, ...]"]


@dataclass(frozen=True, slots=True)
class Action:
    """One computation of a stage for a microbatch: the forward (F) or the backward (B), or half a backward: the
    gradient of the input (I) and, any time after it, that of the weights (W).

    `chunk` is the virtual stage within this stage, for schedules that give a stage several.
    """

    kind: Kind
    microbatch: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"{self.kind}{self.microbatch}" + (f".{self.chunk}" if self.chunk else "")


@dataclass(frozen=True, slots=True)
class Schedule:
    """A named rule: `actions(stage, num_stages, num_microbatches, num_chunks)` is pure and gives a stage's actions.

    It takes any number of microbatches. num_chunks: the chunks a stage that it takes, None for any.
    splits_backward: whether it has I and W, so that stages must be able to compute a backward in halves.
    """

    name: str
    summary: str
    actions: Actions
    placement: Placement = "loop"
    num_chunks: int | None = 1
    splits_backward: bool = False

    def faults(self, num_chunks: int) -> list[str]:
        """Why it cannot run with `num_chunks` chunks a stage, if it cannot."""
        if self.takes(num_chunks):
            return []
        others = ", ".join(other.name for other in schedules().values() if other.takes(num_chunks))
        return [
            f"schedule={self.name!r} gives each stage {self.num_chunks} chunk{'' if self.num_chunks == 1 else 's'} of "
            f"layers, not vpp={num_chunks}; use vpp = {self.num_chunks} or another schedule ({others})"
        ]

    def takes(self, num_chunks: int) -> bool:
        """Whether it can run with `num_chunks` chunks a stage."""
        return self.num_chunks in (None, num_chunks)


def schedules() -> dict[str, Schedule]:
    """Every pipeline schedule by name."""
    return discover("pretrain.schedules", "SCHEDULE")


def schedule_named(name: str) -> Schedule:
    """The pipeline schedule of that name; ValueError with the known ones."""
    known = schedules()
    if name not in known:
        raise ValueError(f"no schedule is called {name!r}; there are {', '.join(known)}")
    return known[name]


def forward_turns(num_stages: int, num_microbatches: int, num_chunks: int) -> tuple[tuple[int, int], ...]:
    """(microbatch, chunk) of each forward of a stage: groups of at least `num_stages` microbatches go through all
    chunks one after the other, so that no stage waits and few microbatches are under way (arXiv:2104.04473, sec. 2.2).

    Groups are as even as can be. Sound at any placement: what a turn needs comes earlier in the same order.
    """
    return tuple(
        (microbatch, chunk)
        for group in microbatch_groups(num_stages, num_microbatches)
        for chunk in range(num_chunks)
        for microbatch in group
    )


def microbatch_groups(num_stages: int, num_microbatches: int) -> tuple[range, ...]:
    """The microbatches in groups of `num_stages`, or a little more where that does not divide them."""
    count = max(num_microbatches // num_stages, 1)
    starts = [-(-num_microbatches * i // count) for i in range(count + 1)]
    return tuple(range(first, stop) for first, stop in pairwise(starts))
