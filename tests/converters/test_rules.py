"""Views invert, cover every element once, and touch no byte outside the box."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.rules import (
    TRANSPOSE,
    Halve,
    Merge,
    Operation,
    Permute,
    Slice,
    Split,
    images,
    origins,
    pull,
    push_pieces,
)
from workbench.spec.geometry import Box, coverage_fault

HEADS, GROUPS, D, HIDDEN = 6, 3, 4, 5
ROWS = (HEADS + 2 * GROUPS) * D
PER_GROUP = HEADS // GROUPS

# Each entry: shape of the logical tensor, and the view that leads to it from the foreign tensor.
VIEWS: dict[str, tuple[tuple[int, ...], tuple[Operation, ...]]] = {
    "rename": ((7, 3), ()),
    "transpose": ((7, 3), (TRANSPOSE,)),
    "third of a fused matrix, transposed": ((4, 5), (Slice(1, 4, 4, 12), TRANSPOSE)),
    "third of a fused bias": ((4,), (Slice(0, 8, 4, 12),)),
    "queries of a matrix interleaved by group": (
        (HEADS * D, HIDDEN),
        (Split(0, (GROUPS, PER_GROUP + 2, D)), Slice(1, 0, PER_GROUP, PER_GROUP + 2), Merge(0, (GROUPS, PER_GROUP, D))),
    ),
    "keys of a matrix interleaved by group": (
        (GROUPS * D, HIDDEN),
        (Split(0, (GROUPS, PER_GROUP + 2, D)), Slice(1, PER_GROUP, 1, PER_GROUP + 2), Merge(0, (GROUPS, 1, D))),
    ),
    "rotary halves from interleaved pairs": (
        (HEADS * D, HIDDEN),
        (Split(0, (HEADS, D // 2, 2)), Permute((0, 2, 1, 3)), Merge(0, (HEADS, 2, D // 2))),
    ),
    "rotary halves from pairs in a part of each head": ((HEADS * 7, 3), (Halve(0, 3, 7),)),
    "rotary halves from pairs at the end of a bias": ((10,), (Halve(0, 4, 10),)),
    "one layer of a stack": ((3, 4), (Slice(0, 2, 1, 5), Merge(0, (1, 3)))),
}


def foreign_shape(name: str) -> tuple[int, ...]:
    shape, view = VIEWS[name]
    for operation in reversed(view):
        shape = operation.source_shape(shape)
    return shape


def numbered(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(math.prod(shape)).reshape(shape)


@st.composite
def view_and_box(draw: st.DrawFn, foreign: bool) -> tuple[str, Box]:
    name = draw(st.sampled_from(sorted(VIEWS)))
    shape = foreign_shape(name) if foreign else VIEWS[name][0]
    offset = tuple(draw(st.integers(0, length - 1)) for length in shape)
    size = tuple(draw(st.integers(1, length - o)) for length, o in zip(shape, offset, strict=True))
    return name, Box(offset, size)


def whole_logical(name: str) -> np.ndarray:
    shape, view = VIEWS[name]
    foreign = numbered(foreign_shape(name))
    return pull(view, Box.whole(shape), lambda box: foreign[box.slices])


@given(view_and_box(foreign=False))
@settings(max_examples=300, deadline=None)
def test_a_logical_box_is_that_part_of_the_whole_and_fetches_just_its_own_elements(case: tuple[str, Box]) -> None:
    name, box = case
    foreign = numbered(foreign_shape(name))
    fetched: list[np.ndarray] = []

    def fetch(part: Box) -> np.ndarray:
        fetched.append(foreign[part.slices].ravel())
        return foreign[part.slices]

    values = pull(VIEWS[name][1], box, fetch)
    assert values.shape == box.size
    assert np.array_equal(values, whole_logical(name)[box.slices])
    assert sorted(np.concatenate(fetched)) == sorted(values.ravel())


@given(view_and_box(foreign=True))
@settings(max_examples=300, deadline=None)
def test_pushing_a_foreign_box_back_gives_the_foreign_elements(case: tuple[str, Box]) -> None:
    name, box = case
    foreign, logical = numbered(foreign_shape(name)), whole_logical(name)
    view = VIEWS[name][1]
    held = set(logical.ravel().tolist())
    wanted = {value for value in foreign[box.slices].ravel().tolist() if value in held}
    seen: list[int] = []
    for part, values in push_pieces(view, box, lambda b: logical[b.slices]):
        assert box.contains(part)
        assert np.array_equal(values, foreign[part.slices])
        seen += values.ravel().tolist()
    assert len(seen) == len(set(seen))
    assert set(seen) == wanted


@pytest.mark.parametrize("name", sorted(VIEWS))
def test_images_of_the_foreign_tensor_cover_the_logical_tensor_once(name: str) -> None:
    shape, view = VIEWS[name]
    assert coverage_fault(shape, images(view, Box.whole(foreign_shape(name)))) is None


@given(view_and_box(foreign=False))
@settings(max_examples=200, deadline=None)
def test_origins_of_a_box_lead_back_to_the_box(case: tuple[str, Box]) -> None:
    name, box = case
    view = VIEWS[name][1]
    back = [image for origin in origins(view, box) for image in images(view, origin)]
    assert all(box.contains(image) for image in back)
    assert sum(image.numel for image in back) == box.numel


def test_queries_keys_and_values_interleaved_by_group_equal_the_reference_formula() -> None:
    q, k, v = (
        numbered((HEADS * D, HIDDEN)),
        1000 + numbered((GROUPS * D, HIDDEN)),
        2000 + numbered((GROUPS * D, HIDDEN)),
    )
    fused = np.concatenate(
        [
            q.reshape(GROUPS, PER_GROUP * D, HIDDEN),
            k.reshape(GROUPS, D, HIDDEN),
            v.reshape(GROUPS, D, HIDDEN),
        ],
        axis=1,
    ).reshape(-1, HIDDEN)
    for name, expected in (
        ("queries of a matrix interleaved by group", q),
        ("keys of a matrix interleaved by group", k),
    ):
        shape, view = VIEWS[name]
        assert np.array_equal(pull(view, Box.whole(shape), lambda box: fused[box.slices]), expected)


def test_a_transposed_box_is_a_view_of_the_foreign_array() -> None:
    foreign = numbered((8, 6))
    values = pull((TRANSPOSE,), Box((2, 1), (3, 4)), lambda box: foreign[box.slices])
    assert np.shares_memory(values, foreign)
