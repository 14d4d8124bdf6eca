"""Mixtures of experts: what the features are called and what they may be. No torch."""

from __future__ import annotations

from typing import Final, Literal, Self

from pydantic import Field, model_validator

from workbench.config import Config

MAX_EXPERTS: Final = 1 << 14
"""Experts of a layer; a configuration with more is damaged, or made to fill the memory."""


class MixtureOfExperts(Config):
    """MLPs of which each token takes a few, chosen by a router; with Hugging Face's names where it has them."""

    num_experts: int = Field(gt=1, le=MAX_EXPERTS, description="Experts of each layer that has them.")
    num_experts_per_tok: int = Field(gt=0, description="Experts that compute each token.")
    moe_intermediate_size: int = Field(gt=0, description="Width of an expert.")
    mlp_only_layers: tuple[int, ...] = Field(default=(), description="Layers that keep one MLP instead.")
    decoder_sparse_step: int = Field(
        default=1, gt=0, description="Only every this many layers has experts, counted from 1."
    )
    shared_expert_intermediate_size: int = Field(
        default=0, ge=0, description="Width of an MLP that computes every token besides; 0: none."
    )
    shared_expert_gate: bool = Field(
        default=False, description="Scale the shared expert's output by the sigmoid of a learned product."
    )
    scoring: Literal["softmax", "sigmoid"] = Field(
        default="softmax", description="Of the router's logits: over all experts, or of each by itself."
    )
    norm_topk_prob: bool = Field(default=True, description="Divide the scores of the chosen experts by their sum.")
    routed_scaling_factor: float = Field(default=1.0, gt=0, description="What the weights are multiplied by at last.")
    n_group: int = Field(default=1, gt=0, description="Groups of experts, the best of which are chosen first.")
    group_score: Literal["best_two", "best"] = Field(
        default="best_two", description="What a group is judged by: the sum of its best two scores, or its best."
    )
    topk_group: int = Field(default=1, gt=0, description="Groups that a token's experts may come from.")
    e_score_correction_bias: bool = Field(
        default=False, description="Add a bias to the scores by which experts are chosen, not to those that weigh them."
    )
    bias_update_rate: float = Field(
        default=0.0,
        ge=0,
        description="What a step adds to the bias of experts with too few tokens, and takes from that of the others "
        "(arXiv:2408.15664).",
    )
    router_aux_loss_coef: float = Field(
        default=0.0, ge=0, description="Weight of the loss that balances the experts' load (arXiv:2101.03961, eq. 4)."
    )
    router_z_loss_coef: float = Field(
        default=0.0, ge=0, description="Weight of the loss that keeps router logits small (arXiv:2202.08906, eq. 5)."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_experts % self.n_group:
            raise ValueError(f"num_experts={self.num_experts} cannot be dealt to n_group={self.n_group} groups")
        size = self.num_experts // self.n_group
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group={self.topk_group} is more than n_group={self.n_group}")
        if self.n_group > 1 and size < 2 and self.group_score == "best_two":
            raise ValueError(f"n_group={self.n_group} groups of one expert: a group is judged by its best two")
        if self.num_experts_per_tok > size * self.topk_group:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} is more than the {size * self.topk_group} experts "
                f"that a token can choose from"
            )
        if self.bias_update_rate and not self.e_score_correction_bias:
            raise ValueError(f"bias_update_rate={self.bias_update_rate:g} needs e_score_correction_bias = true")
        if self.shared_expert_gate and not self.shared_expert_intermediate_size:
            raise ValueError("shared_expert_gate=true without a shared expert; give shared_expert_intermediate_size")
        return self

    def has_experts(self, layer: int) -> bool:
        """Whether this layer has experts in place of its one MLP."""
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0

    def sparse_layers(self, num_layers: int) -> tuple[int, ...]:
        """The layers, of so many, that have experts."""
        return tuple(layer for layer in range(num_layers) if self.has_experts(layer))
