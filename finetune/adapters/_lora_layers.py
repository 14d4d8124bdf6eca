"""The low-rank updates of parallel linear layers, attached beside the weights that they adapt.

Legend: B batch, T tokens, I inputs (local for row-parallel layers), O outputs (local for column-parallel layers),
R ranks of all fused pairs together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from workbench.models.decoder import DecoderStage
from workbench.parallel.collectives import gather_from
from workbench.parallel.linear import ColumnParallelLinear
from workbench.parallel.mesh import Mesh
from workbench.parallel.module import ParallelModule
from workbench.spec.lora import LoraPair, LoraSpec, layer_pairs


class LoraDelta(ParallelModule):
    """s (x A^T) B^T for each adapted projection of a layer, in its slice of the fused output; zero elsewhere.

    Of a column-parallel layer the input is whole and B is cut, of a row-parallel one A is cut and the result is a
    partial sum that the layer reduces together with its own: nothing to communicate. `gathers`: the input is this
    rank's tokens and the output that of all (a column-parallel layer under sequence parallelism); x A^T is gathered.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(self, mesh: Mesh, pair: LoraPair, scaling: float, *, gathers: bool) -> None:
        super().__init__(mesh, lora_A=pair.a, lora_B=pair.b)
        tp = mesh.tp.size
        self.scaling = scaling
        self.gathers = gathers
        self.rows_A = [part.local_shape(tp)[0] for part in pair.a.parts]
        self.rows_B = [part.local_shape(tp)[0] for part in pair.b.parts]
        adapted = {part.name for part in pair.parts}
        self.outputs = [(part.local_shape(tp)[0], part.name in adapted) for part in pair.base.parts]

    def forward(self, x_BTI: torch.Tensor) -> torch.Tensor:
        low_BTR = F.linear(x_BTI, self.lora_A.to(x_BTI.dtype)) * self.scaling
        if self.gathers:
            low_BTR = gather_from(low_BTR, self.mesh.tp)
        up_OR = self.lora_B.to(x_BTI.dtype)
        if len(self.outputs) == 1:
            return F.linear(low_BTR, up_OR)
        pairs = zip(low_BTR.split(self.rows_A, dim=-1), up_OR.split(self.rows_B, dim=0), strict=True)
        slices = [
            F.linear(*next(pairs)) if adapted else x_BTI.new_zeros((*low_BTR.shape[:-1], size))
            for size, adapted in self.outputs
        ]
        return torch.cat(slices, dim=-1)


@contextmanager
def switched_off(stage: DecoderStage) -> Iterator[None]:
    """Inside it the stage computes what it would without adapters."""
    adapted = {layer: layer.delta for layer in stage.modules() if isinstance(getattr(layer, "delta", None), LoraDelta)}
    for layer in adapted:
        layer.delta = None
    try:
        yield
    finally:
        for layer, delta in adapted.items():
            layer.delta = delta


def attach(stage: DecoderStage, lora: LoraSpec) -> None:
    """Freezes the stage but for a sequence head, and gives its projections adapters that are still without values."""
    stage.requires_grad_(False)
    for layer in stage.layers:
        for pair in layer_pairs(stage.model, lora, stage.mesh.layout, int(layer)):
            linear = stage.get_submodule(pair.base.path.removesuffix(".weight"))
            gathers = isinstance(linear, ColumnParallelLinear) and linear.gathers
            linear.delta = LoraDelta(stage.mesh, pair, lora.scaling, gathers=gathers)
    if stage.has_head and stage.model.num_labels:
        stage.score.requires_grad_(True)
