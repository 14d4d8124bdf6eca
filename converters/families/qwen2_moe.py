"""Qwen2-MoE: a Qwen2 with experts, one of which all tokens share behind a gate (transformers, models/qwen2_moe)."""

from __future__ import annotations

from converters.experts import Experts, stacked
from converters.families._same_names import INVERSE_FREQUENCIES, PREFIX, derived_head_dim, rules
from converters.family import Family
from converters.fields import ACTIVATIONS, Field, OptionalField, TokenId
from converters.rope_fields import Rope
from converters.sliding import SlidingLayers

FAMILY = Family(
    name="qwen2_moe",
    model_type="qwen2_moe",
    causal_lm="Qwen2MoeForCausalLM",
    sequence_classification="Qwen2MoeForSequenceClassification",
    token_classification="Qwen2MoeForTokenClassification",
    body="Qwen2MoeModel",
    prefix=PREFIX,
    fields=(
        Field("vocab_size", default=151936),
        Field("hidden_size", default=2048),
        Field("intermediate_size", default=5632),
        Field("num_hidden_layers", default=24),
        Field("num_attention_heads", default=16),
        OptionalField("num_key_value_heads", lambda given: given.get("num_attention_heads", 16)),
        OptionalField(
            "head_dim", lambda given: derived_head_dim({"hidden_size": 2048, "num_attention_heads": 16, **given})
        ),
        Field("max_position_embeddings", default=32768),
        Field("hidden_act", default="silu", words=ACTIVATIONS),
        Field("rms_norm_eps", "norm_eps", default=1e-6),
        Field("tie_word_embeddings", default=False),
        Field("qkv_bias", "attention_bias", default=True),
        SlidingLayers(
            24,
            lambda given, layer: layer % 2 == 0 and layer < given.get("max_window_layers", 28),
            older=("max_window_layers",),
            switched=True,
        ),
        Experts(
            words={
                "num_experts": "num_experts",
                "num_experts_per_tok": "num_experts_per_tok",
                "moe_intermediate_size": "moe_intermediate_size",
                "shared_expert_intermediate_size": "shared_expert_intermediate_size",
                "norm_topk_prob": "norm_topk_prob",
                "router_aux_loss_coef": "router_aux_loss_coef",
                "decoder_sparse_step": "decoder_sparse_step",
                "mlp_only_layers": "mlp_only_layers",
            },
            defaults={
                "num_experts": 60,
                "num_experts_per_tok": 4,
                "moe_intermediate_size": 1408,
                "shared_expert_intermediate_size": 5632,
                "norm_topk_prob": False,
                "router_aux_loss_coef": 0.001,
                "decoder_sparse_step": 1,
                "mlp_only_layers": (),
            },
            features={"shared_expert_gate": True},
        ),
        Field("attention_dropout", default=0.0),
        Field("initializer_range", default=0.02),
        Rope(),
        TokenId("bos_token_id"),
        TokenId("eos_token_id"),
        TokenId("pad_token_id"),
    ),
    features={"gated_mlp": True, "norm": "rmsnorm", "position_embedding": "rope", "attention_output_bias": False},
    training_only={"embed_dropout": 0.0, "hidden_dropout": 0.0, "scale_residual_init": False},
    harmless=("use_mrope",),
    rules=rules,
    also_read=stacked(rules),
    ignored=(INVERSE_FREQUENCIES,),
)
