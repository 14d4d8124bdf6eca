"""How the operations of a rule act on a whole tensor, said a second time: with PyTorch."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from converters.rules import Halve, Merge, Operation, Permute, Slice, Split


def turn(view: Iterable[Operation], tensor: torch.Tensor) -> torch.Tensor:
    """The logical tensor that a view makes of a whole foreign tensor."""
    for operation in view:
        tensor = _apply(operation, tensor)
    return tensor


def _apply(operation: Operation, tensor: torch.Tensor) -> torch.Tensor:
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
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()
