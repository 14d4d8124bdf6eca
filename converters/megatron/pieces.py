"""A source over foreign tensors that lie in pieces: boxes of the whole tensor, each a strided place in a file."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Final, Protocol

import numpy as np

from converters.formats._ranges import first_element
from converters.names import summarise
from converters.rules import Rule, assemble, images, origins, pull
from converters.untrusted.torch_file import StridedTensor
from workbench.checkpoint.safetensors_io import RangedFile
from workbench.errors import CheckpointError, ConversionError
from workbench.spec.dtypes import NUMPY_NAMES
from workbench.spec.geometry import Box, LogicalTensor, coverage_fault

_SHOWN: Final = 8


class Piece(Protocol):
    """A box of a foreign tensor, and where it lies."""

    @property
    def box(self) -> Box: ...

    def locate(self) -> StridedTensor:
        """The place of the elements; may read a little to find it. CheckpointError when it is not there."""
        ...


@dataclass(frozen=True, slots=True)
class PlacedPiece:
    """A piece whose place is known."""

    box: Box
    place: StridedTensor

    def locate(self) -> StridedTensor:
        return self.place


@dataclass(frozen=True, slots=True)
class ForeignTensor:
    """A whole tensor as the foreign program knows it, in pieces that cover it exactly once."""

    shape: tuple[int, ...]
    dtype: str
    pieces: Sequence[Piece]


def within(place: StridedTensor, box: Box) -> StridedTensor:
    """The place of a box of a tensor."""
    steps = sum(offset * stride for offset, stride in zip(box.offset, place.strides, strict=True))
    start = place.start + steps * np.dtype(NUMPY_NAMES[place.dtype]).itemsize
    return StridedTensor(place.file, start, place.dtype, box.size, place.strides)


def gather(name: str, shape: tuple[int, ...], pieces: Sequence[PlacedPiece], where: str) -> ForeignTensor:
    """A tensor of placed pieces; CheckpointError unless they are of one type and cover it exactly once."""
    dtypes = sorted({piece.place.dtype for piece in pieces})
    fault = coverage_fault(shape, [piece.box for piece in pieces])
    if len(dtypes) != 1:
        fault = f"its pieces are of type {', '.join(dtypes)}"
    if fault:
        raise CheckpointError(f"{where}: {name!r}: {fault}; is a file missing?")
    return ForeignTensor(shape, dtypes[0], pieces)


class PieceSource:
    """Logical tensors of which each lies, as its rule says, in a foreign tensor (`TensorSource`)."""

    def __init__(self, schema: Mapping[str, LogicalTensor], rules: Mapping[str, Rule], found: Foreign) -> None:
        self.schema: Mapping[str, LogicalTensor] = schema
        self.rules = rules
        self._tensors = {name: _Pieces(found[name]) for name in {rule.foreign for rule in rules.values()}}
        self._files: dict[Path, RangedFile] = {}
        self._lock = threading.Lock()

    def chunks(self, name: str) -> tuple[Box, ...]:
        """The logical boxes of the pieces in which the tensor lies."""
        rule = self.rules[name]
        hull = _hull(origins(rule.view, Box.whole(self.schema[name].shape)))
        near = self._tensors[rule.foreign].meeting(hull)
        return tuple(box for piece in near for box in images(rule.view, piece.box))

    def read(self, name: str, box: Box) -> np.ndarray:
        """The elements of `box` in storage dtype."""
        rule = self.rules[name]
        return pull(rule.view, box, lambda part: self._fetch(self._tensors[rule.foreign], part))

    def close(self) -> None:
        """Gives the files back."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _fetch(self, tensor: _Pieces, box: Box) -> np.ndarray:
        """A box of a foreign tensor."""
        return assemble(box, self._parts(tensor, box))

    def _parts(self, tensor: _Pieces, box: Box) -> Iterator[tuple[Box, np.ndarray]]:
        for piece in tensor.meeting(box):
            common = piece.box.intersect(box)
            assert common is not None
            yield common, self._read(tensor.place(piece), common.relative_to(piece.box))

    def _read(self, place: StridedTensor, box: Box) -> np.ndarray:
        """A box of a place: as one range where its elements follow one another, else through a mapping."""
        dense = tuple(int(np.prod(place.shape[dim + 1 :])) for dim in range(len(place.shape)))
        first = first_element(place.shape, box) if place.strides == dense else None
        if first is None:
            return place.read(box)
        array = np.empty(box.size, NUMPY_NAMES[place.dtype])
        with self._lock:
            file = self._files.get(place.file) or self._files.setdefault(place.file, RangedFile(place.file))
        file.read_into(array, place.start + first * array.itemsize)
        return array


