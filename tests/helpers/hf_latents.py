"""Tiny transformers models with latent attention: queries from a latent or not, layers with experts or not."""

from __future__ import annotations

from typing import Any

from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV3ForSequenceClassification,
    PreTrainedModel,
)

from tests.helpers.hf_sizes import LLAMA

LINEAR_ROPE: dict[str, Any] = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}
DEEPSEEK: dict[str, Any] = {
    **LLAMA,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "first_k_dense_replace": 4,
}
DEEPSEEK_EXPERTS: dict[str, Any] = {
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_group": 4,
    "topk_group": 2,
}
DEEPSEEK_ROPE: dict[str, Any] = {
    **{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16},
    **{"mscale": 1.0, "mscale_all_dim": 0.7, "beta_fast": 32, "beta_slow": 1},
}

LATENT_CASES: dict[str, tuple[type[PreTrainedModel], type, dict[str, Any]]] = {
    "deepseek_v3, latents for all, biased, yarn": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config,
        {**DEEPSEEK, "attention_bias": True, "rms_norm_eps": 1e-3, "rope_parameters": DEEPSEEK_ROPE},
    ),
    "deepseek_v3, no query latent, tied, linear rope": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config,
        {**DEEPSEEK, "q_lora_rank": None, "tie_word_embeddings": True, "rope_parameters": LINEAR_ROPE},
    ),
    "deepseek_v3, wide values, halves": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config,
        {**DEEPSEEK, "v_head_dim": 14, "qk_rope_head_dim": 6, "rope_interleave": False, "vocab_size": 97},
    ),
    "deepseek_v3, experts": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config,
        {**DEEPSEEK, **DEEPSEEK_EXPERTS},
    ),
    "deepseek_v3, experts in all layers, two shared, tied": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config,
        {
            **DEEPSEEK,
            **DEEPSEEK_EXPERTS,
            **{"first_k_dense_replace": 0, "n_shared_experts": 2, "norm_topk_prob": False, "tie_word_embeddings": True},
            **{"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
        },
    ),
    "deepseek_v2, groups, yarn, biased": (
        DeepseekV2ForCausalLM,
        DeepseekV2Config,
        {
            **DEEPSEEK,
            **DEEPSEEK_EXPERTS,
            **{"topk_method": "group_limited_greedy", "routed_scaling_factor": 2.5, "n_shared_experts": 2},
            **{"attention_bias": True, "rope_parameters": DEEPSEEK_ROPE},
        },
    ),
    "deepseek_v2, no query latent, experts in all layers, tied": (
        DeepseekV2ForCausalLM,
        DeepseekV2Config,
        {
            **DEEPSEEK,
            **DEEPSEEK_EXPERTS,
            **{"q_lora_rank": None, "first_k_dense_replace": 0, "n_group": None, "topk_group": None},
            **{"tie_word_embeddings": True, "vocab_size": 97},
        },
    ),
    "deepseek_v3 classifier": (
        DeepseekV3ForSequenceClassification,
        DeepseekV3Config,
        {**DEEPSEEK, "num_labels": 3, "pad_token_id": 0},
    ),
}
