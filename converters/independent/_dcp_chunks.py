"""Tensors of a folder of torch.distributed.checkpoint, whose pieces PyTorch's own loader reads.

Only where they lie comes from the reader of `.metadata`: PyTorch's would execute what that names.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from converters.independent._torch_files import load, load_range
from converters.untrusted.dcp import read_dcp


class DcpTensors:
    """The tensors of a folder, by their names there."""

    def __init__(self, folder: Path) -> None:
        self._folder = read_dcp(folder)
        self._recent = lru_cache(maxsize=4)(load_range)

    @property
    def names(self) -> Collection[str]:
        """Of all of its tensors."""
        return self._folder.tensors.keys()

    def dtype(self, name: str) -> str:
        """Of a whole tensor."""
        return self._folder.tensors[name].dtype

    def join(self, name: str, at: tuple[int, ...] = ()) -> torch.Tensor:
        """A whole tensor, or all that it has at these indices of its first dimensions, pasted together."""
        tensor, depth = self._folder.tensors[name], len(at)
        found: torch.Tensor | None = None
        for piece in tensor.pieces:
            index = tuple(i - offset for i, offset in zip(at, piece.box.offset, strict=False))
            if all(0 <= i < size for i, size in zip(index, piece.box.size, strict=False)):
                chunk = load_range(piece.file, piece.start, piece.num_bytes)
                found = torch.empty(tensor.shape[depth:], dtype=chunk.dtype) if found is None else found
                found[piece.box.slices[depth:]] = chunk[index]
        assert found is not None, (name, at)
        return found

    def begins(self, name: str) -> list[int]:
        """Where the pieces of a tensor of one dimension begin."""
        return sorted(piece.box.offset[0] for piece in self._folder.tensors[name].pieces)

    def run(self, name: str, start: int, end: int) -> torch.Tensor:
        """Elements of a tensor of one dimension; NaN where no piece has them."""
        found: torch.Tensor | None = None
        for piece in self._folder.tensors[name].pieces:
            (first,), (size,) = piece.box.offset, piece.box.size
            a, b = max(start, first), min(end, first + size)
            if a < b:
                chunk = self._recent(piece.file, piece.start, piece.num_bytes)
                found = torch.full((end - start,), torch.nan, dtype=chunk.dtype) if found is None else found
                found[a - start : b - start] = chunk[a - first : b - first]
        return torch.full((end - start,), torch.nan) if found is None else found

    def common(self) -> Any:
        """What Megatron saves beside the tensors: an object among them, or before version 0.19 a file."""
        place = self._folder.objects.get("common_state/shard_0_1")
        return (
            load(self._folder.path / "common.pt")
            if place is None
            else load_range(place.file, place.start, place.num_bytes)[0]
        )
