"""Dropout as a pure function of what is dropped.

Whether an element survives depends on (seed, step, site, sample, position, feature) alone. Any rank can compute the
mask of any slice, so a run drops the same elements at every layout, and a recomputed forward drops them again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from workbench.parallel.hashing import STEP, hash_grid, hash_text, mix

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
        start = hash_text(f"{self.seed}/{self.step}/{'.'.join(site)}")
        return mix(self.sample_ids.to(torch.int64) * STEP + start)


def dropout(
    x: torch.Tensor, probability: float, rows: torch.Tensor, coordinates: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """`x` with elements zeroed at `probability` and the others scaled up.

    rows: one hash per leading index of x [B]. coordinates: for each further dimension the global indices of x there.
    """
    keep = (hash_grid(rows, coordinates) & (_RESOLUTION - 1)) >= int(probability * _RESOLUTION)
    return x * (keep.to(x.dtype) / (1.0 - probability))


def uniform_noise(rows: torch.Tensor, coordinates: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Draws from [-1, 1) in float32, one for each point of the grid that `dropout` takes."""
    return (hash_grid(rows, coordinates) & (_RESOLUTION - 1)).float() * (2 / _RESOLUTION) - 1