Foreign = Mapping[str, ForeignTensor]


class _Pieces:
    """The pieces of one tensor, found by the leading dimensions in which each is one element long (layer, expert)."""

    def __init__(self, tensor: ForeignTensor) -> None:
        sizes = [piece.box.size for piece in tensor.pieces]
        rank = len(tensor.shape)
        self._depth = next((dim for dim in range(rank) if any(size[dim] != 1 for size in sizes)), rank)
        self._by_place: dict[tuple[int, ...], list[Piece]] = {}
        for piece in tensor.pieces:
            self._by_place.setdefault(piece.box.offset[: self._depth], []).append(piece)
        self._places: dict[tuple[int, ...], StridedTensor] = {}

    def meeting(self, box: Box) -> list[Piece]:
        """The pieces that have elements of `box`."""
        ranges = [range(box.offset[dim], box.end[dim]) for dim in range(self._depth)]
        near = (piece for place in product(*ranges) for piece in self._by_place.get(place, ()))
        return [piece for piece in near if piece.box.intersect(box) is not None]

    def place(self, piece: Piece) -> StridedTensor:
        """Where a piece lies, looked for once."""
        found = self._places.get(piece.box.offset)
        if found is None:
            found = self._places[piece.box.offset] = piece.locate()
        return found


def _hull(boxes: Sequence[Box]) -> Box:
    """The smallest box around all of these."""
    start = tuple(map(min, zip(*(box.offset for box in boxes), strict=True)))
    end = tuple(map(max, zip(*(box.end for box in boxes), strict=True)))
    return Box(start, tuple(b - a for a, b in zip(start, end, strict=True)))


def match_pieces(
    shapes: Mapping[str, tuple[int, ...]], rules: Mapping[str, Rule], foreign: Foreign, where: str
) -> dict[str, LogicalTensor]:
    """The logical tensors that `foreign` holds, by the rule of each, with the types that they have there.

    shapes: of the logical tensors. ConversionError unless each is there, in its shape, and nothing is left over.
    """
    used = {rule.foreign for rule in rules.values()}
    faults, schema = [], {}
    for name, rule in rules.items():
        found = foreign.get(rule.foreign)
        if found is None:
            continue
        expected = rule.foreign_shape(shapes[name])
        if found.shape != expected:
            faults.append(f"{rule.foreign!r} has shape {list(found.shape)}, the arguments say {list(expected)}")
        if found.dtype not in NUMPY_NAMES:
            faults.append(f"{rule.foreign!r} is of type {found.dtype}, which is not read")
        schema[name] = LogicalTensor(name, shapes[name], found.dtype)
    if over := sorted(set(foreign) - used):
        faults.append(f"{summarise(over, 'has', 'have')} no place in this model")
    if missing := sorted(used - set(foreign)):
        faults.append(f"{summarise(missing, 'is', 'are')} missing")
    if faults:
        shown = [*dict.fromkeys(faults)]
        more = [f"and {len(shown) - _SHOWN} more"] if len(shown) > _SHOWN else []
        raise ConversionError(f"{where}: {'; '.join([*shown[:_SHOWN], *more])}")
    return schema
