"""Megatron's arguments for experts and their router. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from converters.fields import FieldFault, Foreign
from workbench.spec.model import ModelConfig
from workbench.spec.moe import MixtureOfExperts


@dataclass(frozen=True)
class Experts:
    """`ModelConfig.moe`: TransformerConfig's moe_* and `topk_routing_with_score_function` (moe_utils.py)."""

    keys: tuple[str, ...] = (
        "num_experts",
        "moe_layer_freq",
        "moe_ffn_hidden_size",
        "moe_shared_expert_intermediate_size",
        "moe_shared_expert_gate",
        "moe_router_topk",
        "moe_router_pre_softmax",
        "moe_router_score_function",
        "moe_router_num_groups",
        "moe_router_group_topk",
        "moe_router_topk_scaling_factor",
        "moe_router_enable_expert_bias",
        "moe_router_bias_update_rate",
        "moe_router_load_balancing_type",
        "moe_aux_loss_coeff",
        "moe_z_loss_coeff",
    )
    fields: tuple[str, ...] = ("moe",)

    def load(self, given: Foreign) -> dict[str, Any]:
        if not given.get("num_experts"):
            return {"moe": None}
        layers = given["num_layers"]
        sparse = _pattern(given.get("moe_layer_freq", 1), layers)
        top, score = given.get("moe_router_topk", 2), given.get("moe_router_score_function", "softmax")
        biased = bool(given.get("moe_router_enable_expert_bias"))
        said = {
            "num_experts": given["num_experts"],
            "num_experts_per_tok": top,
            "moe_intermediate_size": given.get("moe_ffn_hidden_size") or given["ffn_hidden_size"],
            "mlp_only_layers": tuple(layer for layer in range(layers) if not sparse[layer]),
            "shared_expert_intermediate_size": given.get("moe_shared_expert_intermediate_size") or 0,
            "shared_expert_gate": bool(given.get("moe_shared_expert_gate")),
            "scoring": score,
            "norm_topk_prob": top > 1 if score == "sigmoid" else not given.get("moe_router_pre_softmax"),
            "routed_scaling_factor": given.get("moe_router_topk_scaling_factor") or 1.0,
            "n_group": given.get("moe_router_num_groups") or 1,
            "topk_group": given.get("moe_router_group_topk") or given.get("moe_router_num_groups") or 1,
            "e_score_correction_bias": biased,
            "bias_update_rate": given.get("moe_router_bias_update_rate", 1e-3) if biased else 0.0,
            "router_aux_loss_coef": _balance(given),
            "router_z_loss_coef": given.get("moe_z_loss_coeff") or 0.0,
        }
        if faults := _faults(MixtureOfExperts.model_validate(said)):
            raise FieldFault("; ".join(faults))
        return {"moe": said}

    def dump(self, model: ModelConfig) -> dict[str, Any]:
        moe = model.moe
        if moe is None:
            return {"num_experts": None}
        if faults := _faults(moe):
            raise FieldFault("; ".join(faults))
        sparse = [int(model.has_experts(layer)) for layer in range(model.num_hidden_layers)]
        grouped = moe.topk_group < moe.n_group
        return {
            "num_experts": moe.num_experts,
            "moe_layer_freq": 1 if all(sparse) else sparse,
            "moe_ffn_hidden_size": moe.moe_intermediate_size,
            "moe_shared_expert_intermediate_size": moe.shared_expert_intermediate_size or None,
            "moe_shared_expert_gate": moe.shared_expert_gate,
            "moe_router_topk": moe.num_experts_per_tok,
            "moe_router_pre_softmax": moe.scoring == "softmax" and not moe.norm_topk_prob,
            "moe_router_score_function": moe.scoring,
            "moe_router_num_groups": moe.n_group if grouped else None,
            "moe_router_group_topk": moe.topk_group if grouped else None,
            "moe_router_topk_scaling_factor": None if moe.routed_scaling_factor == 1 else moe.routed_scaling_factor,
            "moe_router_enable_expert_bias": moe.e_score_correction_bias,
            "moe_router_bias_update_rate": moe.bias_update_rate,
            "moe_router_load_balancing_type": "aux_loss" if moe.router_aux_loss_coef else "none",
            "moe_aux_loss_coeff": moe.router_aux_loss_coef,
            "moe_z_loss_coeff": moe.router_z_loss_coef or None,
        }


def _pattern(frequency: Any, layers: int) -> list[bool]:
    """For each layer whether it has experts; a number n says that the first of every n layers has."""
    if isinstance(frequency, int):
        return [layer % frequency == 0 for layer in range(layers)]
    if not isinstance(frequency, (list, tuple)) or len(frequency) != layers:
        raise FieldFault(f"moe_layer_freq={frequency!r} does not say it for each of num_layers={layers}")
    return [bool(one) for one in frequency]


def _balance(given: Foreign) -> float:
    """The weight of the auxiliary loss. Other losses than `aux_loss`, which only training reads, become none."""
    kind, weight = given.get("moe_router_load_balancing_type", "aux_loss"), given.get("moe_aux_loss_coeff", 0.0)
    kinds = list(kind) if isinstance(kind, (list, tuple)) else [kind]
    weights = list(weight) if isinstance(weight, (list, tuple)) else [weight] * len(kinds)
    if "sinkhorn" in kinds:
        raise FieldFault("moe_router_load_balancing_type='sinkhorn' has no place here: it chooses other experts")
    return float(dict(zip(kinds, weights, strict=True)).get("aux_loss", 0.0))


def _faults(moe: MixtureOfExperts) -> list[str]:
    """Why Megatron's router does not choose and weigh experts like this one."""
    found = []
    top, each = moe.num_experts_per_tok, moe.num_experts_per_tok // moe.topk_group
    if moe.scoring == "sigmoid" and moe.norm_topk_prob != (top > 1):
        found.append(
            f"norm_topk_prob={moe.norm_topk_prob} with sigmoid scores of {top} experts a token: Megatron divides by "
            "their sum if there are several"
        )
    if moe.scoring == "softmax" and top == 1 and moe.norm_topk_prob:
        found.append(
            "norm_topk_prob=True with one expert a token: Megatron refuses moe_router_topk=1 without pre-softmax"
        )
    if moe.scoring == "softmax" and moe.e_score_correction_bias:
        found.append("e_score_correction_bias=True with softmax scores: Megatron adds it to sigmoid scores alone")
    if moe.topk_group < moe.n_group:
        if each != 2:
            found.append(
                f"groups are judged by their best 2 experts, by Megatron by {top} // {moe.topk_group} = {each}"
            )
        if moe.scoring == "softmax" and moe.norm_topk_prob:
            found.append("groups are judged by scores, by Megatron by logits unless moe_router_pre_softmax=True")
    return found
