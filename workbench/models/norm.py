"""Normalisation over the hidden dimension, computed in fp32 at least."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from workbench.parallel.backends import Normalise
from workbench.parallel.loss import accumulation_dtype
from workbench.parallel.mesh import Mesh
from workbench.parallel.module import ParallelModule
from workbench.spec.geometry import ParameterSpec
from workbench.spec.model import ModelConfig


class RMSNorm(ParallelModule):
    """x / rms(x) * weight (arXiv:1910.07467).

    The scaled value is rounded to x's type before the weight multiplies it, as in the reference models.
    """

    weight: nn.Parameter

    def __init__(self, mesh: Mesh, weight: ParameterSpec, eps: float) -> None:
        super().__init__(mesh, weight=weight)
        self.eps = eps
        self.normalise: Normalise | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.normalise is not None:
            return self.normalise(x) * self.weight.to(x.dtype)
        wide = x.to(accumulation_dtype(x.dtype))
        # Not F.rms_norm: without a kernel of its own (on a CPU) its backward costs 1.5 times this one's.
        mean_square = (wide * wide).sum(-1, keepdim=True) / x.shape[-1]
        normed = wide * torch.rsqrt(mean_square + self.eps)
        return normed.to(x.dtype) * self.weight.to(x.dtype)


class LayerNorm(ParallelModule):
    """(x - mean) / std * weight + bias (arXiv:1607.06450)."""

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, mesh: Mesh, weight: ParameterSpec, bias: ParameterSpec, eps: float) -> None:
        super().__init__(mesh, weight=weight, bias=bias)
        self.eps = eps
        self.normalise: Normalise | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.normalise is not None:
            return self.normalise(x) * self.weight.to(x.dtype) + self.bias.to(x.dtype)
        return F.layer_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def build_norm(model: ModelConfig, mesh: Mesh, specs: dict[str, ParameterSpec], path: str) -> RMSNorm | LayerNorm:
    """The norm at `path` that the model's features ask for."""
    if model.norm == "layernorm":
        return LayerNorm(mesh, specs[f"{path}.weight"], specs[f"{path}.bias"], model.norm_eps)
    return RMSNorm(mesh, specs[f"{path}.weight"], model.norm_eps)
