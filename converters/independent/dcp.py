"""Tensors of a folder of torch.distributed.checkpoint, pasted together and turned as a whole by PyTorch.

The table of names says what lies where.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from converters.independent._dcp_chunks import DcpTensors
from converters.independent._turned import bits, turn
from converters.megatron.pieces import PieceSource
from workbench.checkpoint.source import TensorSource
from workbench.spec.geometry import LogicalTensor


class DcpFiles:
    """The tensors of a folder, each pasted and turned whole, the latest of them kept."""

    def __init__(self, folder: Path, source: TensorSource) -> None:
        assert isinstance(source, PieceSource)
        self._tensors, self._rules = DcpTensors(folder), source.rules
        self._turned = lru_cache(maxsize=1)(self._turn)

    def read(self, tensor: LogicalTensor, rows: slice) -> np.ndarray:
        """These rows of a logical tensor in storage dtype (all of a scalar)."""
        turned = self._turned(tensor.name)
        return bits(turned[rows] if tensor.shape else turned)

    def _turn(self, name: str) -> torch.Tensor:
        rule = self._rules[name]
        return turn(rule.view, self._tensors.join(rule.foreign))


READER = DcpFiles
