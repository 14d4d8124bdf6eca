"""Tiny random transformers models: every hazard of a conversion, none of the size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma2ForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma3TextForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Phi3ForSequenceClassification,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
    StableLmForSequenceClassification,
)

from tests.helpers.hf_encoders import ENCODER_CASES
from tests.helpers.hf_experts import EXPERT_CASES
from tests.helpers.hf_latents import LATENT_CASES
from tests.helpers.hf_sizes import LLAMA, LLAMA3_ROPE

LINEAR_ROPE: dict[str, Any] = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}
YARN_ROPE: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONG_ROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 3.0,
    "original_max_position_embeddings": 20,
    "short_factor": [1.0, 1.1, 1.3, 1.8],
    "long_factor": [1.0, 1.5, 4.0, 9.0],
}

NEOX: dict[str, Any] = {
    "vocab_size": 107,
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
PHI3: dict[str, Any] = {**LLAMA, "pad_token_id": 0}
GPT2: dict[str, Any] = {
    "vocab_size": 103,
    "n_positions": 48,
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

GEMMA: dict[str, Any] = {
    **LLAMA,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "query_pre_attn_scalar": 20,
    "sliding_window": 7,
}
BY_LAYER_ROPE: dict[str, Any] = {
    "full_attention": LINEAR_ROPE,
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}

CASES: dict[str, tuple[type[PreTrainedModel], type, dict[str, Any]]] = {
    "llama, untied, a KV head per head": (LlamaForCausalLM, LlamaConfig, LLAMA),
    "llama, tied, grouped, llama3 rope": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            **LLAMA,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "rope_parameters": LLAMA3_ROPE,
            "eos_token_id": [2, 3],
        },
    ),
    "llama, biased, wide heads, linear rope": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            **LLAMA,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": LINEAR_ROPE,
            "rms_norm_eps": 1e-3,
            "hidden_act": "gelu",
        },
    ),
    "llama classifier": (
        LlamaForSequenceClassification,
        LlamaConfig,
        {**LLAMA, "num_labels": 3, "pad_token_id": 0, "num_key_value_heads": 2},
    ),
    "llama, rope by length": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            **LLAMA,
            "max_position_embeddings": 24,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.5},
        },
    ),
    "llama, yarn rope": (LlamaForCausalLM, LlamaConfig, {**LLAMA, "rope_parameters": YARN_ROPE}),
    "llama, yarn rope with every word": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            **LLAMA,
            "head_dim": 16,
            "rope_parameters": {
                **YARN_ROPE,
                "beta_fast": 8.0,
                "beta_slow": 2.0,
                "mscale": 1.3,
                "mscale_all_dim": 0.6,
                "truncate": False,
            },
        },
    ),
    "llama, longrope": (LlamaForCausalLM, LlamaConfig, {**LLAMA, "rope_parameters": LONG_ROPE}),
    "gpt_neox, parallel, a quarter turns": (GPTNeoXForCausalLM, GPTNeoXConfig, NEOX),
    "gpt_neox, sequential, tied, linear rope": (
        GPTNeoXForCausalLM,
        GPTNeoXConfig,
        {
            **NEOX,
            "use_parallel_residual": False,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "hidden_act": "gelu_new",
            "layer_norm_eps": 1e-3,
            "rope_parameters": {**LINEAR_ROPE, "partial_rotary_factor": 0.5},
        },
    ),
    "gpt_neox classifier": (
        GPTNeoXForSequenceClassification,
        GPTNeoXConfig,
        {**NEOX, "num_labels": 3, "pad_token_id": 0},
    ),
    "phi3, sliding": (Phi3ForCausalLM, Phi3Config, {**PHI3, "sliding_window": 7}),
    "phi3, grouped, tied, longrope": (
        Phi3ForCausalLM,
        Phi3Config,
        {
            **PHI3,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "original_max_position_embeddings": 20,
            "rope_parameters": LONG_ROPE,
        },
    ),
    "phi3, partial longrope with its own scale": (
        Phi3ForCausalLM,
        Phi3Config,
        {
            **PHI3,
            "original_max_position_embeddings": 20,
            "rope_parameters": {
                **LONG_ROPE,
                "short_factor": [1.0, 1.4],
                "long_factor": [1.5, 6.0],
                "partial_rotary_factor": 0.5,
                "attention_factor": 1.4,
            },
        },
    ),
    "phi3 classifier": (Phi3ForSequenceClassification, Phi3Config, {**PHI3, "num_labels": 2}),
    "mistral, untied, no window": (MistralForCausalLM, MistralConfig, {**LLAMA, "sliding_window": None}),
    "mistral, tied, grouped, sliding": (
        MistralForCausalLM,
        MistralConfig,
        {**LLAMA, "num_key_value_heads": 2, "head_dim": 12, "tie_word_embeddings": True, "sliding_window": 7},
    ),
    "qwen2, untied, a KV head per head": (Qwen2ForCausalLM, Qwen2Config, {**LLAMA, "rope_parameters": LINEAR_ROPE}),
    "qwen2, tied, grouped, half sliding": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {
            **LLAMA,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 2,
        },
    ),
    "qwen3, untied, wide heads": (Qwen3ForCausalLM, Qwen3Config, {**LLAMA, "head_dim": 12}),
    "qwen3, tied, grouped, biased, sliding, llama3 rope": (
        Qwen3ForCausalLM,
        Qwen3Config,
        {
            **LLAMA,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 9,
            "layer_types": ["sliding_attention"] * 4,
            "rope_parameters": LLAMA3_ROPE,
        },
    ),
    "olmo2, untied, a KV head per head": (Olmo2ForCausalLM, Olmo2Config, {**LLAMA, "pad_token_id": 0}),
    "olmo2, tied, grouped, biased, llama3 rope": (
        Olmo2ForCausalLM,
        Olmo2Config,
        {
            **LLAMA,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "rope_parameters": LLAMA3_ROPE,
            "pad_token_id": 0,
        },
    ),
    "gemma2, tied, grouped, capped": (
        Gemma2ForCausalLM,
        Gemma2Config,
        {**GEMMA, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0},
    ),
    "gemma2, untied, biased, a KV head per head, uncapped": (
        Gemma2ForCausalLM,
        Gemma2Config,
        {
            **GEMMA,
            "num_key_value_heads": 4,
            "tie_word_embeddings": False,
            "attention_bias": True,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "rope_parameters": LLAMA3_ROPE,
        },
    ),
    "gemma2 classifier": (Gemma2ForSequenceClassification, Gemma2Config, {**GEMMA, "num_labels": 3, "pad_token_id": 0}),
    "gemma3, tied, grouped, linear rope": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {
            **GEMMA,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
            "rope_parameters": BY_LAYER_ROPE,
        },
    ),
    "gemma3, untied, biased, capped": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {
            **GEMMA,
            "num_key_value_heads": 4,
            "tie_word_embeddings": False,
            "attention_bias": True,
            "final_logit_softcapping": 2.0,
            "sliding_window_pattern": 2,
        },
    ),
    "gemma3 classifier": (
        Gemma3TextForSequenceClassification,
        Gemma3TextConfig,
        {**GEMMA, "num_labels": 3, "pad_token_id": 0},
    ),
    "gpt2": (GPT2LMHeadModel, GPT2Config, GPT2),
    "gpt2, untied, own width, exact gelu": (
        GPT2LMHeadModel,
        GPT2Config,
        {**GPT2, "tie_word_embeddings": False, "n_inner": 72, "activation_function": "gelu"},
    ),
    "gpt2, wide epsilon": (GPT2LMHeadModel, GPT2Config, {**GPT2, "layer_norm_epsilon": 1e-2, "vocab_size": 97}),
    "gpt2 classifier": (GPT2ForSequenceClassification, GPT2Config, {**GPT2, "num_labels": 2, "pad_token_id": 0}),
    "stablelm, a norm a branch, biased": (
        StableLmForCausalLM,
        StableLmConfig,
        {**LLAMA, "use_qkv_bias": True, "layer_norm_eps": 1e-3},
    ),
    "stablelm, one norm, grouped, tied, half turns": (
        StableLmForCausalLM,
        StableLmConfig,
        {
            **LLAMA,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "use_parallel_residual": True,
            "partial_rotary_factor": 0.5,
        },
    ),
    **ENCODER_CASES,
    **EXPERT_CASES,
    **LATENT_CASES,
    "stablelm classifier": (
        StableLmForSequenceClassification,
        StableLmConfig,
        {**LLAMA, "num_labels": 3, "pad_token_id": 0},
    ),
}


def make_model(case: str, seed: int = 0) -> PreTrainedModel:
    """The model of a case, every parameter random: norms are not ones and biases are not zeros."""
    model_class, config_class, values = CASES[case]
    model = model_class(config_class(**values)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name.lower() or ".ln_" in name
            if is_norm and name.endswith("weight"):
                parameter.copy_(1.0 + 0.3 * noise)
            else:
                parameter.copy_(0.15 * noise)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.15 * torch.randn(buffer.shape, generator=generator))
    return model


def save_model(case: str, folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """`folder`, filled by save_pretrained."""
    make_model(case, seed).to(dtype).save_pretrained(folder, **options)
    return folder
