"""The vocabulary cut over the tensor axis: embedding, and the head that shares its geometry.

Legend: B batch, T tokens, D hidden, V vocabulary (local, padded).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from workbench.parallel.linear import plus_bias
from workbench.parallel.mesh import Mesh
from workbench.parallel.module import ParallelModule
from workbench.parallel.sequence import column_product, enter_cut, leave_cut
from workbench.spec.geometry import ParameterSpec


class VocabParallelEmbedding(ParallelModule):
    """Token vectors, each rank holding a range of the vocabulary. Forward all-reduces over tp, backward does not.

    Under sequence parallelism forward reduces and scatters, so that each rank has its tokens; backward gathers.
    `delta`, when set, maps ids in this rank's range to what is added to their vectors (an adapter).
    """

    weight: nn.Parameter
    delta: nn.Module | None

    def __init__(self, mesh: Mesh, weight: ParameterSpec) -> None:
        super().__init__(mesh, weight=weight)
        self.delta = None
        rows = weight.local_shape(mesh.tp.size)[0]
        self.first_row = rows * mesh.tp.rank
        self.rows = rows

    def forward(self, ids_BT: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if self.mesh.tp.size == 1:
            return self._vectors(ids_BT, dtype)
        local_BT = ids_BT - self.first_row
        foreign_BT = (local_BT < 0) | (local_BT >= self.rows)
        x_BTD = self._vectors(local_BT.masked_fill(foreign_BT, 0), dtype)
        return leave_cut(x_BTD.masked_fill(foreign_BT.unsqueeze(-1), 0.0), self.mesh)

    def _vectors(self, rows_BT: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        x_BTD = F.embedding(rows_BT, self.weight).to(dtype)
        return x_BTD if self.delta is None else x_BTD + self.delta(rows_BT, dtype)


class ReplicatedEmbedding(ParallelModule):
    """A table that every rank holds whole, such as learned positions. No communication."""

    weight: nn.Parameter

    def __init__(self, mesh: Mesh, weight: ParameterSpec) -> None:
        super().__init__(mesh, weight=weight)

    def forward(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return F.embedding(ids, self.weight).to(dtype)


class VocabParallelHead(ParallelModule):
    """Logits of all tokens over this rank's range of the vocabulary, cut like a ColumnParallelLinear.

    A head that is tied to an embedding has no weight of its own and is given that table. `delta` as in
    `ColumnParallelLinear`.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    delta: nn.Module | None

    def __init__(self, mesh: Mesh, weight: ParameterSpec | None, bias: ParameterSpec | None = None) -> None:
        super().__init__(mesh, weight=weight, bias=bias)
        self.delta = None

    def forward(self, x_BTD: torch.Tensor, weight: nn.Parameter) -> torch.Tensor:
        x_BTD, bias = enter_cut(x_BTD, self.mesh), self.bias if self.delta is None else None
        y_BTV = column_product(self.gemm, x_BTD, weight, bias, self.mesh)
        return y_BTV if self.delta is None else plus_bias(self.delta(x_BTD, y_BTV, weight), self.bias)


class ReplicatedLinear(ParallelModule):
    """A linear layer that every rank holds whole and applies to the same input, such as a classification head."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, mesh: Mesh, weight: ParameterSpec, bias: ParameterSpec | None = None) -> None:
        super().__init__(mesh, weight=weight, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gemm(x, self.weight, self.bias)
