"""Pipeline schedules as data: what each stage computes, in which order. No torch.

One file a schedule; each exposes SCHEDULE. Sends and receives are not written down: they follow from the actions. The
executor (pretrain/pipeline.py) and the simulator (pretrain/simulate.py) read the same tuples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from workbench.registry import discover
from workbench.spec.layout import Placement

Kind = Literal["F", "B"]


@dataclass(frozen=True, slots=True)
class Action:
    """One computation of a stage: the forward (F) or the backward (B) of a microbatch.

    `chunk` is the virtual stage within this stage, for schedules that give a stage several.
    """

    kind: Kind
    microbatch: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"{self.kind}{self.microbatch}" + (f".{self.chunk}" if self.chunk else "")


@dataclass(frozen=True, slots=True)
class Schedule:
    """A named rule: `actions(stage, num_stages, num_microbatches)` is pure and gives that stage's actions in order."""

    name: str
    summary: str
    actions: Callable[[int, int, int], tuple[Action, ...]]
    placement: Placement = "loop"


def schedule_named(name: str) -> Schedule:
    """The pipeline schedule of that name; ValueError with the known ones."""
    known: dict[str, Schedule] = discover("pretrain.schedules", "SCHEDULE")
    if name not in known:
        raise ValueError(f"no schedule is called {name!r}; there are {', '.join(known)}")
    return known[name]
