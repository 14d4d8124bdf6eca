"""Tensors of DeepSpeed's universal checkpoints by PyTorch's own loader, turned as a whole by PyTorch.

The family's table says what lies where.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from converters.formats.deepspeed_universal import UniversalSource
from converters.independent._torch_files import load
from converters.independent._turned import bits, turn
from workbench.checkpoint.source import TensorSource
from workbench.spec.geometry import LogicalTensor


class UniversalFiles:
    """The tensors of a folder, each turned whole, the latest of them kept."""

    def __init__(self, folder: Path, source: TensorSource) -> None:
        assert isinstance(source, UniversalSource)
        self._folder, self._places = folder / "zero", source.places
        self._turned = lru_cache(maxsize=1)(self._turn)

    def read(self, tensor: LogicalTensor, rows: slice) -> np.ndarray:
        """These rows of a logical tensor in storage dtype."""
        return bits(self._turned(tensor.name)[rows])

    def _turn(self, name: str) -> torch.Tensor:
        kind, _, _ = name.removeprefix("optim.").rpartition("/")
        place, rule = self._places[name]
        stored = load(self._folder / place.file.parent.name / f"{kind or 'fp32'}.pt")
        tensor = stored["param"] if isinstance(stored, dict) else stored
        return turn(rule.view, tensor.view(place.shape))


READER = UniversalFiles
