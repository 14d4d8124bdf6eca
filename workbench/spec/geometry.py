"""Boxes, logical tensors and how a run-time parameter is cut from them: all of the resharding mathematics. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from workbench.errors import LayoutError

EMBED: Literal["embed"] = "embed"
FINAL: Literal["final"] = "final"
Place = int | Literal["embed", "final"]
Initial = Literal["normal", "residual", "fan_in", "zeros", "ones"]


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangular region of a tensor: offset and size per dimension."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @staticmethod
    def whole(shape: Sequence[int]) -> Box:
        """The box that covers a tensor of `shape`."""
        return Box((0,) * len(shape), tuple(shape))

    @property
    def end(self) -> tuple[int, ...]:
        return tuple([o + s for o, s in zip(self.offset, self.size, strict=True)])

    @property
    def numel(self) -> int:
        return math.prod(self.size)

    @property
    def slices(self) -> tuple[slice, ...]:
        """Index of this box in an array of the whole tensor."""
        return tuple(slice(o, o + s) for o, s in zip(self.offset, self.size, strict=True))

    def intersect(self, other: Box) -> Box | None:
        """The common region, or None when it is empty."""
        start = tuple(map(max, self.offset, other.offset))
        sides = zip(self.offset, self.size, other.offset, other.size, start, strict=True)
        size = tuple([min(a + n, b + m) - s for a, n, b, m, s in sides])
        return Box(start, size) if all([s > 0 for s in size]) else None

    def contains(self, other: Box) -> bool:
        """Whether every element of `other` lies in this box."""
        sides = zip(self.offset, self.size, other.offset, other.size, strict=True)
        return all([a <= b and a + n >= b + m for a, n, b, m in sides])

    def shift(self, by: Sequence[int]) -> Box:
        """The same size, moved by `by`."""
        return Box(tuple(o + d for o, d in zip(self.offset, by, strict=True)), self.size)

    def relative_to(self, origin: Box) -> Box:
        """This box in the coordinates of an array that holds just `origin`."""
        return self.shift([-o for o in origin.offset])


@dataclass(frozen=True, slots=True)
class LogicalTensor:
    """A whole tensor as files and plans know it: unfused, unpadded, named by global layer index."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Shard:
    """One box of a logical tensor and where it lies in a run-time parameter.

    `copies` ranks of the tensor-parallel axis hold this same box, `copy` counts this one among them; the first of them
    is tensor-parallel rank `first_rank` and they are neighbours. `partial_grad` says that each copy sees only a part
    of the gradient, so that the true gradient is the sum over the copies. `stages` are the places of the pipeline that
    hold the tensor (two for tied embeddings).
    """

    name: str
    box: Box
    local: Box
    copies: int = 1
    copy: int = 0
    first_rank: int = 0
    partial_grad: bool = False


