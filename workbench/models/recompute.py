"""Memory for time: what a layer keeps for its backward is computed again there, or waits in the host's memory.

Nothing random needs replaying: dropout is a function of what is dropped (workbench/parallel/dropout.py).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar, TypeVarTuple, Unpack

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")


def recomputed(on: bool, function: Callable[[Unpack[Arguments]], Result], *args: *Arguments) -> Result:
    """`function(*args)`; if `on`, backward keeps the arguments alone and calls it once more.

    The second call ends as soon as all that backward needs is there, so a last product whose result nobody keeps is
    not computed again. Collectives inside run again, in the same order on all ranks.
    """
    if not (on and torch.is_grad_enabled()):
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


class HostMemory:
    """Moves what autograd saves into the host's memory until backward; parameters, which stay anyway, stay.

    Copies are synchronous towards the host, as in torch.autograd.graph.save_on_cpu, which would move the weights too.
    """

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned

    def saving(self) -> AbstractContextManager[Any]:
        """Inside it, saved tensors go to the host."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def _pack(self, tensor: torch.Tensor) -> tuple[torch.device, torch.Tensor]:
        if isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter):
            return tensor.device, tensor
        # Strides are kept: of another layout a product may take another kernel, and give other bits.
        host = torch.empty_like(tensor, device="cpu", pin_memory=self._pinned)
        return tensor.device, host.copy_(tensor)


def _unpack(packed: tuple[torch.device, torch.Tensor]) -> torch.Tensor:
    device, tensor = packed
    return tensor.to(device, non_blocking=True)
