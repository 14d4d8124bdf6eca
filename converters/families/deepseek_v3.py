"""DeepSeek-V3: keys, values and queries from latents, experts chosen by group (transformers, models/deepseek_v3).

Files hold the rotary part of each query head, and of the one key that all heads share, in pairs (`rope_interleave`):
dimensions 0 and 1 turn together. It is the end of each head's rows in q_b_proj (or q_proj), and of all rows in
kv_a_proj_with_mqa. In logical tensors these rows are in halves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from converters.experts import Experts, stacked
from converters.families import _same_names as same_names
from converters.family import Family
from converters.fields import ACTIVATIONS, Field, FieldFault, Fixed, Foreign, OptionalField, Switch, TokenId
from converters.rope_fields import Rope
from converters.rules import Halve, Rule
from workbench.spec.model import ModelConfig

MSCALE: Final = "mscale_all_dim"
ROPE: Final = Rope()
DEFAULTS: Final = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rope_interleave": True,
}


SHARED, DENSE = "n_shared_experts", "first_k_dense_replace"
EXPERTS: Final = Experts(
    words={
        "num_experts": "n_routed_experts",
        "num_experts_per_tok": "num_experts_per_tok",
        "moe_intermediate_size": "moe_intermediate_size",
        "norm_topk_prob": "norm_topk_prob",
        "routed_scaling_factor": "routed_scaling_factor",
        "n_group": "n_group",
        "topk_group": "topk_group",
    },
    defaults={
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "n_group": 8,
        "topk_group": 4,
    },
    features={"scoring": "sigmoid", "e_score_correction_bias": True},
)


@dataclass(frozen=True)
class Latent:
    """The sizes of latent attention, from which that of a head follows, and rotary positions, by whose stretch scores
    may grow."""

    keys: tuple[str, ...] = (*DEFAULTS, *ROPE.keys)
    fields: tuple[str, ...] = ("latent", "head_dim", *ROPE.fields)

    def load(self, given: Foreign) -> dict[str, Any]:
        sizes = {key: given.get(key, default) for key, default in DEFAULTS.items()}
        table = given.get("rope_parameters") or given.get("rope_scaling") or {}
        return {**ROPE.load(given), "latent": {**sizes, MSCALE: table.get(MSCALE) or 0.0}}

    def dump(self, model: ModelConfig) -> dict[str, Any]:
        if model.latent is None:
            raise FieldFault("latent=None: this family has latent attention")
        sizes, said = model.latent.model_dump(), ROPE.dump(model)
        if growth := sizes.pop(MSCALE):
            for table in filter(None, (said["rope_parameters"], said["rope_scaling"])):
                table[MSCALE] = growth
        return {**sizes, **said}


@dataclass(frozen=True)
class SparseLayers:
    """The first layers have one MLP each, all others experts, some of which all tokens share: here one as wide."""

    keys: tuple[str, ...] = (*EXPERTS.keys, SHARED, DENSE)
    fields: tuple[str, ...] = ("moe",)

    def load(self, given: Foreign) -> dict[str, Any]:
        dense = given.get(DENSE, 3)
        if dense >= given.get("num_hidden_layers", 61):
            return {"moe": None}
        moe = EXPERTS.load(given)["moe"]
        shared = given.get(SHARED, 1) * moe["moe_intermediate_size"]
        return {"moe": {**moe, "mlp_only_layers": tuple(range(dense)), "shared_expert_intermediate_size": shared}}

    def dump(self, model: ModelConfig) -> dict[str, Any]:
        moe = model.moe
        if moe is None:
            return {DENSE: model.num_hidden_layers}
        dense, width = len(moe.mlp_only_layers), moe.shared_expert_intermediate_size
        if moe.mlp_only_layers != tuple(range(dense)):
            raise FieldFault(f"moe.mlp_only_layers={list(moe.mlp_only_layers)} are not the first layers")
        shared, rest = divmod(width, moe.moe_intermediate_size)
        if rest or not shared:
            raise FieldFault(
                f"moe.shared_expert_intermediate_size={width} is no multiple of "
                f"moe_intermediate_size={moe.moe_intermediate_size}"
            )
        routed = moe.model_copy(update={"mlp_only_layers": (), "shared_expert_intermediate_size": 0})
        return {**EXPERTS.dump(model.model_copy(update={"moe": routed})), SHARED: shared, DENSE: dense}


def rules(model: ModelConfig) -> tuple[Rule, ...]:
    """Where each logical tensor lies."""
    sizes, views = model.latent, dict[str, Halve]()
    if sizes is not None and sizes.rope_interleave:
        halve_q = Halve(0, sizes.qk_nope_head_dim, sizes.qk_head_dim)
        halve_k = Halve(0, sizes.kv_lora_rank, sizes.kv_lora_rank + sizes.qk_rope_head_dim)
        views = {"q_proj": halve_q, "q_b_proj": halve_q, "kv_a_proj_with_mqa": halve_k}
    return tuple(_placed(rule, views) for rule in same_names.rules(model))


def _placed(rule: Rule, views: Mapping[str, Halve]) -> Rule:
    foreign, module = rule.foreign.replace(".shared_expert.", ".shared_experts."), rule.logical.split(".")[-2]
    return Rule(rule.logical, foreign, (views[module],) if module in views else ())


FAMILY = Family(
    name="deepseek_v3",
    model_type="deepseek_v3",
    causal_lm="DeepseekV3ForCausalLM",
    sequence_classification="DeepseekV3ForSequenceClassification",
    prefix="model.",
    fields=(
        Field("vocab_size", default=129280),
        Field("hidden_size", default=7168),
        Field("intermediate_size", default=18432),
        Field("num_hidden_layers", default=61),
        Field("num_attention_heads", default=128),
        OptionalField("num_key_value_heads", lambda given: given.get("num_attention_heads", 128)),
        Latent(),
        SparseLayers(),
        Field("max_position_embeddings", default=4096),
        Field("hidden_act", default="silu", words=ACTIVATIONS),
        Field("rms_norm_eps", "norm_eps", default=1e-6),
        Field("tie_word_embeddings", default=False),
        Switch("attention_bias", ("attention_bias", "attention_output_bias"), default=False),
        Field("attention_dropout", default=0.0),
        Field("initializer_range", default=0.02),
        Fixed("moe_layer_freq", (1,)),
        Fixed("scoring_func", ("sigmoid",)),
        Fixed("topk_method", ("noaux_tc",)),
        TokenId("bos_token_id", default=0),
        TokenId("eos_token_id", default=1),
        TokenId("pad_token_id"),
    ),
    features={"gated_mlp": True, "norm": "rmsnorm", "position_embedding": "rope", "mlp_bias": False},
    training_only={"embed_dropout": 0.0, "hidden_dropout": 0.0, "scale_residual_init": False},
    harmless=(
        *("pretraining_tp", "num_nextn_predict_layers", "output_router_logits", "head_dim", "qk_head_dim"),
        *("aux_loss_alpha", "seq_aux", "ep_size"),
    ),
    rules=rules,
    also_read=stacked(rules),
    ignored=(same_names.INVERSE_FREQUENCIES,),
)
