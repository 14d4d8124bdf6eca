"""Who computes which token: the router of a layer with experts, its losses, and what it counts.

Legend: N tokens of this rank, k experts that a token takes, E experts, G groups of experts, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from workbench.models.batch import LocalBatch
from workbench.parallel.loss import accumulation_dtype
from workbench.parallel.mesh import Mesh
from workbench.parallel.module import ParallelModule
from workbench.spec.geometry import ParameterSpec
from workbench.spec.moe import MixtureOfExperts


@dataclass(frozen=True)
class Routing:
    """The experts of each token [N, k] and what their outputs are multiplied by [N, k], in fp32 or wider."""

    experts_Nk: torch.Tensor
    weights_Nk: torch.Tensor


@dataclass
class Tally:
    """What a router has seen since it was last read, of this rank's tokens: how many went to each expert [E], and the
    sums of its two losses over microbatches (balance, z), each weighted by the microbatch's labels."""

    tokens_E: torch.Tensor
    losses_2: torch.Tensor


class Router(ParallelModule):
    """Scores each token against every expert, in fp32 or wider, and picks the best.

    Its losses are those of a microbatch: means over its real tokens, whichever ranks have them. Forward adds up the
    load over the ranks that share the microbatch (cp, and tp under sequence parallelism), if there is a loss to balance
    it. No rank's gradient is summed there: each adds that of its own tokens.
    """

    weight: nn.Parameter
    e_score_correction_bias: nn.Parameter | None

    def __init__(
        self, moe: MixtureOfExperts, mesh: Mesh, weight: ParameterSpec, bias: ParameterSpec | None, *, num_layers: int
    ) -> None:
        """num_layers: how many layers have experts; the losses are means over them."""
        super().__init__(mesh, weight=weight, e_score_correction_bias=bias)
        if self.e_score_correction_bias is not None:
            self.e_score_correction_bias.requires_grad_(False)
        self.moe, self.num_layers = moe, num_layers
        self.tally: Tally | None = None

    def forward(self, x_BTD: torch.Tensor, batch: LocalBatch) -> Routing:
        x_ND = x_BTD.flatten(0, 1)
        wide = accumulation_dtype(x_ND.dtype)
        # The weight as every layer sees it: data parallelism may have cast it.
        logits_NE = F.linear(x_ND.to(wide), self.weight.to(x_ND.dtype).to(wide))
        scores_NE = logits_NE.softmax(dim=-1) if self.moe.scoring == "softmax" else logits_NE.sigmoid()
        experts_Nk = self._choose(scores_NE.detach())
        weights_Nk = scores_NE.gather(1, experts_Nk)
        if self.moe.norm_topk_prob:
            # A sum of sigmoids may underflow (transformers, models/deepseek_v3).
            tiny = 1e-20 if self.moe.scoring == "sigmoid" else 0.0
            weights_Nk = weights_Nk / (weights_Nk.sum(dim=-1, keepdim=True) + tiny)
        weights_Nk = weights_Nk * self.moe.routed_scaling_factor
        if batch.loss_scale is not None and torch.is_grad_enabled():
            weights_Nk = self._observe(weights_Nk, logits_NE, scores_NE, experts_Nk, batch)
        return Routing(experts_Nk, weights_Nk)

    def _choose(self, scores_NE: torch.Tensor) -> torch.Tensor:
        """The best experts of each token [N, k], in the best groups (arXiv:2412.19437, sec. 2.1.2, by the best two;
        arXiv:2405.04434, sec. 2.2.2, by the best)."""
        if self.e_score_correction_bias is not None:
            scores_NE = scores_NE + self.e_score_correction_bias.to(scores_NE.dtype)
        if self.moe.n_group > 1:
            scores_NGe = scores_NE.unflatten(1, (self.moe.n_group, -1))
            best_NG = scores_NGe.topk(2 if self.moe.group_score == "best_two" else 1, dim=-1).values.sum(dim=-1)
            chosen_Ng = best_NG.topk(self.moe.topk_group, dim=-1).indices
            out_NG = torch.ones_like(best_NG, dtype=torch.bool).scatter_(1, chosen_Ng, False)
            scores_NE = scores_NGe.masked_fill(out_NG.unsqueeze(-1), float("-inf")).flatten(1)
        return scores_NE.topk(self.moe.num_experts_per_tok, dim=-1).indices

    def _observe(
        self,
        weights_Nk: torch.Tensor,
        logits_NE: torch.Tensor,
        scores_NE: torch.Tensor,
        experts_Nk: torch.Tensor,
        batch: LocalBatch,
    ) -> torch.Tensor:
        """The weights, whose backward adds the gradient of the router's losses and counts its tokens."""
        moe, experts = self.moe, self.moe.num_experts
        real_N = (batch.hidden_tokens < batch.lengths.unsqueeze(-1)).flatten()
        tokens = batch.lengths.sum().clamp(min=1).to(scores_NE.dtype)
        slots_M = experts_Nk.flatten()
        weight_M = real_N.repeat_interleave(experts_Nk.shape[1]).to(scores_NE.dtype)
        tokens_E = scores_NE.new_zeros(experts).scatter_add_(0, slots_M, weight_M)
        losses_2 = scores_NE.new_zeros(2)
        if moe.router_aux_loss_coef:
            load_E = self.mesh.cp.all_reduce(tokens_E.clone())
            if self.mesh.layout.sequence_parallel:
                load_E = self.mesh.tp.all_reduce(load_E)
            shares_NE = scores_NE
            if moe.scoring == "sigmoid":
                shares_NE = scores_NE / scores_NE.sum(dim=-1, keepdim=True)
            balance = (shares_NE * real_N.unsqueeze(-1)).sum(dim=0) @ load_E * experts / tokens.square()
            losses_2 = torch.stack((balance, losses_2[1]))
        if moe.router_z_loss_coef:
            z = (logits_NE.logsumexp(dim=-1).square() * real_N).sum() / tokens
            losses_2 = torch.stack((losses_2[0], z))
        coefficients = losses_2.new_tensor((moe.router_aux_loss_coef, moe.router_z_loss_coef)) / self.num_layers
        return _Observed.apply(weights_Nk, losses_2, coefficients, tokens_E, batch, self)

    def count(self, tokens_E: torch.Tensor, losses_2: torch.Tensor) -> None:
        """Adds to the tally."""
        if self.tally is None:
            self.tally = Tally(torch.zeros_like(tokens_E, dtype=torch.float64), torch.zeros_like(losses_2))
        self.tally.tokens_E += tokens_E
        self.tally.losses_2 += losses_2


class _Observed(torch.autograd.Function):
    """Passes the weights through. Backward runs once for each microbatch, however often forward is computed again: it
    counts, and brings the gradient of the losses, which no other stage of the pipeline knows of."""

    @staticmethod
    def forward(
        ctx: Any,
        weights_Nk: torch.Tensor,
        losses_2: torch.Tensor,
        coefficients_2: torch.Tensor,
        tokens_E: torch.Tensor,
        batch: LocalBatch,
        router: Router,
    ) -> torch.Tensor:
        ctx.save_for_backward(losses_2, coefficients_2, tokens_E)
        ctx.batch, ctx.router = batch, router
        return weights_Nk.view_as(weights_Nk)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        losses_2, coefficients_2, tokens_E = ctx.saved_tensors
        batch = ctx.batch
        ctx.router.count(tokens_E, losses_2 * batch.num_labels)
        scale = batch.loss_scale.to(losses_2.dtype) * batch.num_labels
        return grad, coefficients_2 * scale, None, None, None, None
