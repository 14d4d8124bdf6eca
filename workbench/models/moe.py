"""A mixture of experts: each token goes to the few that its router picks, wherever they are, and none is dropped.

Experts are dealt over the expert axis; tokens travel there and their results back. Each expert's width is cut over the
tensor axis as in an MLP, or the tensor ranks bring tokens of their own to whole experts.

Legend: B batch, T tokens, t those of them that this rank routes, N tokens in a row, k experts that a token takes,
M = N k tokens once for each of its experts, R those of them that arrive here, D hidden, F ffn (local), E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from workbench.models.batch import LocalBatch
from workbench.models.mlp import MLP
from workbench.models.recompute import recomputed
from workbench.models.router import Router
from workbench.parallel.collectives import exchange_rows
from workbench.parallel.embedding import ReplicatedLinear
from workbench.parallel.mesh import Mesh
from workbench.parallel.module import ParallelModule
from workbench.parallel.sequence import leave_cut, whole_input
from workbench.registry import load
from workbench.spec.geometry import ParameterSpec
from workbench.spec.model import ModelConfig


class Experts(ParallelModule):
    """The experts that this rank holds, as one weight of inputs and one of outputs. Communicates nothing.

    What a delta makes of the rows, when it is set, is added to the product (an adapter).
    """

    up_proj: nn.Parameter
    down_proj: nn.Parameter
    up_proj_delta: nn.Module | None
    down_proj_delta: nn.Module | None

    def __init__(self, model: ModelConfig, mesh: Mesh, up: ParameterSpec, down: ParameterSpec) -> None:
        super().__init__(mesh, up_proj=up, down_proj=down)
        self.activation = load("workbench.models.activations", model.hidden_act, "ACTIVATION")
        self.gated = model.gated_mlp
        self.recompute = False
        self.up_proj_delta = self.down_proj_delta = None

    def forward(self, x_RD: torch.Tensor, sizes_E: torch.Tensor) -> torch.Tensor:
        """[R, D], of which each tensor rank has part, for rows in order of their experts, `sizes_E` for each."""
        projected = self._product(x_RD, self.up_proj, sizes_E, self.up_proj_delta)
        inner_RF = recomputed(self.recompute, self._activate, projected)
        return self._product(inner_RF, self.down_proj, sizes_E, self.down_proj_delta)

    def _product(
        self, x: torch.Tensor, weight: nn.Parameter, sizes_E: torch.Tensor, delta: nn.Module | None
    ) -> torch.Tensor:
        y = self.gemm.grouped(x, weight, sizes_E)
        return y if delta is None else y + delta(x, sizes_E)

    def _activate(self, projected: torch.Tensor) -> torch.Tensor:
        """[R, F] from the first product."""
        if not self.gated:
            return self.activation(projected)
        gate_RF, up_RF = projected.chunk(2, dim=-1)
        return self.activation(gate_RF) * up_RF


class SparseMLP(nn.Module):
    """The sum of the chosen experts' outputs, weighted by the router, and of the shared expert's if there is one."""

    def __init__(self, model: ModelConfig, mesh: Mesh, specs: dict[str, ParameterSpec], layer: int) -> None:
        super().__init__()
        moe, path = model.moe, f"layers.{layer}.mlp"
        assert moe is not None
        self.mesh, self.num_experts = mesh, moe.num_experts
        self.gate = Router(
            moe,
            mesh,
            specs[f"{path}.gate.weight"],
            specs.get(f"{path}.gate.e_score_correction_bias"),
            num_layers=len(moe.sparse_layers(model.num_hidden_layers)),
        )
        self.experts = Experts(model, mesh, specs[f"{path}.experts.up_proj"], specs[f"{path}.experts.down_proj"])
        self.cuts_experts = mesh.layout.expert_tp > 1
        if moe.shared_expert_intermediate_size:
            self.shared_expert = MLP(model, mesh, specs, f"{path}.shared_expert")
        self.has_shared = bool(moe.shared_expert_intermediate_size)
        if moe.shared_expert_gate:
            self.shared_expert_gate = ReplicatedLinear(mesh, specs[f"{path}.shared_expert_gate.weight"])
        self.gates_shared = moe.shared_expert_gate

    def forward(self, x_BtD: torch.Tensor, batch: LocalBatch) -> torch.Tensor:
        routing = self.gate(x_BtD, batch)
        experts_Btk, weights_Btk = (
            part.unflatten(0, x_BtD.shape[:2]) for part in (routing.experts_Nk, routing.weights_Nk)
        )
        if self.cuts_experts:
            x_BTD, weights_BTk = whole_input(x_BtD, self.mesh), whole_input(weights_Btk, self.mesh)
            is_shared = self.mesh.layout.sequence_parallel
            experts_BTk = self.mesh.tp.all_gather(experts_Btk, dim=1) if is_shared else experts_Btk
            y_BtD = leave_cut(self._compute(x_BTD, experts_BTk, weights_BTk), self.mesh)
        else:
            y_BtD = self._compute(x_BtD, experts_Btk, weights_Btk)
        if not self.has_shared:
            return y_BtD
        shared_BtD = self.shared_expert(x_BtD, batch)
        if self.gates_shared:
            shared_BtD = shared_BtD * self.shared_expert_gate(x_BtD).sigmoid()
        return y_BtD + shared_BtD

    def _compute(self, x_BTD: torch.Tensor, experts_BTk: torch.Tensor, weights_BTk: torch.Tensor) -> torch.Tensor:
        """[B, T, D]: tokens go to their experts' ranks in order of expert, and their results come back."""
        chosen, axis = experts_BTk.shape[-1], self.mesh.ep
        slots_M = experts_BTk.flatten()
        order_M = slots_M.argsort(stable=True)
        back_M = _inverse(order_M)
        counts_E = torch.bincount(slots_M, minlength=self.num_experts)
        rows = _Rows.apply(x_BTD.flatten(0, 1), order_M // chosen, back_M, chosen)
        if axis.size == 1:
            y_MD = self.experts(rows, counts_E)
        else:
            y_MD = self._compute_elsewhere(rows, counts_E)
        y_NkD = _Rows.apply(y_MD, back_M, order_M, 1).unflatten(0, (-1, chosen))
        weighted_NkD = y_NkD * weights_BTk.flatten(0, 1).unsqueeze(-1)
        return weighted_NkD.sum(dim=1).to(x_BTD.dtype).view(x_BTD.shape)

    def _compute_elsewhere(self, rows_MD: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
        """Rows in order of expert through the experts of all ranks of the expert axis, back in the same order."""
        axis = self.mesh.ep
        to_each = counts_E.view(axis.size, -1)
        # [rank that sends, expert that is here]: in this order rows arrive.
        arriving = torch.stack(tuple(axis.exchange(to_each.unbind(), [to_each.shape[1]] * axis.size)))
        sent, received = torch.stack((to_each.sum(dim=1), arriving.sum(dim=1))).tolist()
        rows_RD = exchange_rows(rows_MD, axis, sent, received)
        here = arriving.shape[1]
        expert_R = torch.arange(here, device=rows_MD.device).repeat(axis.size).repeat_interleave(arriving.flatten())
        order_R = expert_R.argsort(stable=True)
        back_R = _inverse(order_R)
        y_RD = self.experts(_Rows.apply(rows_RD, order_R, back_R, 1), arriving.sum(dim=0))
        return exchange_rows(_Rows.apply(y_RD, back_R, order_R, 1), axis, received, sent)


class _Rows(torch.autograd.Function):
    """x[rows], where each row of x is taken `times` times. Backward gathers as well, by `back`: the place in the result
    of each row's first taking, second ..., so it adds in the same order on every run."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rows: torch.Tensor, back: torch.Tensor, times: int) -> torch.Tensor:
        ctx.save_for_backward(back)
        ctx.times = times
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (back,) = ctx.saved_tensors
        grad = grad.index_select(0, back)
        return grad if ctx.times == 1 else grad.unflatten(0, (-1, ctx.times)).sum(dim=1), None, None, None


def _inverse(order: torch.Tensor) -> torch.Tensor:
    """The permutation that undoes `order`."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