@dataclass(frozen=True, slots=True)
class Part:
    """One logical tensor inside a run-time parameter, and how tensor parallelism cuts it.

    dim: the dimension that is cut, or None for a tensor that every rank holds whole.
    units: the number of pieces along `dim` that must not be cut (heads, say); by default each element is one.
    replicate: units may be fewer than ranks, then neighbouring ranks hold the same unit (KV heads) and each sees part
        of the gradient.
    pad_to: each rank's share of `dim` is rounded up to a multiple of this; the end is padding (vocabulary).
    partial_grad: for whole tensors, whether each rank's gradient is only a part of the sum.
    """

    name: str
    shape: tuple[int, ...]
    dim: int | None = None
    units: int | None = None
    replicate: bool = False
    pad_to: int | None = None
    partial_grad: bool = False

    def faults(self, tp: int) -> list[str]:
        """Why this part cannot be cut over `tp` ranks, if it cannot."""
        if self.dim is None or self.pad_to is not None:
            return []
        units = self._units
        if units % tp == 0 or (self.replicate and tp % units == 0):
            return []
        return [f"{self.name}: {units} units cannot be split over tp={tp}"]

    @property
    def _units(self) -> int:
        assert self.dim is not None
        return self.units if self.units is not None else self.shape[self.dim]

    def local_shape(self, tp: int) -> tuple[int, ...]:
        """Shape of one rank's share, padding included."""
        if self.dim is None:
            return self.shape
        share = self._share(tp)
        return (*self.shape[: self.dim], share, *self.shape[self.dim + 1 :])

    def _share(self, tp: int) -> int:
        assert self.dim is not None
        length = self.shape[self.dim]
        if self.pad_to is not None:
            return math.ceil(length / (tp * self.pad_to)) * self.pad_to
        if faults := self.faults(tp):
            raise LayoutError("; ".join(faults))
        return length // min(tp, self._units)

    def shard(self, tp: int, tp_rank: int) -> Shard | None:
        """What rank `tp_rank` of `tp` holds, placed at the origin of the parameter; None when it is all padding."""
        if self.dim is None:
            box = Box.whole(self.shape)
            return Shard(self.name, box, box, copies=tp, copy=tp_rank, first_rank=0, partial_grad=self.partial_grad)
        share = self._share(tp)
        copies = tp // self._units if self.replicate and tp > self._units else 1
        start = (tp_rank // copies) * share
        size = min(share, self.shape[self.dim] - start)
        if size <= 0:
            return None
        offset = tuple(start if d == self.dim else 0 for d in range(len(self.shape)))
        box = Box(offset, (*self.shape[: self.dim], size, *self.shape[self.dim + 1 :]))
        local = Box((0,) * len(self.shape), box.size)
        first = tp_rank - tp_rank % copies
        return Shard(self.name, box, local, copies, tp_rank % copies, first, partial_grad=copies > 1)


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """A run-time parameter of a stage: its path in the stage's module tree, and its parts, stacked on dim 0.

    `places` are the positions in the network (a global layer index, EMBED or FINAL) that hold it: one, or two for tied
    embeddings. `role` says what it is to the optimizer and to the initialiser. `dealt`: over how many ranks of the
    expert axis the parts are dealt, equally many to each, in order.
    """

    path: str
    parts: tuple[Part, ...]
    places: tuple[Place, ...]
    role: Literal["matrix", "embedding", "bias", "norm", "head", "router", "balance"]
    init: Initial = "normal"
    dealt: int = 1

    def local_parts(self, ep_rank: int = 0) -> tuple[Part, ...]:
        """The parts that rank `ep_rank` of the expert axis holds."""
        share = len(self.parts) // self.dealt
        return self.parts[share * ep_rank :][:share] if self.dealt > 1 else self.parts

    def local_shape(self, tp: int) -> tuple[int, ...]:
        """Shape of the parameter on each rank of a tensor-parallel group of `tp`; that of the parts does not vary."""
        shapes = [part.local_shape(tp) for part in self.local_parts()]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def shards(self, tp: int, tp_rank: int, ep_rank: int = 0) -> tuple[Shard, ...]:
        """Which box of which logical tensor lies where in the parameter of a rank."""
        found: list[Shard] = []
        row = 0
        for part in self.local_parts(ep_rank):
            shard = part.shard(tp, tp_rank)
            if shard is not None:
                local = shard.local.shift((row,) + (0,) * (len(part.shape) - 1))
                found.append(
                    Shard(shard.name, shard.box, local, shard.copies, shard.copy, shard.first_rank, shard.partial_grad)
                )
            row += part.local_shape(tp)[0]
        return tuple(found)


def cut_rows(shards: Iterable[Shard], start: int, stop: int) -> tuple[Shard, ...]:
    """The shards of a parameter of which only rows `start` to `stop` are kept, placed in those rows.

    This is what a data-parallel rank holds when its group shards each parameter on dim 0.
    """
    kept: list[Shard] = []
    for shard in shards:
        rows = Box((start, *shard.local.offset[1:]), (stop - start, *shard.local.size[1:]))
        common = shard.local.intersect(rows) if stop > start else None
        if common is None:
            continue
        inside = common.relative_to(shard.local)
        kept.append(
            Shard(
                shard.name,
                inside.shift(shard.box.offset),
                common.shift((-start,) + (0,) * (len(common.size) - 1)),
                shard.copies,
                shard.copy,
                shard.first_rank,
                shard.partial_grad,
            )
        )
    return tuple(kept)


def coverage_fault(shape: Sequence[int], boxes: Sequence[Box], padding: int = 0) -> str | None:
    """Why `boxes` do not cover a tensor of `shape`, but for `padding` elements, exactly once, or None when they do.

    The boxes are disjoint if no two meet; disjoint boxes cover the tensor when their elements add up. Boxes are
    compared only with those whose range on the most divided dimension meets theirs.
    """
    whole = Box.whole(shape)
    for box in boxes:
        if not whole.contains(box):
            return f"box at {box.offset} of size {box.size} lies outside shape {tuple(shape)}"
    if len(boxes) > 1 and shape:
        dim = max(range(len(shape)), key=lambda d: len({box.offset[d] for box in boxes}))
        active: list[Box] = []
        for box in sorted(boxes, key=lambda b: b.offset[dim]):
            active = [other for other in active if other.end[dim] > box.offset[dim]]
            for other in active:
                if box.intersect(other) is not None:
                    return f"boxes at {other.offset} and {box.offset} overlap"
            active.append(box)
    elif len(boxes) > 1:
        return "more than one box for a scalar"
    total = sum(box.numel for box in boxes)
    if total != math.prod(shape) - padding:
        return f"boxes hold {total} of {math.prod(shape) - padding} elements"
    return None
