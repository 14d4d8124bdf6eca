"""Context parallelism: which tokens of a row each context rank has, and rows put together again.

A row is cut into 2 * cp chunks and rank i has chunks i and 2 * cp - 1 - i, so that all ranks have the same share of the
causal triangle (arXiv:2407.21783, sec. 3.3.2).
"""

from __future__ import annotations

import torch

from workbench.parallel.axis import Axis
from workbench.parallel.collectives import gather_from


def context_chunks(size: int, rank: int) -> tuple[int, ...]:
    """The numbers of the chunks that `rank` of `size` context ranks has; one rank has the one chunk there is."""
    return (rank, 2 * size - 1 - rank) if size > 1 else (0,)


def context_tokens(length: int, size: int, rank: int, device: torch.device | None = None) -> torch.Tensor:
    """The indices, in a row of `length` tokens, of those that `rank` has [T], in order."""
    chunks = torch.arange(length, device=device).chunk(2 * size if size > 1 else 1)
    return torch.cat([chunks[number] for number in context_chunks(size, rank)])


def gather_context(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Whole rows in token order from the shares [B, T, ...] of all context ranks; backward sums and scatters."""
    if axis.size == 1:
        return x
    chunks = gather_from(x, axis).unflatten(1, (axis.size, 2, -1))
    return torch.cat((chunks[:, :, 0], chunks[:, :, 1].flip(1)), dim=1).flatten(1, 2)
