"""Tiny random transformers models: every hazard of a conversion, none of the size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR_ROPE: dict[str, Any] = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}

LLAMA: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2: dict[str, Any] = {
    "vocab_size": 103,
    "n_positions": 48,
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BERT: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
}
T5: dict[str, Any] = {
    "vocab_size": 101,
    "d_model": 32,
    "d_kv": 6,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
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
    "gpt2": (GPT2LMHeadModel, GPT2Config, GPT2),
    "gpt2, untied, own width, exact gelu": (
        GPT2LMHeadModel,
        GPT2Config,
        {**GPT2, "tie_word_embeddings": False, "n_inner": 72, "activation_function": "gelu"},
    ),
    "gpt2, wide epsilon": (GPT2LMHeadModel, GPT2Config, {**GPT2, "layer_norm_epsilon": 1e-2, "vocab_size": 97}),
    "bert": (BertForMaskedLM, BertConfig, BERT),
    "bert, both heads, three segments, tanh gelu": (
        BertForPreTraining,
        BertConfig,
        {**BERT, "type_vocab_size": 3, "hidden_act": "gelu_new", "layer_norm_eps": 1e-3, "vocab_size": 97},
    ),
    "bert classifier": (BertForSequenceClassification, BertConfig, {**BERT, "num_labels": 3}),
    "bert body": (BertModel, BertConfig, BERT),
    "t5": (T5ForConditionalGeneration, T5Config, T5),
    "t5, gated, not scaled, more layers that read": (
        T5ForConditionalGeneration,
        T5Config,
        {
            **T5,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
            "num_layers": 3,
            "num_decoder_layers": 1,
        },
    ),
    "gpt2 classifier": (GPT2ForSequenceClassification, GPT2Config, {**GPT2, "num_labels": 2, "pad_token_id": 0}),
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
    return model


def save_model(case: str, folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """`folder`, filled by save_pretrained."""
    make_model(case, seed).to(dtype).save_pretrained(folder, **options)
    return folder
