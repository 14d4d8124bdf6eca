"""Tiny random models of transformers that have an encoder."""

from __future__ import annotations

from typing import Any

from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

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

ENCODER_CASES: dict[str, tuple[type[PreTrainedModel], type, dict[str, Any]]] = {
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
}
