"""The base of layers whose parameters are cut from logical tensors."""

from __future__ import annotations

import torch
from torch import nn

from workbench.parallel.gemm import PLAIN, Gemm
from workbench.parallel.mesh import Mesh
from workbench.spec.geometry import ParameterSpec, Shard


class ParallelModule(nn.Module):
    """A layer that is built from parameter specs, and so can say which box of which logical tensor it holds."""

    def __init__(self, mesh: Mesh, **specs: ParameterSpec | None) -> None:
        """`specs` by parameter name; a None stands for a parameter that the layer does without."""
        super().__init__()
        self.mesh = mesh
        self.gemm: Gemm = PLAIN
        self.specs: dict[str, ParameterSpec] = {}
        for name, spec in specs.items():
            if spec is None:
                self.register_parameter(name, None)
                continue
            self.specs[name] = spec
            shape = spec.local_shape(mesh.tp.size)
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
            for part in spec.local_parts():
                shard = part.shard(mesh.tp.size, mesh.tp.rank)
                if shard is not None and shard.partial_grad:
                    mesh.copies(shard.copies)

    def shards(self) -> dict[str, tuple[Shard, ...]]:
        """Per parameter: which box of which logical tensor lies where in it, before data parallelism cuts its rows."""
        tp, ep = self.mesh.tp, self.mesh.ep
        return {name: spec.shards(tp.size, tp.rank, ep.rank) for name, spec in self.specs.items()}

    @property
    def is_dealt(self) -> bool:
        """Whether ranks of the expert axis hold different tensors in the layer's parameters."""
        return any(spec.dealt > 1 for spec in self.specs.values())
