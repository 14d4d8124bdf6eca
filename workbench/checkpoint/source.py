"""What holds weights: anything that can list its logical tensors and hand out any box of them. NumPy, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from workbench.spec.geometry import Box, LogicalTensor

if TYPE_CHECKING:
    import numpy as np


class TensorSource(Protocol):
    """A checkpoint in any format, a live model, or a source wrapped around another."""

    @property
    def schema(self) -> Mapping[str, LogicalTensor]:
        """Every logical tensor by name: weights, and moments as `optim.exp_avg/<name>`."""
        ...

    def chunks(self, name: str) -> tuple[Box, ...]:
        """The boxes in which the tensor lies; they cover it exactly once. Reading along them is cheapest."""
        ...

    def read(self, name: str, box: Box) -> np.ndarray:
        """The elements of `box`, of the box's shape, in the storage dtype (`dtypes.NUMPY_NAMES`); may be a view.

        Raises CheckpointError when the bytes are missing or damaged.
        """
        ...
