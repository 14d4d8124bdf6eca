"""Tensors of a Hugging Face folder by the safetensors library, or PyTorch's loader, turned as a whole by PyTorch.

The family's table says what lies where.
"""

from __future__ import annotations

import json
from functools import cache, lru_cache
from pathlib import Path
from typing import Final

import numpy as np
import torch
from safetensors import safe_open

from converters.formats._huggingface_source import HuggingFaceSource
from converters.independent._torch_files import load
from converters.independent._turned import bits, turn
from workbench.checkpoint.source import TensorSource
from workbench.spec.geometry import LogicalTensor

_WHOLE: Final = ("model.safetensors", "pytorch_model.bin")
_INDEXES: Final = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


class HuggingFaceFiles:
    """The tensors of a folder, each turned whole, the latest of them kept."""

    def __init__(self, folder: Path, source: TensorSource) -> None:
        assert isinstance(source, HuggingFaceSource)
        self._folder, self._places = folder, source.match.places
        index = next((folder / name for name in _INDEXES if (folder / name).exists()), None)
        self._files = json.loads(index.read_bytes())["weight_map"] if index else {}
        self._only = next((name for name in _WHOLE if (folder / name).exists()), "")
        self._load = cache(load)
        self._turned = lru_cache(maxsize=1)(self._turn)

    def read(self, tensor: LogicalTensor, rows: slice) -> np.ndarray:
        """These rows of a logical tensor in storage dtype (all of a scalar)."""
        turned = self._turned(tensor.name)
        return bits(turned[rows] if tensor.shape else turned)

    def _turn(self, name: str) -> torch.Tensor:
        """The logical tensor: a view of a mapped file, unless its elements are gathered from several places."""
        foreign, rule = self._places[name]
        path = self._folder / self._files.get(foreign, self._only)
        if path.suffix != ".safetensors":
            return turn(rule.view, self._load(path)[foreign])
        with safe_open(path, framework="pt") as file:
            return turn(rule.view, file.get_tensor(foreign))


READER = HuggingFaceFiles
