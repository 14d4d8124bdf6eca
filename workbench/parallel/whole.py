"""Logical tensors, of which each rank of a stage holds boxes, brought whole to one rank and given back.

For what can only be computed from a whole matrix, however the layout cuts it. The matrices are dealt out, so that each
is worked on by one rank; in a round every rank has at most one, so that no rank ever holds more than that.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from workbench.parallel.axis import Axis
from workbench.parallel.live import LiveParameter
from workbench.spec.geometry import Box, coverage_fault

_Addressed = tuple[int, torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Piece:
    """A box of a logical tensor, and where it lies: on which rank, in which parameter, in which part of it."""

    rank: int
    index: int
    box: Box
    local: Box


@dataclass(frozen=True, slots=True)
class _Whole:
    """A logical tensor, the rank that works on it, the pieces that make it up there, and all pieces that there are."""

    name: str
    shape: tuple[int, ...]
    owner: int
    sources: tuple[_Piece, ...]
    holders: tuple[_Piece, ...]


class WholeTensors:
    """The logical tensors that lie in `parameters` on the ranks of `axis`, which are all that hold any of them.

    Collective over the axis, when made and in `transform`; its ranks have the same parameters, cut as they may be.
    """

    def __init__(self, parameters: Sequence[LiveParameter], axis: Axis) -> None:
        self._axis = axis
        shapes = {part.name: part.shape for parameter in parameters for part in parameter.spec.parts}
        here = [
            (shard.name, index, shard.box, shard.local)
            for index, parameter in enumerate(parameters)
            for shard in parameter.shards
        ]
        held: dict[str, list[_Piece]] = defaultdict(list)
        for rank, there in enumerate(axis.gather_objects(here)):
            for name, index, box, local in there:
                held[name].append(_Piece(rank, index, box, local))
        # The largest first, so that the tensors of a round are about as large as each other.
        names = sorted(held, key=lambda name: (-math.prod(shapes[name]), name))
        wholes = [_whole(name, shapes[name], turn % axis.size, held[name]) for turn, name in enumerate(names)]
        self._rounds = [wholes[first : first + axis.size] for first in range(0, len(wholes), axis.size)]

    def transform(self, tensors: Sequence[torch.Tensor], function: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
        """Replaces the boxes in `tensors`, one of each parameter's local shape, by those of `function(name, whole)`.

        The function keeps shape and type.
        """
        me = self._axis.rank
        for wholes in self._rounds:
            mine = [(whole, tensors[0].new_empty(whole.shape)) for whole in wholes if whole.owner == me]
            self._move(
                [(w.owner, tensors[p.index][p.local.slices]) for w in wholes for p in w.sources if p.rank == me],
                [(p.rank, matrix[p.box.slices]) for w, matrix in mine for p in w.sources],
                tensors[0],
            )
            results = [(w, function(w.name, matrix)) for w, matrix in mine]
            self._move(
                [(p.rank, matrix[p.box.slices]) for w, matrix in results for p in w.holders],
                [(w.owner, tensors[p.index][p.local.slices]) for w in wholes for p in w.holders if p.rank == me],
                tensors[0],
            )

    def _move(self, sends: Sequence[_Addressed], receives: Sequence[_Addressed], like: torch.Tensor) -> None:
        """Copies each tensor that is sent to a rank into the view that awaits it there, in the same order."""
        ranks = range(self._axis.size)
        sent: list[list[torch.Tensor]] = [[] for _ in ranks]
        awaited: list[list[torch.Tensor]] = [[] for _ in ranks]
        for rank, tensor in sends:
            sent[rank].append(tensor.reshape(-1))
        for rank, view in receives:
            awaited[rank].append(view)
        sizes = [sum(view.numel() for view in views) for views in awaited]
        arrived = self._axis.exchange([torch.cat((like.new_empty(0), *tensors)) for tensors in sent], sizes)
        for views, flat in zip(awaited, arrived, strict=True):
            for view, values in zip(views, flat.split([view.numel() for view in views]), strict=True):
                view.copy_(values.view(view.shape))


def _whole(name: str, shape: tuple[int, ...], owner: int, held: Sequence[_Piece]) -> _Whole:
    """The tensor with the pieces that its owner takes: of equal boxes its own, or else one that varies with the owner,
    so that no rank sends for all its copies."""
    copies: dict[Box, list[_Piece]] = defaultdict(list)
    for piece in held:
        copies[piece.box].append(piece)
    sources = tuple(
        next((piece for piece in equal if piece.rank == owner), equal[owner % len(equal)]) for equal in copies.values()
    )
    fault = coverage_fault(shape, [piece.box for piece in sources])
    assert fault is None, f"{name}: {fault}"
    return _Whole(name, shape, owner, sources, tuple(held))
