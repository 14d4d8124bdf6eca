"""Plays the actions of all stages against a clock: proves a schedule sound and says what it costs. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pretrain.schedules import Action, Kind, Schedule, schedule_named
from workbench.spec.layout import ParallelLayout, Placement, home, virtual_stage

if TYPE_CHECKING:
    from pretrain.config import EngineConfig

DURATIONS: Mapping[Kind, float] = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}
"""A backward multiplies matrices twice as often as a forward: once for inputs, once for weights."""

Result = tuple[Literal["F", "B", "W"], int, int]
"""What an action leaves behind for a microbatch at a virtual stage: its output (F); the gradient of its input (B), as a
whole backward and its first half both do; or the gradients of its weights (W)."""


class ScheduleFault(AssertionError):
    """A schedule computes something twice or never, or its stages wait for each other for ever."""


@dataclass(frozen=True, slots=True)
class Span:
    """One action of one stage and when it ran."""

    stage: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Simulation:
    """What a schedule costs. bubble: the share of the time that a stage waits, on average. peak_in_flight: per stage,
    the most forwards of a chunk whose activations are held at once; a backward, or its second half, frees them."""

    spans: tuple[Span, ...]
    makespan: float
    bubble: float
    peak_in_flight: tuple[int, ...]

    def drawing(self, width: int = 4) -> str:
        """One line a stage, in order of the clock, when every duration is a whole number."""
        lines = []
        for stage in range(len(self.peak_in_flight)):
            cells = [" " * width] * round(self.makespan)
            for span in (s for s in self.spans if s.stage == stage):
                for tick in range(round(span.start), round(span.end)):
                    cells[tick] = f"{span.action!s:<{width}}"
            lines.append(f"stage {stage}: " + "".join(cells).rstrip())
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Plan:
    """The actions of all stages, and where their chunks lie."""

    stages: tuple[tuple[Action, ...], ...]
    placement: Placement
    num_microbatches: int
    num_chunks: int

    def virtual(self, stage: int, action: Action) -> int:
        """The virtual stage at which `stage` runs `action`."""
        return virtual_stage(self.placement, len(self.stages), stage, action.chunk)

    def home(self, virtual: int) -> int | None:
        """The stage where a virtual stage lies; None beyond either end of the network."""
        num_stages = len(self.stages)
        return home(self.placement, num_stages, virtual)[0] if 0 <= virtual < num_stages * self.num_chunks else None


def simulate(
    schedule: Schedule,
    num_stages: int,
    num_microbatches: int,
    num_chunks: int = 1,
    *,
    durations: Mapping[Kind, float] = DURATIONS,
    transfer: float = 0.0,
) -> Simulation:
    """The run of `schedule` on stages that compute one action at a time; sends take `transfer` and never block.

    `durations` are those of one chunk. Raises ScheduleFault when an action is missing, doubled or out of its order,
    messages between two stages would arrive in another order than they are awaited, or no stage can go on.
    """
    stages = tuple(schedule.actions(stage, num_stages, num_microbatches, num_chunks) for stage in range(num_stages))
    plan = Plan(stages, schedule.placement, num_microbatches, num_chunks)
    check(plan)
    spans = _play(plan, durations, transfer)
    makespan = max(span.end for span in spans)
    busy = sum(span.end - span.start for span in spans)
    return Simulation(
        spans=tuple(spans),
        makespan=makespan,
        bubble=1 - busy / (makespan * num_stages),
        peak_in_flight=tuple(peak_in_flight(actions) for actions in stages),
    )


def simulate_step(config: EngineConfig, layout: ParallelLayout) -> Simulation:
    """A step of a run over `layout`."""
    schedule = schedule_named(config.parallel.schedule)
    return simulate(schedule, layout.pp, config.batch.num_microbatches(layout.dp), layout.vpp)


def check(plan: Plan) -> None:
    """Raises ScheduleFault unless each stage does everything once and in order, and messages keep theirs."""
    wanted = {(m, c) for m in range(plan.num_microbatches) for c in range(plan.num_chunks)}
    for stage, actions in enumerate(plan.stages):
        place = {action: i for i, action in enumerate(actions)}
        if len(actions) != len(place):
            raise ScheduleFault(f"stage {stage} repeats an action: {_words(actions)}")
        done = {kind: {(a.microbatch, a.chunk) for a in actions if a.kind == kind} for kind in DURATIONS}
        expected = {"F": wanted, "B": wanted - done["I"], "I": wanted - done["B"], "W": done["I"]}
        wrong = [Action(kind, *at) for kind in DURATIONS for at in done[kind] ^ expected[kind]]
        if wrong:
            raise ScheduleFault(f"stage {stage} lacks or invents {_words(sorted(wrong, key=str))}")
        before: dict[Kind, Kind] = {"B": "F", "I": "F", "W": "I"}
        for action in actions:
            if (
                action.kind != "F"
                and place[Action(before[action.kind], action.microbatch, action.chunk)] > place[action]
            ):
                raise ScheduleFault(f"stage {stage} runs {action} before its {before[action.kind]}: {_words(actions)}")
    _check_message_order(plan)


def result(action: Action, virtual: int) -> Result:
    """What `action` leaves behind, when `virtual` is the virtual stage that runs it."""
    return "B" if action.kind == "I" else action.kind, action.microbatch, virtual


def neighbours(action: Action, virtual: int) -> tuple[int, int]:
    """The virtual stage whose result `action` receives and the one that its own is sent to."""
    return (virtual - 1, virtual + 1) if action.kind == "F" else (virtual + 1, virtual - 1)


def _check_message_order(plan: Plan) -> None:
    """A directed pair of stages is one queue: what one end sends first, the other end must await first."""
    sent: dict[tuple[int, int, str], list[Result]] = {}
    awaited: dict[tuple[int, int, str], list[Result]] = {}
    for stage, actions in enumerate(plan.stages):
        for action in actions:
            if action.kind == "W":
                continue
            virtual = plan.virtual(stage, action)
            kind, microbatch, _ = made = result(action, virtual)
            source, target = neighbours(action, virtual)
            receiver, sender = plan.home(target), plan.home(source)
            if receiver not in (None, stage):
                sent.setdefault((stage, receiver, kind), []).append(made)
            if sender not in (None, stage):
                awaited.setdefault((sender, stage, kind), []).append((kind, microbatch, source))
    for pair in sorted(sent.keys() | awaited.keys()):
        if sent.get(pair) != awaited.get(pair):
            raise ScheduleFault(
                f"stage {pair[0]} sends {sent.get(pair)} but stage {pair[1]} awaits {awaited.get(pair)}; "
                "messages between two stages must keep their order"
            )


def _play(plan: Plan, durations: Mapping[Kind, float], transfer: float) -> list[Span]:
    num_stages = len(plan.stages)
    done: dict[Result, float] = {}
    clock, position = [0.0] * num_stages, [0] * num_stages
    spans: list[Span] = []
    moved = True
    while moved:
        moved = False
        for stage, actions in enumerate(plan.stages):
            while position[stage] < len(actions):
                action = actions[position[stage]]
                virtual = plan.virtual(stage, action)
                source = neighbours(action, virtual)[0]
                sender = None if action.kind == "W" else plan.home(source)
                made = result(action, virtual)
                ready = 0.0 if sender is None else done.get((made[0], action.microbatch, source))
                if ready is None:
                    break
                start = max(clock[stage], ready + (0.0 if sender in (None, stage) else transfer))
                clock[stage] = done[made] = start + durations[action.kind]
                spans.append(Span(stage, action, start, clock[stage]))
                position[stage] += 1
                moved = True
    waiting = {s: str(plan.stages[s][i]) for s, i in enumerate(position) if i < len(plan.stages[s])}
    if waiting:
        raise ScheduleFault(f"no stage can go on; each waits at {waiting}")
    return spans


def peak_in_flight(actions: Iterable[Action]) -> int:
    """The most forwards of `actions` whose activations are held at once."""
    held = peak = 0
    for action in actions:
        held += {"F": 1, "B": -1, "I": 0, "W": -1}[action.kind]
        peak = max(peak, held)
    return peak


def _words(actions: Sequence[Action]) -> str:
    return " ".join(map(str, actions))
