"""Every allowed pair of features trains like one process, in float64; the page that says so names just these cases."""

from __future__ import annotations

import pytest

from tests.helpers.pairwise import Case, pairs_of
from tests.parity.case import DIMENSIONS, name_of
from tests.parity.matrix import PAGE, QUICK, TOLERANCE, distance, matrix

CASES = matrix()[0]


@pytest.mark.parity
@pytest.mark.parametrize(
    "case",
    [*CASES[: len(QUICK)], *(pytest.param(case, marks=pytest.mark.exhaustive) for case in CASES[len(QUICK) :])],
    ids=name_of,
)
def test_a_case_trains_like_one_process(case: Case) -> None:
    """The first cases are quick and show every model; `make parity` runs the others."""
    off = distance(case)
    assert off.largest < TOLERANCE, off


def test_every_pair_that_is_allowed_meets_in_a_case() -> None:
    cases, impossible = matrix()
    met = set().union(*(pairs_of(case) for case in cases))
    for pair in impossible:
        assert pair not in met
    names = sorted(DIMENSIONS)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            for left in DIMENSIONS[one]:
                for right in DIMENSIONS[other]:
                    pair = ((one, left), (other, right))
                    assert pair in met or pair in impossible, pair


def test_the_page_shows_the_cases_that_are_run() -> None:
    rows = [line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")][1:]
    shown = [tuple(cell.strip("| ") for cell in row[: len(DIMENSIONS)]) for row in rows]
    assert shown == [tuple(str(case[name]) for name in DIMENSIONS) for case in matrix()[0]]
