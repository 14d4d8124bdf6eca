"""Few cases in which every pair of choices meets: enough to show most faults of combined features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

Case = dict[str, Any]
Pair = tuple[tuple[str, Any], tuple[str, Any]]


def pairs_of(case: Mapping[str, Any]) -> set[Pair]:
    """Every two choices that meet in `case`."""
    return set(combinations(sorted(case.items()), 2))


def pairwise(
    dimensions: Mapping[str, Sequence[Any]], allowed: Callable[[Case], bool], *, begin: Sequence[Case] = ()
) -> tuple[list[Case], set[Pair]]:
    """Cases, those of `begin` first, in which every possible pair of choices meets; and the pairs that are impossible.

    `allowed` also judges cases of which only some dimensions are chosen: it refuses one only when no completion of it
    is allowed. The same arguments give the same cases.
    """
    names = sorted(dimensions)
    missing: dict[Pair, None] = {}
    for one, other in combinations(names, 2):
        for left, right in product(dimensions[one], dimensions[other]):
            missing[(one, left), (other, right)] = None
    cases = [dict(case) for case in begin]
    for case in cases:
        _strike(missing, case)
    impossible: set[Pair] = set()
    while missing:
        pair = next(iter(missing))
        case = _complete(dict(pair), names, dimensions, allowed, missing)
        if case is None:
            impossible.add(pair)
            del missing[pair]
            continue
        cases.append(case)
        _strike(missing, case)
    return cases, impossible


def _strike(missing: dict[Pair, None], case: Case) -> None:
    for pair in pairs_of(case):
        missing.pop(pair, None)


def _complete(
    case: Case,
    names: Sequence[str],
    dimensions: Mapping[str, Sequence[Any]],
    allowed: Callable[[Case], bool],
    missing: Mapping[Pair, None],
) -> Case | None:
    """The first allowed completion of `case`, trying choices that meet most of the missing pairs first."""
    if not allowed(case):
        return None
    open_names = [name for name in names if name not in case]
    if not open_names:
        return case
    name = open_names[0]

    def gain(value: Any) -> int:
        new = (name, value)
        return sum(tuple(sorted((new, chosen))) in missing for chosen in case.items())

    for value in sorted(dimensions[name], key=gain, reverse=True):
        found = _complete({**case, name: value}, names, dimensions, allowed, missing)
        if found is not None:
            return found
    return None
