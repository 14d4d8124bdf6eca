"""Tiny random transformers models with experts."""

from __future__ import annotations

from typing import Any

from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.helpers.hf_sizes import LLAMA, LLAMA3_ROPE

EXPERTS: dict[str, Any] = {
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "router_aux_loss_coef": 0.0,
}

EXPERT_CASES: dict[str, tuple[type[PreTrainedModel], type, dict[str, Any]]] = {
    "mixtral, untied, grouped": (
        MixtralForCausalLM,
        MixtralConfig,
        {**LLAMA, "num_key_value_heads": 2, "num_local_experts": 4, "router_aux_loss_coef": 0.0},
    ),
    "mixtral, tied, one expert a token, sliding": (
        MixtralForCausalLM,
        MixtralConfig,
        {
            **LLAMA,
            "head_dim": 12,
            "num_local_experts": 8,
            "num_experts_per_tok": 1,
            "sliding_window": 9,
            "tie_word_embeddings": True,
            "router_aux_loss_coef": 0.0,
        },
    ),
    "qwen2_moe, untied, some layers dense": (
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig,
        {**LLAMA, **EXPERTS, "shared_expert_intermediate_size": 40, "mlp_only_layers": [0]},
    ),
    "qwen2_moe, tied, grouped, unbiased, llama3 rope": (
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig,
        {
            **LLAMA,
            **EXPERTS,
            "num_key_value_heads": 2,
            "shared_expert_intermediate_size": 24,
            "decoder_sparse_step": 2,
            "qkv_bias": False,
            "norm_topk_prob": True,
            "tie_word_embeddings": True,
            "rope_parameters": LLAMA3_ROPE,
        },
    ),
    "qwen3_moe, untied, wide heads": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {**LLAMA, **EXPERTS, "head_dim": 12, "norm_topk_prob": True},
    ),
    "qwen3_moe, tied, grouped, biased, some layers dense": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {
            **LLAMA,
            **EXPERTS,
            "num_key_value_heads": 2,
            "attention_bias": True,
            "mlp_only_layers": [1],
            "tie_word_embeddings": True,
        },
    ),
}
