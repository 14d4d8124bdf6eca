"""The feed-forward block, its width cut over the tensor axis.

Legend: B batch, T tokens, D hidden, F ffn (local).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from workbench.models.recompute import recomputed
from workbench.parallel.linear import ColumnParallelLinear, RowParallelLinear
from workbench.parallel.mesh import Mesh
from workbench.spec.geometry import ParameterSpec
from workbench.spec.model import ModelConfig


class MLP(nn.Module):
    """down(act(up x)), or down(act(gate x) * up x) when gated (arXiv:2002.05202); gate and up are one GEMM."""

    def __init__(self, model: ModelConfig, mesh: Mesh, specs: dict[str, ParameterSpec], layer: int) -> None:
        super().__init__()
        path = f"layers.{layer}.mlp"
        self.up_proj = ColumnParallelLinear(mesh, specs[f"{path}.up_proj.weight"], specs.get(f"{path}.up_proj.bias"))
        self.down_proj = RowParallelLinear(mesh, specs[f"{path}.down_proj.weight"], specs.get(f"{path}.down_proj.bias"))
        self.activation = model.hidden_act
        self.gated = model.gated_mlp
        self.recompute = False

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.down_proj(recomputed(self.recompute, self._activate, self.up_proj(x_BTD)))

    def _activate(self, projected: torch.Tensor) -> torch.Tensor:
        """[B, T, F] from what `up_proj` gives."""
        if not self.gated:
            return activate(projected, self.activation)
        gate_BTF, up_BTF = projected.split(self.up_proj.output_sizes, dim=-1)
        return activate(gate_BTF, self.activation) * up_BTF


def activate(x: torch.Tensor, name: str) -> torch.Tensor:
    """The activation that `name` stands for; gelu_tanh is the tanh approximation (arXiv:1606.08415, sec. 2)."""
    if name == "silu":
        return F.silu(x)
    if name == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")
