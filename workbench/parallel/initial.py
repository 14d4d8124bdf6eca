"""Initial weights that depend on the seed and the logical tensor alone, never on the rank or the layout."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch

from workbench.spec.geometry import Box

BLOCK_ROWS = 256
_Draw = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


def normal(name: str, shape: tuple[int, ...], box: Box, *, seed: int, std: float) -> torch.Tensor:
    """The elements of `box` of the logical tensor `name`, fp32 on the CPU, drawn from N(0, std^2).

    The tensor is drawn in blocks of rows, each from a generator of its own, so any box costs only the blocks that it
    meets and all layouts see the same numbers.
    """
    return _drawn(name, shape, box, seed, lambda block, generator: block.normal_(0.0, std, generator=generator))


def uniform(name: str, shape: tuple[int, ...], box: Box, *, seed: int, bound: float) -> torch.Tensor:
    """As `normal`, drawn evenly between -bound and bound."""
    return _drawn(name, shape, box, seed, lambda block, generator: block.uniform_(-bound, bound, generator=generator))


def _drawn(name: str, shape: tuple[int, ...], box: Box, seed: int, draw: _Draw) -> torch.Tensor:
    columns = shape[1:]
    found = torch.empty(box.size)
    start, stop = box.offset[0], box.end[0]
    for first in range(start - start % BLOCK_ROWS, stop, BLOCK_ROWS):
        last = min(first + BLOCK_ROWS, shape[0])
        block = draw(torch.empty((last - first, *columns)), _generator(seed, name, first))
        low, high = max(first, start), min(last, stop)
        rows = block[low - first : high - first]
        found[low - start : high - start] = rows[(slice(None), *box.slices[1:])]
    return found


def _generator(seed: int, name: str, first_row: int) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}/{first_row}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
