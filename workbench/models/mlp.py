"""The feed-forward block, its width cut over the tensor axis.

Legend: B batch, T tokens, D hidden, F ffn (local).
"""

from __future__ import annotations

import torch
from torch import nn

from workbench.models.batch import LocalBatch
from workbench.models.recompute import recomputed
from workbench.parallel.dropout import dropout
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
        self.path, self.dropout, self.tp_rank = path, model.mlp_dropout, mesh.tp.rank
        self.recompute = False

    def forward(self, x_BTD: torch.Tensor, batch: LocalBatch) -> torch.Tensor:
        return self.down_proj(recomputed(self.recompute, self._activate, self.up_proj(x_BTD), batch))

    def _activate(self, projected: torch.Tensor, batch: LocalBatch) -> torch.Tensor:
        """[B, T, F] from what `up_proj` gives for all tokens of this context rank."""
        if self.gated:
            gate_BTF, up_BTF = projected.split(self.up_proj.output_sizes, dim=-1)
            y_BTF = self.activation(gate_BTF) * up_BTF
        else:
            y_BTF = self.activation(projected)
        if not self.dropout or batch.dropout is None:
            return y_BTF
        width = y_BTF.shape[-1]
        features_F = torch.arange(width, device=y_BTF.device) + width * self.tp_rank
        return dropout(y_BTF, self.dropout, batch.dropout.rows(self.path, "inner"), (batch.tokens, features_F))
