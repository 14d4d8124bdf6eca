"""Schedules of two chunks a stage that go there and back, written as phrases: "F0 I1 W" is the next forward of chunk 0,
the next input gradient of chunk 1, and the weights' gradient that has waited longest."""

from __future__ import annotations

from collections import Counter, deque

from pretrain.schedules import Action, Kind


def spell(num_microbatches: int, *phrases: tuple[int, str]) -> tuple[Action, ...]:
    """The actions of phrases, each repeated, as far as they belong to the first `num_microbatches`.

    So an order for many microbatches serves for few: what is left out, all stages leave out.
    """
    found: list[Action] = []
    forwards: Counter[int] = Counter()
    backwards: Counter[int] = Counter()
    waiting: deque[Action] = deque()
    kinds: dict[str, Kind] = {"F": "F", "B": "B", "I": "I"}
    for times, phrase in phrases:
        for word in phrase.split() * times:
            if word == "W":
                half = waiting.popleft()
                found.append(Action("W", half.microbatch, half.chunk))
                continue
            kind, chunk = kinds[word[0]], int(word[1])
            done = forwards if kind == "F" else backwards
            found.append(Action(kind, done[chunk], chunk))
            done[chunk] += 1
            if kind == "I":
                waiting.append(found[-1])
    assert not waiting and set(forwards.values()) == set(backwards.values()), "phrases leave something undone"
    return tuple(action for action in found if action.microbatch < num_microbatches)
