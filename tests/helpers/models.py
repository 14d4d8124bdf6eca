"""Tiny models that hold every hazard of cutting: odd vocabulary, fewer KV heads than heads, tied heads, biases."""

from __future__ import annotations

from typing import Any

from workbench.spec.latent import LatentSizes
from workbench.spec.model import ModelConfig


def gated_model(**changes: Any) -> ModelConfig:
    """Rotary positions, RMSNorm, gated MLP, grouped KV heads; 101 words, which no tp > 1 divides."""
    features: dict[str, Any] = dict(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return ModelConfig(**{**features, **changes})


def sliding_model(**changes: Any) -> ModelConfig:
    """Sliding and full layers with rotations of their own, four norms a layer that scale by 1 + w, normed heads, capped
    scores and logits, a scale of scores and of embeddings."""
    num_layers = changes.get("num_hidden_layers", 4)
    kinds = ("sliding_attention", "full_attention", "sliding_attention", "sliding_attention")
    features: dict[str, Any] = dict(
        sliding_window=5,
        layer_types=(kinds * num_layers)[:num_layers],
        rope_theta=1000.0,
        rope_local_theta=10.0,
        qk_norm="head",
        norm_placement="sandwich",
        norm_unit_offset=True,
        scale_embeddings=True,
        query_pre_attn_scalar=5,
        attn_logit_softcapping=1.5,
        final_logit_softcapping=2.0,
        tie_word_embeddings=True,
    )
    return gated_model(**{**features, **changes})


def post_norm_model(**changes: Any) -> ModelConfig:
    """Norms of what leaves attention and MLP, queries and keys normed over their whole width, every layer sliding."""
    return gated_model(**{"norm_placement": "post", "qk_norm": "full", "sliding_window": 4, **changes})


def biased_model(**changes: Any) -> ModelConfig:
    """Learned positions, LayerNorm, plain GELU MLP, biases everywhere."""
    features: dict[str, Any] = dict(
        num_key_value_heads=4,
        intermediate_size=64,
        hidden_act="gelu_tanh",
        gated_mlp=False,
        norm="layernorm",
        position_embedding="learned",
        attention_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
    )
    return gated_model(**{**features, **changes})


def parallel_model(**changes: Any) -> ModelConfig:
    """Both branches of a layer read its input; half of each head turns with its position."""
    return biased_model(
        **{"position_embedding": "rope", "partial_rotary_factor": 0.5, "parallel_residual": True, **changes}
    )


def masked_model(**changes: Any) -> ModelConfig:
    """Tokens that see all others, segments, norms after the sums; a head with a transform, and one for pairs, unless
    there are labels."""
    has_words = not changes.get("num_labels")
    features: dict[str, Any] = dict(
        hidden_act="gelu",
        causal=False,
        norm_placement="post_residual",
        type_vocab_size=2,
        embed_norm=True,
        tie_word_embeddings=has_words,
        head_transform=has_words,
        lm_head_bias=has_words,
        pooler=True,
        next_sentence=has_words,
    )
    return biased_model(**{**features, **changes})


def answering_model(**changes: Any) -> ModelConfig:
    """An encoder of two layers and a decoder of two; biases by distance, no scaling of scores, a tied scaled head."""
    features: dict[str, Any] = dict(
        num_encoder_layers=2,
        num_key_value_heads=4,
        head_dim=6,
        hidden_act="gelu_tanh",
        position_embedding="relative",
        relative_attention_num_buckets=8,
        relative_attention_max_distance=6,
        query_pre_attn_scalar=1,
        tie_word_embeddings=True,
        logit_scale=32**-0.5,
    )
    return gated_model(**{**features, **changes})


def latent_model(q_lora_rank: int | None = 12, **changes: Any) -> ModelConfig:
    """Keys and values from a latent, queries too or not; values smaller than keys; biases on the way down."""
    latent = LatentSizes(q_lora_rank=q_lora_rank, kv_lora_rank=10, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6)
    features: dict[str, Any] = dict(
        num_key_value_heads=4, latent=latent, attention_bias=True, attention_output_bias=True
    )
    return gated_model(**{**features, **changes})


def sparse_model(**changes: Any) -> ModelConfig:
    """Experts in all layers but the first, of which each token takes two of four, with every loss of a router."""
    moe: dict[str, Any] = dict(
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        mlp_only_layers=(0,),
        router_aux_loss_coef=0.05,
        router_z_loss_coef=0.02,
    )
    return gated_model(**{"moe": {**moe, **changes.pop("moe", {})}, **changes})


def grouped_model(**changes: Any) -> ModelConfig:
    """Sigmoid scores, groups of experts, a correction bias that moves, a shared expert with a gate of its own."""
    moe: dict[str, Any] = dict(
        num_experts=8,
        num_experts_per_tok=3,
        mlp_only_layers=(),
        decoder_sparse_step=2,
        scoring="sigmoid",
        n_group=4,
        topk_group=2,
        e_score_correction_bias=True,
        bias_update_rate=0.01,
        routed_scaling_factor=1.7,
        shared_expert_intermediate_size=40,
        shared_expert_gate=True,
    )
    return sparse_model(**{"moe": {**moe, **changes.pop("moe", {})}, **changes})


def grouped_latent_model(**changes: Any) -> ModelConfig:
    """Keys and values from a latent, and experts in groups."""
    return latent_model(**{"moe": grouped_model().moe, **changes})
