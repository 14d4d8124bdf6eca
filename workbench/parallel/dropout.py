"""Dropout as a pure function of what is dropped: no generator, so no state to save, replay or keep in step.

Whether an element survives depends on (seed, step, site, sample, position, feature) alone. Any rank can compute the
mask of any slice, so a run drops the same elements at every layout, and a recomputed forward drops them again.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

_MIX_1 = -0x40A7B892E31B1A47  # 0xbf58476d1ce4e5b9 of splitmix64 (Steele et al., OOPSLA 2014), as int64
_MIX_2 = -0x6B2FB644ECCEEE15  # 0x94d049bb133111eb
_STEP = -0x61C8864680B583EB  # 0x9e3779b97f4a7c15
_RESOLUTION = 1 << 24


@dataclass(frozen=True, slots=True)
class DropoutKey:
    """What the masks of one forward depend on: the run's seed, the step, each row's global sample index [B]."""

    seed: int
    step: int
    sample_ids: torch.Tensor

    @torch.compiler.disable  # else torch.compile makes a graph per layer and step, and gives up after a few
    def rows(self, *site: str) -> torch.Tensor:
        """One hash per sample for the dropout at the place that the joined words of `site` name, [B] int64."""
        text = f"{self.seed}/{self.step}/{'.'.join(site)}".encode()
        start = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)
        return _mix(self.sample_ids.to(torch.int64) * _STEP + start)


def dropout(
    x: torch.Tensor, probability: float, rows: torch.Tensor, coordinates: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """`x` with elements zeroed at `probability` and the others scaled up.

    rows: one hash per leading index of x [B]. coordinates: for each further dimension the global indices of x there.
    """
    state = rows.view(-1, *(1,) * len(coordinates))
    for i, index in enumerate(coordinates):
        shape = [1] * x.dim()
        shape[i + 1] = index.numel()
        state = _mix(state + (index.to(torch.int64) + 1).view(shape) * _STEP)
    keep = (state & (_RESOLUTION - 1)) >= int(probability * _RESOLUTION)
    return x * (keep.to(x.dtype) / (1.0 - probability))


def _mix(state: torch.Tensor) -> torch.Tensor:
    state = (state ^ _shift(state, 30)) * _MIX_1
    state = (state ^ _shift(state, 27)) * _MIX_2
    return state ^ _shift(state, 31)


def _shift(state: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift right of int64."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)
