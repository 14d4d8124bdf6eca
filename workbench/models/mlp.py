"""The feed-forward block, its width cut over the tensor axis.

Legend: B batch, T tokens, D hidden, F ffn (local).
"""

from __future__ import annotations

import torch
from torch import nn

from workbench.models.recompute import recomputed
from workbench.parallel.linear import ColumnParallelLinear, RowParallelLinear
from workbench.parallel.mesh import Mesh
from workbench.registry import load
from workbench.spec.geometry import ParameterSpec
from workbench.spec.model import ModelConfig


class MLP(nn.Module):
    """down(act(up x)), or down(act(gate x) * up x) when gated (arXiv:2002.05202); gate and up are one GEMM."""

    def __init__(self, model: ModelConfig, mesh: Mesh, specs: dict[str, ParameterSpec], path: str) -> None:
        super().__init__()
        self.up_proj = ColumnParallelLinear(mesh, specs[f"{path}.up_proj.weight"], specs.get(f"{path}.up_proj.bias"))
        self.down_proj = RowParallelLinear(mesh, specs[f"{path}.down_proj.weight"], specs.get(f"{path}.down_proj.bias"))
        self.activation = load("workbench.models.activations", model.hidden_act, "ACTIVATION")
        self.gated = model.gated_mlp
        self.recompute = False

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.down_proj(recomputed(self.recompute, self._activate, self.up_proj(x_BTD)))

    def _activate(self, projected: torch.Tensor) -> torch.Tensor:
        """[B, T, F] from what `up_proj` gives."""
        if not self.gated:
            return self.activation(projected)
        gate_BTF, up_BTF = projected.split(self.up_proj.output_sizes, dim=-1)
        return self.activation(gate_BTF) * up_BTF
