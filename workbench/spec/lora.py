"""Low-rank adapters as geometry: which pairs (A, B) a model gets, and how they are cut. No torch.

An adapted projection computes x W^T + s (x A^T) B^T (Hu et al., arXiv:2106.09685). Every logical projection has a pair
of its own, also where several are fused in one run-time parameter, so that adapters are exchanged as plain renames.
A column-parallel projection has A whole on every rank and B cut like the outputs; a row-parallel one has A cut like
the inputs and B whole. Each rank sees part of the gradient of a whole factor. A projection that is whole on every rank
has whole factors, whose gradients are whole or partial as its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from workbench.config import Config
from workbench.config_faults import nearest
from workbench.errors import ConfigError
from workbench.spec.geometry import LogicalTensor, ParameterSpec, Part
from workbench.spec.layout import ParallelLayout
from workbench.spec.model import ModelConfig
from workbench.spec.schema import feed_forward_specs, head_specs, layer_specs

A_SUFFIX, B_SUFFIX = "lora_A.weight", "lora_B.weight"


class LoraSpec(Config):
    """The shape of an adapter: what a checkpoint of one records."""

    r: int = Field(default=8, gt=0, description="Rank of each pair.")
    alpha: float = Field(default=16.0, gt=0, description="The update is scaled by alpha / r.")
    rslora: bool = Field(default=False, description="Scale by alpha / sqrt(r) instead (arXiv:2312.03732).")
    targets: tuple[str, ...] | Literal["all"] = Field(
        default="all", description='Projections to adapt, like ["q_proj", "v_proj"]; "all": every one in the layers.'
    )

    @property
    def scaling(self) -> float:
        """What multiplies B A."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)


class AdapterRecord(Config):
    """What a checkpoint of an adapter says of it: its shape, and the weights that it was trained on.

    base: the path as it was given. base_fingerprint: one digest of the fingerprints of all logical tensors of the base.
    """

    kind: Literal["lora"] = "lora"
    lora: LoraSpec
    base: str
    base_fingerprint: str


@dataclass(frozen=True)
class LoraPair:
    """The adapters of one run-time parameter `base`: stacked pairs for those of its parts that are in `parts`."""

    base: ParameterSpec
    parts: tuple[Part, ...]
    a: ParameterSpec
    b: ParameterSpec

    @property
    def row_parallel(self) -> bool:
        """Whether the base is cut along its inputs."""
        return self.base.parts[0].dim == 1


def projections(model: ModelConfig) -> tuple[str, ...]:
    """The names of the projections in a layer that can be adapted, in network order."""
    return tuple(_leaf(part) for spec in _adaptable(model, ParallelLayout(), 0) for part in spec.parts)


def resolved_targets(model: ModelConfig, lora: LoraSpec) -> tuple[str, ...]:
    """The projections that `lora` adapts, in network order; ConfigError for a name that the model does not have."""
    known = projections(model)
    if lora.targets == "all" and model.moe is not None:
        raise ConfigError(
            f'targets = "all": the model has experts, to which there are no adapters; name some of {", ".join(known)}'
        )
    if lora.targets == "all":
        return known
    unknown = [name for name in lora.targets if name not in known]
    if unknown:
        raise ConfigError(
            "; ".join(f"targets: the model has no projection {name!r}{nearest(name, known)}" for name in unknown)
            + f" (it has {', '.join(known)})"
        )
    if not lora.targets:
        raise ConfigError(f"targets is empty, so nothing would be trained; name some of {', '.join(known)}")
    return tuple(name for name in known if name in lora.targets)


def layer_pairs(model: ModelConfig, lora: LoraSpec, layout: ParallelLayout, layer: int) -> Iterator[LoraPair]:
    """The adapters of one layer."""
    targets = resolved_targets(model, lora)
    for base in _adaptable(model, layout, layer):
        parts = tuple(part for part in base.parts if _leaf(part) in targets)
        if parts:
            path = f"{base.path.removesuffix('.weight')}.delta"
            a = ParameterSpec(f"{path}.lora_A", tuple(_a(p, lora.r) for p in parts), base.places, "matrix", "fan_in")
            b = ParameterSpec(f"{path}.lora_B", tuple(_b(p, lora.r) for p in parts), base.places, "matrix", "zeros")
            yield LoraPair(base, parts, a, b)


def adapter_specs(model: ModelConfig, lora: LoraSpec, layout: ParallelLayout) -> tuple[ParameterSpec, ...]:
    """Every run-time parameter that an adapter checkpoint holds: the pairs, and the sequence head if there is one."""
    pairs = (pair for layer in range(model.num_hidden_layers) for pair in layer_pairs(model, lora, layout, layer))
    return (*(spec for pair in pairs for spec in (pair.a, pair.b)), *judging_specs(model, layout))


def judging_specs(model: ModelConfig, layout: ParallelLayout) -> list[ParameterSpec]:
    """The sequence head and its pooler, which are trained whole beside an adapter; none without labels."""
    judging = ("pooler.", "score.")
    return [spec for spec in head_specs(model, layout) if model.num_labels and spec.path.startswith(judging)]


def adapter_tensors(model: ModelConfig, lora: LoraSpec, dtype: str) -> dict[str, LogicalTensor]:
    """Every logical tensor of an adapter checkpoint by name."""
    return {
        part.name: LogicalTensor(part.name, part.shape, dtype)
        for spec in adapter_specs(model, lora, ParallelLayout())
        for part in spec.parts
    }


def factor_names(weight: str) -> tuple[str, str]:
    """The names of A and B that adapt the logical tensor `weight`."""
    module = weight.removesuffix(".weight")
    return f"{module}.{A_SUFFIX}", f"{module}.{B_SUFFIX}"


def _adaptable(model: ModelConfig, layout: ParallelLayout, layer: int) -> list[ParameterSpec]:
    """The matrices of a layer; where layers have experts, those of attention alone."""
    fixed = {s.path for s in feed_forward_specs(model, layout, layer)} if model.moe is not None else set()
    return [s for s in layer_specs(model, layout, layer) if s.role == "matrix" and s.path not in fixed]


def _a(base: Part, r: int) -> Part:
    shape = (r, base.shape[1])
    if base.dim == 1:
        return Part(factor_names(base.name)[0], shape, dim=1, units=base.units)
    return Part(factor_names(base.name)[0], shape, partial_grad=base.partial_grad or base.dim is not None)


def _b(base: Part, r: int) -> Part:
    shape = (base.shape[0], r)
    if base.dim == 0:
        return Part(factor_names(base.name)[1], shape, dim=0, units=base.units, replicate=base.replicate)
    return Part(factor_names(base.name)[1], shape, partial_grad=base.partial_grad or base.dim is not None)


def _leaf(part: Part) -> str:
    return part.name.split(".")[-2]
