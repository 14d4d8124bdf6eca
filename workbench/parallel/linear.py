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
    `delta`, when set, maps the input to something that is added to the output (an adapter).
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
        if self.entered:
            y_BTO = self.gemm(x_BTI, self.weight, self.bias)
        else:
            x_BTI = enter_cut(x_BTI, self.mesh)
            y_BTO = column_product(self.gemm, x_BTI, self.weight, self.bias, self.mesh)
        return y_BTO if self.delta is None else y_BTO + self.delta(x_BTI)

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
    The bias is whole on every rank and added once, after the reduction. `delta` is added to the partial result, so an
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
            y_BTO = y_BTO + self.delta(x_BTI)
        y_BTO = leave_cut(y_BTO, self.mesh)
        return y_BTO if self.bias is None else y_BTO + self.bias.to(y_BTO.dtype)


class DuplicatedLinear(ParallelModule):
    """y = x W^T + b of the tokens that this rank has, the weights whole on every rank. No communication.

    `delta` is added to the output.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    delta: nn.Module | None

    def __init__(self, mesh: Mesh, weight: ParameterSpec, bias: ParameterSpec | None = None) -> None:
        super().__init__(mesh, weight=weight, bias=bias)
        self.delta = None

    def forward(self, x_BTI: torch.Tensor) -> torch.Tensor:
        y_BTO = self.gemm(x_BTI, self.weight, self.bias)
        return y_BTO if self.delta is None else y_BTO + self.delta(x_BTI)

    @property
    def output_sizes(self) -> tuple[int, ...]:
        """Outputs of each fused projection, in order."""
        return tuple(part.shape[0] for part in self.specs["weight"].parts)
