"""Tiny models that hold every hazard of cutting: odd vocabulary, fewer KV heads than heads, tied heads, biases."""

from __future__ import annotations

from typing import Any

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


def masked_model(**changes: Any) -> ModelConfig:
    """Tokens that see all others, segments, norms after the sums; a head with a transform, and one for pairs."""
    features: dict[str, Any] = dict(
        hidden_act="gelu",
        causal=False,
        norm_placement="post_residual",
        type_vocab_size=2,
        embed_norm=True,
        tie_word_embeddings=True,
        head_transform=True,
        lm_head_bias=True,
        pooler=True,
        next_sentence=True,
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
        attention_scale=1.0,
        tie_word_embeddings=True,
        logit_scale=32**-0.5,
    )
    return gated_model(**{**features, **changes})
