"""Hypothesis strategies for shapes, boxes and ways to cut a tensor into boxes."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from workbench.spec.geometry import Box


@st.composite
def shapes(draw: st.DrawFn, *, max_dims: int = 3, max_size: int = 9) -> tuple[int, ...]:
    """A shape of up to `max_dims` dimensions, none of them empty."""
    return tuple(draw(st.lists(st.integers(1, max_size), min_size=0, max_size=max_dims)))


@st.composite
def boxes_in(draw: st.DrawFn, shape: Sequence[int]) -> Box:
    """A box, never empty, inside a tensor of `shape`."""
    offset = tuple(draw(st.integers(0, n - 1)) for n in shape)
    size = tuple(draw(st.integers(1, n - o)) for n, o in zip(shape, offset, strict=True))
    return Box(offset, size)


@st.composite
def partitions(draw: st.DrawFn, shape: Sequence[int], *, max_cuts: int = 5) -> tuple[Box, ...]:
    """Boxes that cover a tensor exactly once, made by cutting boxes in two again and again, in any order."""
    found = [Box.whole(shape)]
    for _ in range(draw(st.integers(0, max_cuts)) if shape else 0):
        index = draw(st.integers(0, len(found) - 1))
        box = found[index]
        dim = draw(st.integers(0, len(shape) - 1))
        if box.size[dim] < 2:
            continue
        at = draw(st.integers(1, box.size[dim] - 1))
        found[index : index + 1] = split(box, dim, at)
    return tuple(draw(st.permutations(found)))


def split(box: Box, dim: int, at: int) -> list[Box]:
    """The two parts of a box cut `at` elements into dimension `dim`."""
    low = tuple(at if d == dim else n for d, n in enumerate(box.size))
    high = tuple(n - at if d == dim else n for d, n in enumerate(box.size))
    return [Box(box.offset, low), Box(tuple(o + at if d == dim else o for d, o in enumerate(box.offset)), high)]
