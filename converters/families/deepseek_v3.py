"""DeepSeek-V3: keys, values and queries from latents (transformers, models/deepseek_v3), layers without experts.

Files hold the rotary part of each query head, and of the one key that all heads share, in pairs (`rope_interleave`):
dimensions 0 and 1 turn together. It is the end of each head's rows in q_b_proj (or q_proj), and of all rows in
kv_a_proj_with_mqa. In logical tensors these rows are in halves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

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
class DenseLayers:
    """How many layers come before those with experts: all of them."""

    keys: tuple[str, ...] = ("first_k_dense_replace",)
    fields: tuple[str, ...] = ()

    def load(self, given: Foreign) -> dict[str, Any]:
        dense, layers = given.get("first_k_dense_replace", 3), given.get("num_hidden_layers", 61)
        if dense < layers:
            raise FieldFault(f"first_k_dense_replace={dense}: {layers - dense} of {layers} layers have experts")
        return {}

    def dump(self, model: ModelConfig) -> dict[str, Any]:
        return {"first_k_dense_replace": model.num_hidden_layers}


def rules(model: ModelConfig) -> tuple[Rule, ...]:
    """Where each logical tensor lies."""
    assert model.latent is not None
    sizes, views = model.latent, {}
    if sizes.rope_interleave:
        halve_q = Halve(0, sizes.qk_nope_head_dim, sizes.qk_head_dim)
        halve_k = Halve(0, sizes.kv_lora_rank, sizes.kv_lora_rank + sizes.qk_rope_head_dim)
        views = {"q_proj": halve_q, "q_b_proj": halve_q, "kv_a_proj_with_mqa": halve_k}
    return tuple(
        replace(rule, view=(views[module],)) if (module := rule.logical.split(".")[-2]) in views else rule
        for rule in same_names.rules(model)
    )


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
        DenseLayers(),
        Field("max_position_embeddings", default=4096),
        Field("hidden_act", default="silu", words=ACTIVATIONS),
        Field("rms_norm_eps", "norm_eps", default=1e-6),
        Field("tie_word_embeddings", default=False),
        Switch("attention_bias", ("attention_bias", "attention_output_bias"), default=False),
        Field("attention_dropout", default=0.0),
        Field("initializer_range", default=0.02),
        Fixed("moe_layer_freq", (1,)),
        TokenId("bos_token_id", default=0),
        TokenId("eos_token_id", default=1),
        TokenId("pad_token_id"),
    ),
    features={"gated_mlp": True, "norm": "rmsnorm", "position_embedding": "rope", "mlp_bias": False},
    training_only={"embed_dropout": 0.0, "hidden_dropout": 0.0, "scale_residual_init": False},
    harmless=(
        *("pretraining_tp", "num_nextn_predict_layers", "output_router_logits", "head_dim", "qk_head_dim"),
        # Of experts, which no layer has.
        *("moe_intermediate_size", "n_shared_experts", "n_routed_experts", "routed_scaling_factor", "norm_topk_prob"),
        *("n_group", "topk_group", "num_experts_per_tok", "scoring_func", "topk_method", "aux_loss_alpha", "seq_aux"),
        "ep_size",
    ),
    rules=rules,
    ignored=(same_names.INVERSE_FREQUENCIES,),
)
