"""Invertible index maps between a foreign tensor and a logical one. NumPy arrays in and out, no torch.

A view is a chain of operations that leads from the foreign tensor to the logical tensor. Each operation maps a box
of one side to boxes of the other, so reading a box of either side touches the bytes of that box and no others, and
export is the same chain walked backwards: there is no second, hand-written direction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from workbench.spec.geometry import Box

if TYPE_CHECKING:
    import numpy as np

Pair = tuple[Box, Box]
Fetch = Callable[[Box], "np.ndarray"]


class Operation(Protocol):
    """One step from source (the foreign side) to target (the logical side)."""

    def source_shape(self, target: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the source, given the target's."""
        ...

    def from_source(self, box: Box) -> list[Pair]:
        """Pairs (box of the source, box of the target) for the part of `box`, a source box, that the target holds."""
        ...

    def from_target(self, box: Box) -> list[Pair]:
        """Pairs (box of the source, box of the target) that together make up `box`, a target box."""
        ...

    def forward(self, array: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
        """The elements of one pair's source box as its target box, which has `size`."""
        ...

    def backward(self, array: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
        """The elements of one pair's target box as its source box, which has `size`."""
        ...


@dataclass(frozen=True, slots=True)
class Permute:
    """Target dim d is source dim axes[d]."""

    axes: tuple[int, ...]

    @property
    def _inverse(self) -> tuple[int, ...]:
        return tuple(self.axes.index(d) for d in range(len(self.axes)))

    def source_shape(self, target: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(target[d] for d in self._inverse)

    def from_source(self, box: Box) -> list[Pair]:
        return [(box, _reorder(box, self.axes))]

    def from_target(self, box: Box) -> list[Pair]:
        return [(_reorder(box, self._inverse), box)]

    def forward(self, array: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
        return array.transpose(self.axes)

    def backward(self, array: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
        return array.transpose(self._inverse)


TRANSPOSE = Permute((1, 0))


@dataclass(frozen=True, slots=True)
class Slice:
    """The target is elements `start` to `start + size` of dimension `dim`, which has `total` in the source."""

    dim: int
    start: int
    size: int
    total: int

    def source_shape(self, target: tuple[int, ...]) -> tuple[int, ...]:
        return (*target[: self.dim], self.total, *target[self.dim + 1 :])

    def from_source(self, box: Box) -> list[Pair]:
        first = max(box.offset[self.dim], self.start)
        last = min(box.end[self.dim], self.start + self.size)
        if last <= first:
            return []
        return [
            (_with_range(box, self.dim, first, last), _with_range(box, self.dim, first - self.start, last - self.start))
        ]

    def from_target(self, box: Box) -> list[Pair]:
        return [(box.shift([self.start if d == self.dim else 0 for d in range(len(box.size))]), box)]

    def forward(self, array: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
        return array

    def backward(self, array: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
        return array


@dataclass(frozen=True, slots=True)
class Split:
    """Dimension `dim` of the source becomes as many dimensions as `sizes` has, the last one fastest."""

    dim: int
    sizes: tuple[int, ...]

    def source_shape(self, target: tuple[int, ...]) -> tuple[int, ...]:
        return (*target[: self.dim], math.prod(self.sizes), *target[self.dim + len(self.sizes) :])

    def from_source(self, box: Box) -> list[Pair]:
        return _flat_to_grid(box, self.dim, self.sizes)

    def from_target(self, box: Box) -> list[Pair]:
        return _grid_to_flat(box, self.dim, self.sizes)

    def forward(self, array: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
        return array.reshape(size)

    def backward(self, array: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
        return array.reshape(size)


@dataclass(frozen=True, slots=True)
class Merge:
    """The dimensions of the source from `dim` on, of `sizes`, become one: the inverse of Split."""

    dim: int
    sizes: tuple[int, ...]

    def source_shape(self, target: tuple[int, ...]) -> tuple[int, ...]:
        return (*target[: self.dim], *self.sizes, *target[self.dim + 1 :])

    def from_source(self, box: Box) -> list[Pair]:
        return [(grid, flat) for flat, grid in _grid_to_flat(box, self.dim, self.sizes)]

    def from_target(self, box: Box) -> list[Pair]:
        return [(grid, flat) for flat, grid in _flat_to_grid(box, self.dim, self.sizes)]

    def forward(self, array: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
        return array.reshape(size)

    def backward(self, array: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
        return array.reshape(size)


@dataclass(frozen=True, slots=True)
class Halve:
    """Of every `period` elements of dimension `dim`, those from `start` on lie in pairs in the source: the first of
    each pair, then the second of each. Whole periods stay one piece; of a cut one, these elements are pieces apart."""

    dim: int
    start: int
    period: int

    def source_shape(self, target: tuple[int, ...]) -> tuple[int, ...]:
        return target

    def from_source(self, box: Box) -> list[Pair]:
        return [(here, self._moved(here, self._order.index)) for here in self._pieces(box)]

    def from_target(self, box: Box) -> list[Pair]:
        return [(self._moved(here, self._order.__getitem__), here) for here in self._pieces(box)]

    def forward(self, array: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
        return self._permuted(array, self._order)

    def backward(self, array: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
        order = self._order
        return self._permuted(array, [order.index(place) for place in range(self.period)])

    @property
    def _order(self) -> list[int]:
        """For each place in a period of the target, the place in the source."""
        start, period = self.start, self.period
        return [*range(start), *range(start, period, 2), *range(start + 1, period, 2)]

    def _pieces(self, box: Box) -> Iterator[Box]:
        """`box` cut along `dim` into whole periods together, what is not moved together, and the rest one by one."""
        at, stop = box.offset[self.dim], box.end[self.dim]
        while at < stop:
            place = at % self.period
            if place == 0 and stop - at >= self.period:
                last = stop - stop % self.period
            else:
                last = min(stop, at + (self.start - place if place < self.start else 1))
            yield _with_range(box, self.dim, at, last)
            at = last

    def _moved(self, piece: Box, where: Callable[[int], int]) -> Box:
        at, size = piece.offset[self.dim], piece.size[self.dim]
        place = at % self.period
        if size >= self.period or place < self.start:
            return piece
        return _with_range(piece, self.dim, at - place + where(place), at - place + where(place) + size)

    def _permuted(self, array: np.ndarray, order: Sequence[int]) -> np.ndarray:
        length = array.shape[self.dim]
        if length < self.period:
            return array
        grid = array.reshape(*array.shape[: self.dim], -1, self.period, *array.shape[self.dim + 1 :])
        return grid.take(order, axis=self.dim + 1).reshape(array.shape)


@dataclass(frozen=True, slots=True)
class Rule:
    """One logical tensor and where it lies: `foreign` seen through `view`. `{i}` in both names is the layer."""

    logical: str
    foreign: str
    view: tuple[Operation, ...] = ()

    def at(self, layer: int) -> Rule:
        """This rule for one layer."""
        index = str(layer)
        return Rule(self.logical.replace("{i}", index), self.foreign.replace("{i}", index), self.view)

    def foreign_shape(self, logical: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the foreign tensor, given the logical tensor's."""
        for operation in reversed(self.view):
            logical = operation.source_shape(logical)
        return logical


def pull(view: Sequence[Operation], box: Box, fetch: Fetch) -> np.ndarray:
    """The elements of a logical box, from `fetch(foreign box)`; a view of what was fetched when that is one piece."""
    return assemble(box, pull_pieces(view, box, fetch))


def pull_pieces(view: Sequence[Operation], box: Box, fetch: Fetch) -> Iterator[tuple[Box, np.ndarray]]:
    """Disjoint logical boxes that make up `box`, each with its elements."""
    if not view:
        yield box, fetch(box)
        return
    last = view[-1]
    for source, _ in last.from_target(box):
        for part, array in pull_pieces(view[:-1], source, fetch):
            for before, after in last.from_source(part):
                yield after, last.forward(array[before.relative_to(part).slices], after.size)


def push_pieces(view: Sequence[Operation], box: Box, fetch: Fetch) -> Iterator[tuple[Box, np.ndarray]]:
    """Disjoint boxes of that part of a foreign box which the logical tensor holds, from `fetch(logical box)`."""
    if not view:
        yield box, fetch(box)
        return
    first = view[0]
    for _, target in first.from_source(box):
        for part, array in push_pieces(view[1:], target, fetch):
            for before, after in first.from_target(part):
                yield before, first.backward(array[after.relative_to(part).slices], before.size)


def images(view: Sequence[Operation], box: Box) -> list[Box]:
    """The logical boxes that a foreign box becomes."""
    boxes = [box]
    for operation in view:
        boxes = [after for before in boxes for _, after in operation.from_source(before)]
    return boxes


def origins(view: Sequence[Operation], box: Box) -> list[Box]:
    """The foreign boxes that a logical box comes from."""
    boxes = [box]
    for operation in reversed(view):
        boxes = [before for after in boxes for before, _ in operation.from_target(after)]
    return boxes


def assemble(box: Box, pieces: Iterator[tuple[Box, np.ndarray]]) -> np.ndarray:
    """One array of `box` from pieces that cover it; the piece itself when there is just one."""
    import numpy as np

    part, array = next(pieces)
    if part == box:
        return array
    whole = np.empty(box.size, array.dtype)
    filled = part.numel
    whole[part.relative_to(box).slices] = array
    for part, array in pieces:
        whole[part.relative_to(box).slices] = array
        filled += part.numel
    assert filled == box.numel, f"pieces hold {filled} of {box.numel} elements"
    return whole


def _reorder(box: Box, axes: tuple[int, ...]) -> Box:
    return Box(tuple(box.offset[d] for d in axes), tuple(box.size[d] for d in axes))


def _with_range(box: Box, dim: int, first: int, last: int) -> Box:
    return _with_dims(box, dim, 1, (first,), (last - first,))


def _with_dims(box: Box, dim: int, count: int, offset: tuple[int, ...], size: tuple[int, ...]) -> Box:
    """`box` with `count` of its dimensions from `dim` on replaced."""
    return Box(
        (*box.offset[:dim], *offset, *box.offset[dim + count :]), (*box.size[:dim], *size, *box.size[dim + count :])
    )


def _flat_to_grid(box: Box, dim: int, sizes: tuple[int, ...]) -> list[Pair]:
    """Pairs (flat box, grid box) for a box whose dimension `dim` counts through a grid of `sizes`."""
    return [
        (_with_range(box, dim, start, start + math.prod(size)), _with_dims(box, dim, 1, offset, size))
        for start, offset, size in _runs(box.offset[dim], box.end[dim], sizes)
    ]


def _grid_to_flat(box: Box, dim: int, sizes: tuple[int, ...]) -> list[Pair]:
    """Pairs (flat box, grid box) for a box in a grid of `sizes`, cut where its elements are not neighbours."""
    count = len(sizes)
    offset, size = box.offset[dim : dim + count], box.size[dim : dim + count]
    return [
        (
            _with_dims(box, dim, count, (start,), (math.prod(part),)),
            _with_dims(box, dim, count, corner, part),
        )
        for start, corner, part in _neighbours(offset, size, sizes)
    ]


Run = tuple[int, tuple[int, ...], tuple[int, ...]]


def _runs(start: int, stop: int, sizes: tuple[int, ...]) -> Iterator[Run]:
    """The grid boxes (flat start, offset, size) that elements `start` to `stop` of a flattened grid fill, in order."""
    if len(sizes) == 1:
        yield start, (start,), (stop - start,)
        return
    inner = math.prod(sizes[1:])
    while start < stop:
        row, column = divmod(start, inner)
        if column == 0 and stop - start >= inner:
            rows = (stop - start) // inner
            yield start, (row, *(0 for _ in sizes[1:])), (rows, *sizes[1:])
            start += rows * inner
            continue
        last = min(stop, (row + 1) * inner)
        for at, offset, size in _runs(column, column + last - start, sizes[1:]):
            yield row * inner + at, (row, *offset), (1, *size)
        start = last


def _neighbours(offset: tuple[int, ...], size: tuple[int, ...], sizes: tuple[int, ...]) -> Iterator[Run]:
    """The pieces (flat start, offset, size) of a grid box whose elements follow one another in the flattened grid."""
    inner = math.prod(sizes[1:])
    if len(sizes) == 1 or size[1:] == sizes[1:]:
        yield offset[0] * inner, offset, size
        return
    for row in range(offset[0], offset[0] + size[0]):
        for at, corner, part in _neighbours(offset[1:], size[1:], sizes[1:]):
            yield row * inner + at, (row, *corner), (1, *part)
