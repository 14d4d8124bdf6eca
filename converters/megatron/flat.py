"""Flat buffers of the distributed optimizer seen as boxes of the tensors of a whole model. No torch.

A parameter is a contiguous range of a bucket, and a bucket is stored in one piece or in several that are cut anywhere,
also in the middle of a row. Each piece of a parameter becomes boxes whose elements lie at regular distances.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from converters.megatron.buckets import Bucket
from converters.megatron.modules import LocalParameter
from converters.megatron.pieces import Piece
from converters.rules import Split
from converters.untrusted.torch_file import StridedTensor, item_bytes
from workbench.errors import CheckpointError
from workbench.spec.geometry import Box


@dataclass(frozen=True, slots=True)
class FlatPiece:
    """A box whose elements lie in a flat piece: from its element `start` on, `strides` apart."""

    box: Box
    flat: Piece
    start: int
    strides: tuple[int, ...]

    def locate(self) -> StridedTensor:
        found = self.flat.locate()
        if found.strides != (1,):
            raise CheckpointError(f"{found.file}: a flat buffer lies with strides {list(found.strides)}, not [1]")
        start = found.start + self.start * item_bytes(found.dtype)
        return StridedTensor(found.file, start, found.dtype, self.box.size, self.strides)


def unflatten(
    parameters: Sequence[LocalParameter], buckets: Sequence[tuple[Bucket, Sequence[Piece]]]
) -> Iterator[tuple[str, FlatPiece]]:
    """Name and piece of every box of the tensors of a whole model that these buckets hold, but for copies.

    buckets: each with the flat pieces that together hold its elements.
    """
    by_name = {parameter.name: parameter for parameter in parameters if not parameter.copy}
    for bucket, pieces in buckets:
        ordered = sorted(pieces, key=_offset)
        for name, start in bucket.starts.items():
            if name not in by_name:
                continue
            first = max(bisect_right(ordered, start, key=_offset) - 1, 0)
            last = bisect_left(ordered, start + by_name[name].numel, key=_offset)
            for flat in ordered[first:last]:
                for piece in _overlap(by_name[name], start, flat):
                    yield name, piece


def _offset(flat: Piece) -> int:
    return flat.box.offset[0]


def _overlap(parameter: LocalParameter, start: int, flat: Piece) -> Iterator[FlatPiece]:
    """The boxes of a parameter, which begins at element `start` of a bucket, in a flat piece of the bucket."""
    at = flat.box.offset[0]
    first, last = max(at, start) - start, min(flat.box.end[0], start + parameter.numel) - start
    if last <= first:
        return
    strides = tuple(math.prod(parameter.shape[dim + 1 :]) for dim in range(len(parameter.shape)))
    for _, grid in Split(0, parameter.shape).from_source(Box((first,), (last - first,))):
        for whole, local in parameter.pairs:
            if (part := grid.intersect(local)) is None:
                continue
            distance = sum(offset * stride for offset, stride in zip(part.offset, strides, strict=True))
            moved = part.shift([a - b for a, b in zip(whole.offset, local.offset, strict=True)])
            yield FlatPiece(moved, flat, start - at + distance, strides)
