"""Random numbers as a pure function of what they are for: no generator, so no state to save, replay or keep in step."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

_MIX_1 = -0x40A7B892E31B1A47  # 0xbf58476d1ce4e5b9 of splitmix64 (Steele et al., OOPSLA 2014), as int64
_MIX_2 = -0x6B2FB644ECCEEE15  # 0x94d049bb133111eb
STEP = -0x61C8864680B583EB  # 0x9e3779b97f4a7c15


def hash_text(text: str) -> int:
    """A signed number of 64 bits."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def mix(state: torch.Tensor) -> torch.Tensor:
    """64 random bits for each int64, by splitmix64's finisher."""
    state = _folded(state, 30).mul_(_MIX_1)
    state = _folded(state, 27).mul_(_MIX_2)
    return _folded(state, 31)


def hash_grid(state: torch.Tensor, coordinates: Sequence[torch.Tensor]) -> torch.Tensor:
    """64 random bits for each point of a grid, [*state.shape, n1, n2, ...], from `coordinates` of n1, n2, ... indices.

    Each point depends on its own state and indices alone, so any slice of a grid can be had without the rest.
    """
    for index in coordinates:
        state = mix(state.unsqueeze(-1) + (index.to(torch.int64) + 1) * STEP)
    return state


def _folded(state: torch.Tensor, bits: int) -> torch.Tensor:
    """A new tensor: each number xor itself shifted right, zeros moving in from the left."""
    return (state >> bits).bitwise_and_((1 << (64 - bits)) - 1).bitwise_xor_(state)
