"""Tensors of a Hugging Face folder by the safetensors library, turned as a whole by PyTorch.

The family's table says what lies where; how its operations act on a whole tensor is said here a second time.
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
from converters.rules import Halve, Merge, Operation, Permute, Slice, Split
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

    def read(self, tensor: LogicalTensor, rows: slice) -> np.ndarray:
        """These rows of a logical tensor in storage dtype (all of a scalar)."""
        turned = self._turned(tensor.name)
        return bits(turned[rows] if tensor.shape else turned)

    def _turn(self, name: str) -> torch.Tensor:
        """The logical tensor: a view of a mapped file, unless its elements are gathered from several places."""
        foreign, rule = self._places[name]
        with safe_open(self._folder / self._files.get(foreign, WEIGHTS), framework="pt") as file:
            found = file.get_tensor(foreign)
        for operation in rule.view:
            found = apply(operation, found)
        return found


def apply(operation: Operation, tensor: torch.Tensor) -> torch.Tensor:
    """The target of an operation on a whole tensor."""
    match operation:
        case Permute(axes):
            return tensor.permute(axes)
        case Slice(dim, start, size):
            return tensor.narrow(dim, start, size)
        case Split(dim, sizes):
            return tensor.unflatten(dim, sizes)
        case Merge(dim, sizes):
            return tensor.flatten(dim, dim + len(sizes) - 1)
        case Halve(dim, start, period):
            still, pairs = tensor.unflatten(dim, (-1, period)).split((start, period - start), dim + 1)
            firsts, seconds = pairs.unflatten(dim + 1, (-1, 2)).unbind(dim + 2)
            return torch.cat((still, firsts, seconds), dim + 1).flatten(dim, dim + 1)
    raise AssertionError(f"{operation} is no operation of converters.rules")


def bits(tensor: torch.Tensor) -> np.ndarray:
    """The elements as NumPy has them in storage: bf16 as uint16."""
    tensor = tensor.contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


READER = HuggingFaceFiles
