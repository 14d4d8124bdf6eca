"""Tensors of a folder of torch.distributed.checkpoint by that library itself, turned as a whole by PyTorch.

It unpickles `.metadata`, so it reads nothing but what was written here. The table of names says what lies where.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from converters.independent._turned import bits, turn
from converters.megatron.pieces import PieceSource
from workbench.checkpoint.source import TensorSource
from workbench.spec.geometry import LogicalTensor


class DcpFiles:
    """The tensors of a folder, each loaded and turned whole, the latest of them kept."""

    def __init__(self, folder: Path, source: TensorSource) -> None:
        assert isinstance(source, PieceSource)
        self._files, self._rules = _Files(folder), source.rules
        self._turned = lru_cache(maxsize=1)(self._turn)

    @staticmethod
    def reads(folder: Path, *, own: bool) -> bool:
        """Nothing but our own."""
        return own

    def read(self, tensor: LogicalTensor, rows: slice) -> np.ndarray:
        """These rows of a logical tensor in storage dtype (all of a scalar)."""
        turned = self._turned(tensor.name)
        return bits(turned[rows] if tensor.shape else turned)

    def _turn(self, name: str) -> torch.Tensor:
        rule = self._rules[name]
        stored = self._files.read_metadata().state_dict_metadata[rule.foreign]
        assert isinstance(stored, TensorStorageMetadata)
        found = torch.zeros(stored.size, dtype=stored.properties.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            checkpoint.load({rule.foreign: found}, storage_reader=self._files, no_dist=True)
        return turn(rule.view, found)


class _Files(checkpoint.FileSystemReader):
    """Reads its metadata once."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._metadata = super().read_metadata()

    def read_metadata(self) -> Metadata:
        return self._metadata


READER = DcpFiles
