"""Linear layers that are cut over the tensor axis. `Gemm` multiplies; only collectives are special.

Legend: B batch, T tokens, I inputs, O outputs (local where the dimension is cut).
"""

from __future__ import annotations

import torch
from torch import nn

from workbench.parallel.mesh import Mesh
from workbench.parallel.module import ParallelModule
from workbench.parallel.sequence import column_product, enter_cut, leave_cut
from workbench.spec.geometry import ParameterSpec


class ColumnParallelLinear(ParallelModule):
    """y = x W^T + b with the outputs cut over the tensor axis; several logical projections may be fused on dim 0.

    Forward communicates nothing; backward all-reduces the gradient of the input over tp. Under sequence parallelism the
    input is this rank's tokens: forward gathers them over tp, backward reduces and scatters.
    `entered` says that the input has been through `whole_input` already: then nothing is communicated.
    `delta`, when set, makes the product from the input, the weight's product and the weight (an adapter).
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    delta: nn.Module | None

    def __init__(
        self, mesh: Mesh, weight: ParameterSpec, bias: ParameterSpec | None = None, *, entered: bool = False
    ) -> None:
        super().__init__(mesh, weight=weight, bias=bias)
        self.delta = None
        self.entered = entered

    def forward(self, x_BTI: torch.Tensor) -> torch.Tensor:
        bias = self.bias if self.delta is None else None
        if self.entered:
            y_BTO = self.gemm(x_BTI, self.weight, bias)
        else:
            x_BTI = enter_cut(x_BTI, self.mesh)
            y_BTO = column_product(self.gemm, x_BTI, self.weight, bias, self.mesh)
        return y_BTO if self.delta is None else plus_bias(self.delta(x_BTI, y_BTO, self.weight), self.bias)

    @property
    def gathers(self) -> bool:
        """Whether the input is this rank's tokens and the output that of all."""
        return self.mesh.layout.sequence_parallel and not self.entered

    @property
    def output_sizes(self) -> tuple[int, ...]:
        """Local outputs of each fused projection, in order."""
        return tuple(part.local_shape(self.mesh.tp.size)[0] for part in self.specs["weight"].parts)


class RowParallelLinear(ParallelModule):
    """y = x W^T + b with the inputs cut over the tensor axis, the partial results all-reduced over tp.

    Under sequence parallelism they are reduced and scattered: the output is this rank's tokens; backward gathers.
    The bias is whole on every rank and added once, after the reduction. `delta` acts on the partial result, so an
    adapter costs no reduction of its own.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    delta: nn.Module | None

    def __init__(self, mesh: Mesh, weight: ParameterSpec, bias: ParameterSpec | None = None) -> None:
        super().__init__(mesh, weight=weight, bias=bias)
        self.delta = None

    def forward(self, x_BTI: torch.Tensor) -> torch.Tensor:
        if self.mesh.tp.size == 1 and self.delta is None:
            return self.gemm(x_BTI, self.weight, self.bias)
        y_BTO = self.gemm(x_BTI, self.weight)
        if self.delta is not None:
            y_BTO = self.delta(x_BTI, y_BTO, self.weight)
        return plus_bias(leave_cut(y_BTO, self.mesh), self.bias)


class DuplicatedLinear(ParallelModule):
    """y = x W^T + b of the tokens that this rank has, the weights whole on every rank. No communication. `delta` as in
    `ColumnParallelLinear`."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    delta: nn.Module | None

    def __init__(self, mesh: Mesh, weight: ParameterSpec, bias: ParameterSpec | None = None) -> None:
        super().__init__(mesh, weight=weight, bias=bias)
        self.delta = None

    def forward(self, x_BTI: torch.Tensor) -> torch.Tensor:
        if self.delta is None:
            return self.gemm(x_BTI, self.weight, self.bias)
        return plus_bias(self.delta(x_BTI, self.gemm(x_BTI, self.weight), self.weight), self.bias)

    @property
    def output_sizes(self) -> tuple[int, ...]:
        """Outputs of each fused projection, in order."""
        return tuple(part.shape[0] for part in self.specs["weight"].parts)


def plus_bias(y_BTO: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
    """y + b in the type of y; y itself without a bias."""
    return y_BTO if bias_O is None else y_BTO + bias_O.to(y_BTO.dtype)
