"""The parameters of a running stage as local plain tensors, each with the boxes of logical tensors that it holds.

Optimizer, clipping, saving and loading work on these, so none of them knows how data parallelism wraps a parameter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from workbench.parallel.mesh import Mesh
from workbench.parallel.module import ParallelModule
from workbench.spec.geometry import EMBED, FINAL, ParameterSpec, Shard, cut_rows


@dataclass(frozen=True, eq=False)
class LiveParameter:
    """One parameter of this rank. `shards` place its logical boxes in `data`, after any cut by data parallelism."""

    path: str
    spec: ParameterSpec
    parameter: nn.Parameter
    shards: tuple[Shard, ...]
    tied_stages: bool
    every_stage: bool
    counted: bool
    """Whether this rank, and not another stage or replica, counts and saves what it holds."""

    @property
    def data(self) -> torch.Tensor:
        """The local values; writing to them writes to the parameter."""
        return _local(self.parameter.detach())

    @property
    def grad(self) -> torch.Tensor | None:
        """The local gradient; writing to it writes to the parameter's gradient."""
        return None if self.parameter.grad is None else _local(self.parameter.grad)

    def require_grad(self) -> torch.Tensor:
        """The local gradient, made of zeros if backward did not reach the parameter."""
        if self.parameter.grad is None:
            self.parameter.grad = torch.zeros_like(self.parameter)
        return _local(self.parameter.grad)

    @property
    def trainable(self) -> bool:
        return self.parameter.requires_grad


def live_parameters(stage: nn.Module, mesh: Mesh) -> list[LiveParameter]:
    """Every parameter of `stage` on this rank, in module order; a tied one once, and none that is held in 4 bits."""
    found: list[LiveParameter] = []
    seen: set[int] = set()
    for path, module in stage.named_modules():
        if not isinstance(module, ParallelModule):
            continue
        shards = module.shards()
        for name, spec in module.specs.items():
            parameter = getattr(module, name)
            if isinstance(parameter, nn.Parameter) and id(parameter) not in seen:
                seen.add(id(parameter))
                found.append(_live(f"{path}.{name}", spec, parameter, shards[name], mesh))
    missing = [path for path, parameter in stage.named_parameters() if id(parameter) not in seen]
    assert not missing, f"parameters without geometry: {missing}"
    return found


def shard_views(parameter: LiveParameter, tensor: torch.Tensor) -> Iterator[tuple[Shard, torch.Tensor]]:
    """Each shard of `parameter` with its view of `tensor`, which has the parameter's local shape."""
    for shard in parameter.shards:
        yield shard, tensor[shard.local.slices]


def _live(
    path: str, spec: ParameterSpec, parameter: nn.Parameter, shards: tuple[Shard, ...], mesh: Mesh
) -> LiveParameter:
    tied = mesh.layout.last_stage != 0 and EMBED in spec.places and FINAL in spec.places
    everywhere = mesh.layout.pp > 1 and sum(isinstance(place, int) for place in spec.places) > 1
    replicas = mesh.replicas_of(spec)
    cut = isinstance(parameter, DTensor) and replicas.sharers > 1
    # The first of the copies that replicas hold, or share, speaks for all; so does the first of the stages.
    counted = replicas.rank < (replicas.sharers if cut else 1) and not ((tied or everywhere) and mesh.pp.rank > 0)
    if cut:
        rows = parameter.shape[0]
        share = math.ceil(rows / replicas.sharers)
        start = min(share * (replicas.rank % replicas.sharers), rows)
        shards = cut_rows(shards, start, min(start + share, rows))
    return LiveParameter(path, spec, parameter, shards, tied, everywhere, counted)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
