"""What microbatches say of themselves, put together over all of them and all ranks."""

from __future__ import annotations

import torch

from workbench.parallel.mesh import Mesh


class Tally:
    """Vectors are added up; of matrices every row is kept."""

    def __init__(self) -> None:
        self._found: list[torch.Tensor] = []

    def put(self, more: torch.Tensor) -> None:
        """Adds what one microbatch says."""
        if self._found and more.dim() == 1:
            self._found[0] = self._found[0] + more
        else:
            self._found.append(more)

    def total(self, mesh: Mesh) -> list[float]:
        """The sums, or all rows one after the other, on every rank. Ranks of tp and cp say the same, so one counts.

        Communicates over the world.
        """
        counts_here = bool(self._found) and mesh.tp.rank == 0 and mesh.cp.rank == 0
        totals = Tally()
        for part in mesh.world.gather_objects(torch.cat(self._found).cpu() if counts_here else None):
            if part is not None:
                totals.put(part)
        found: list[float] = torch.cat(totals._found).flatten().tolist()
        return found
