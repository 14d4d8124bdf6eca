"""Qwen3-MoE: a Qwen3 with experts in some layers, or all (transformers, models/qwen3_moe)."""

from __future__ import annotations

from converters.experts import Experts, stacked
from converters.families._same_names import INVERSE_FREQUENCIES, PREFIX, derived_head_dim, rules
from converters.family import Family
from converters.fields import ACTIVATIONS, Field, OptionalField, Switch, TokenId
from converters.rope_fields import Rope
from converters.sliding import AllSlide

FAMILY = Family(
    name="qwen3_moe",
    model_type="qwen3_moe",
    causal_lm="Qwen3MoeForCausalLM",
    sequence_classification="Qwen3MoeForSequenceClassification",
    token_classification="Qwen3MoeForTokenClassification",
    body="Qwen3MoeModel",
    prefix=PREFIX,
    fields=(
        Field("vocab_size", default=151936),
        Field("hidden_size", default=2048),
        Field("intermediate_size", default=6144),
        Field("num_hidden_layers", default=24),
        Field("num_attention_heads", default=32),
        Field("num_key_value_heads", default=4),
        OptionalField("head_dim", derived_head_dim),
        Field("max_position_embeddings", default=32768),
        Field("hidden_act", default="silu", words=ACTIVATIONS),
        Field("rms_norm_eps", "norm_eps", default=1e-6),
        Field("tie_word_embeddings", default=False),
        Switch("attention_bias", ("attention_bias", "attention_output_bias"), default=False),
        AllSlide(),
        Experts(
            words={
                "num_experts": "num_experts",
                "num_experts_per_tok": "num_experts_per_tok",
                "moe_intermediate_size": "moe_intermediate_size",
                "norm_topk_prob": "norm_topk_prob",
                "router_aux_loss_coef": "router_aux_loss_coef",
                "decoder_sparse_step": "decoder_sparse_step",
                "mlp_only_layers": "mlp_only_layers",
            },
            defaults={
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "moe_intermediate_size": 768,
                "norm_topk_prob": False,
                "router_aux_loss_coef": 0.001,
                "decoder_sparse_step": 1,
                "mlp_only_layers": (),
            },
            aliases={"num_local_experts": "num_experts"},
        ),
        Field("attention_dropout", default=0.0),
        Field("initializer_range", default=0.02),
        Rope(),
        TokenId("bos_token_id"),
        TokenId("eos_token_id"),
        TokenId("pad_token_id"),
    ),
    features={"gated_mlp": True, "norm": "rmsnorm", "position_embedding": "rope", "qk_norm": "head"},
    training_only={"embed_dropout": 0.0, "hidden_dropout": 0.0, "scale_residual_init": False},
    harmless=("max_window_layers", "use_mrope"),
    rules=rules,
    also_read=stacked(rules),
    ignored=(INVERSE_FREQUENCIES,),
)
