"""Plays the actions of all stages against a clock: proves a schedule sound and says what it costs. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pretrain.schedules import Action, Kind, Schedule

Task = tuple[Kind, int, int]
"""What is computed: kind, microbatch, virtual stage (chunk * num_stages + stage)."""


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
    """What a schedule costs: `peak_in_flight` counts, per stage, forwards whose backward is still to come."""

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


def simulate(
    schedule: Schedule,
    num_stages: int,
    num_microbatches: int,
    *,
    durations: Mapping[Kind, float] | None = None,
    transfer: float = 0.0,
) -> Simulation:
    """The run of `schedule` on stages that compute one action at a time; sends take `transfer` and never block.

    Raises ScheduleFault when a forward or backward is missing or doubled, messages between two stages would arrive in
    another order than they are awaited, or no stage can go on.
    """
    plan = tuple(schedule.actions(stage, num_stages, num_microbatches) for stage in range(num_stages))
    check(plan, num_microbatches)
    length = durations or {"F": 1.0, "B": 1.0}
    spans = _play(plan, lambda action: length[action.kind], transfer)
    makespan = max(span.end for span in spans)
    busy = sum(span.end - span.start for span in spans)
    return Simulation(
        spans=tuple(spans),
        makespan=makespan,
        bubble=1 - busy / (makespan * num_stages),
        peak_in_flight=tuple(_peak(actions) for actions in plan),
    )


def check(plan: Sequence[Sequence[Action]], num_microbatches: int) -> None:
    """Raises ScheduleFault unless each stage does every F and B once, F first, and messages keep their order."""
    chunks = {action.chunk for actions in plan for action in actions}
    for stage, actions in enumerate(plan):
        expected = {Action(kind, m, c) for kind in ("F", "B") for m in range(num_microbatches) for c in chunks}
        if len(actions) != len(set(actions)):
            raise ScheduleFault(f"stage {stage} repeats an action: {_words(actions)}")
        if set(actions) != expected:
            wrong = expected.symmetric_difference(actions)
            raise ScheduleFault(f"stage {stage} lacks or invents {_words(sorted(wrong, key=str))}")
        place = {action: i for i, action in enumerate(actions)}
        for action in actions:
            if action.kind == "B" and place[Action("F", action.microbatch, action.chunk)] > place[action]:
                raise ScheduleFault(f"stage {stage} runs {action} before its forward: {_words(actions)}")
    _check_message_order(plan)


def needs(task: Task, num_virtual: int) -> tuple[Task, ...]:
    """What must be done before `task`, on whichever stage."""
    kind, microbatch, virtual = task
    if kind == "F":
        return (("F", microbatch, virtual - 1),) if virtual > 0 else ()
    own: Task = ("F", microbatch, virtual)
    return (own, ("B", microbatch, virtual + 1)) if virtual + 1 < num_virtual else (own,)


def _check_message_order(plan: Sequence[Sequence[Action]]) -> None:
    """A directed pair of stages is one queue: what one end sends first, the other end must await first."""
    num_stages = len(plan)
    num_virtual = num_stages * (1 + max((a.chunk for actions in plan for a in actions), default=0))
    sent: dict[tuple[int, int, Kind], list[Task]] = {}
    awaited: dict[tuple[int, int, Kind], list[Task]] = {}
    for stage, actions in enumerate(plan):
        for action in actions:
            task = _task(action, stage, num_stages)
            step = 1 if action.kind == "F" else -1
            follower = task[2] + step
            if 0 <= follower < num_virtual and follower % num_stages != stage:
                sent.setdefault((stage, follower % num_stages, action.kind), []).append(task)
            leader = task[2] - step
            if 0 <= leader < num_virtual and leader % num_stages != stage:
                queue = awaited.setdefault((leader % num_stages, stage, action.kind), [])
                queue.append((action.kind, action.microbatch, leader))
    for pair in sorted(sent.keys() | awaited.keys()):
        if sent.get(pair) != awaited.get(pair):
            raise ScheduleFault(
                f"stage {pair[0]} sends {sent.get(pair)} but stage {pair[1]} awaits {awaited.get(pair)}; "
                "messages between two stages must keep their order"
            )


def _play(plan: Sequence[Sequence[Action]], length: Callable[[Action], float], transfer: float) -> list[Span]:
    num_stages = len(plan)
    num_virtual = num_stages * (1 + max(a.chunk for actions in plan for a in actions))
    done: dict[Task, float] = {}
    clock, next_action = [0.0] * num_stages, [0] * num_stages
    spans: list[Span] = []
    while any(i < len(actions) for i, actions in zip(next_action, plan, strict=True)):
        moved = False
        for stage, actions in enumerate(plan):
            while next_action[stage] < len(actions):
                action = actions[next_action[stage]]
                task = _task(action, stage, num_stages)
                before = needs(task, num_virtual)
                if any(other not in done for other in before):
                    break
                ready = [done[o] + (transfer if o[2] % num_stages != stage else 0.0) for o in before]
                start = max([clock[stage], *ready])
                clock[stage] = done[task] = start + length(action)
                spans.append(Span(stage, action, start, clock[stage]))
                next_action[stage] += 1
                moved = True
        if not moved:
            waiting = {s: str(plan[s][i]) for s, i in enumerate(next_action) if i < len(plan[s])}
            raise ScheduleFault(f"no stage can go on; each waits at {waiting}")
    return spans


def _peak(actions: Sequence[Action]) -> int:
    held = peak = 0
    for action in actions:
        held += 1 if action.kind == "F" else -1
        peak = max(peak, held)
    return peak


def _task(action: Action, stage: int, num_stages: int) -> Task:
    return action.kind, action.microbatch, action.chunk * num_stages + stage


def _words(actions: Sequence[Action]) -> str:
    return " ".join(map(str, actions))
