"""Normalisation over the hidden dimension, computed in fp32 at least."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from workbench.parallel.backends import Normalise
from workbench.parallel.collectives import copy_to, reduce_from
from workbench.parallel.loss import accumulation_dtype
from workbench.parallel.mesh import Mesh
from workbench.parallel.module import ParallelModule
from workbench.spec.geometry import ParameterSpec
from workbench.spec.model import ModelConfig


class RMSNorm(ParallelModule):
    """x / rms(x) * weight (arXiv:1910.07467).

    The scaled value is rounded to x's type before the weight multiplies it, as in the reference models; but not if
    with `unit_offset` the factor is 1 + weight. Where the weight is cut over tp, so is what is normed, and each forward
    and backward all-reduces one value a token over tp.
    """

    weight: nn.Parameter

    def __init__(self, mesh: Mesh, weight: ParameterSpec, eps: float, *, unit_offset: bool = False) -> None:
        super().__init__(mesh, weight=weight)
        self.eps, self.unit_offset = eps, unit_offset
        self.is_cut = mesh.tp.size > 1 and weight.parts[0].dim is not None
        self.normalise: Normalise | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = accumulation_dtype(x.dtype)
        if self.normalise is not None:
            normed = self.normalise(x)
        elif x.is_cuda and not self.is_cut:
            # In fp32 inside. Its kernel takes a quarter of the formula's time; on a CPU there is none, and backward
            # costs 1.5 times the formula's (docs/performance.md).
            normed = F.rms_norm(x.to(wide) if self.unit_offset else x, x.shape[-1:], eps=self.eps)
        else:
            normed = self._normed(x.to(wide))
        if self.unit_offset:
            return (normed * (1 + self.weight.to(wide))).to(x.dtype)
        return normed.to(x.dtype) * self.weight.to(x.dtype)

    def _normed(self, wide: torch.Tensor) -> torch.Tensor:
        mean_square = (wide * wide).sum(-1, keepdim=True) / wide.shape[-1]
        if self.is_cut:
            # Every rank goes on with the sum and sees part of its gradient. All heads have equally many copies.
            mean_square = copy_to(reduce_from(mean_square, self.mesh.tp), self.mesh.tp) / self.mesh.tp.size
        return wide * torch.rsqrt(mean_square + self.eps)


class LayerNorm(ParallelModule):
    """(x - mean) / std * weight + bias (arXiv:1607.06450)."""

    weight: nn.Parameter
    bias: nn.Parameter
    is_cut = False

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
    return RMSNorm(mesh, specs[f"{path}.weight"], model.norm_eps, unit_offset=model.norm_unit_offset)
