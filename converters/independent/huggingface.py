"""Tensors of a Hugging Face folder by the safetensors library, turned as a whole by PyTorch.

The family's table says what lies where.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from converters.formats._huggingface_files import INDEX, WEIGHTS
from converters.formats._huggingface_source import HuggingFaceSource
from converters.independent._turned import bits, turn
from workbench.checkpoint.source import TensorSource
from workbench.spec.geometry import LogicalTensor


class HuggingFaceFiles:
    """The tensors of a folder, each turned whole, the latest of them kept."""

    def __init__(self, folder: Path, source: TensorSource) -> None:
        assert isinstance(source, HuggingFaceSource)
        self._folder, self._places = folder, source.match.places
        index = folder / INDEX
        self._files = json.loads(index.read_bytes())["weight_map"] if index.exists() else {}
        self._turned = lru_cache(maxsize=1)(self._turn)

    @staticmethod
    def reads(folder: Path, *, own: bool) -> bool:
        """Whether its weights are safetensors."""
        return next(folder.glob("*.safetensors"), None) is not None

    def read(self, tensor: LogicalTensor, rows: slice) -> np.ndarray:
        """These rows of a logical tensor in storage dtype (all of a scalar)."""
        turned = self._turned(tensor.name)
        return bits(turned[rows] if tensor.shape else turned)

    def _turn(self, name: str) -> torch.Tensor:
        """The logical tensor: a view of a mapped file, unless its elements are gathered from several places."""
        foreign, rule = self._places[name]
        with safe_open(self._folder / self._files.get(foreign, WEIGHTS), framework="pt") as file:
            found = file.get_tensor(foreign)
        return turn(rule.view, found)


READER = HuggingFaceFiles
