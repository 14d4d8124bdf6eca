"""Configurations of models with an encoder, as transformers and the hub write them, by case."""

from __future__ import annotations

from typing import Any

from transformers import BertConfig, T5Config

ENCODERS: dict[str, dict[str, Any]] = {
    "bert defaults": BertConfig(architectures=["BertForMaskedLM"]).to_dict(),
    "bert, both heads": BertConfig(
        architectures=["BertForPreTraining"], hidden_size=32, num_attention_heads=2, type_vocab_size=3
    ).to_dict(),
    "bert classifier": BertConfig(architectures=["BertForSequenceClassification"], num_labels=3).to_dict(),
    "bert body": BertConfig(architectures=["BertModel"], hidden_act="gelu_new").to_dict(),
    "bert of 2019": {
        "architectures": ["BertForMaskedLM"],
        "attention_probs_dropout_prob": 0.1,
        "gradient_checkpointing": False,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": 768,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
        "model_type": "bert",
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "pad_token_id": 0,
        "position_embedding_type": "absolute",
        "transformers_version": "4.6.0.dev0",
        "type_vocab_size": 2,
        "use_cache": True,
        "vocab_size": 30522,
    },
    "t5 defaults": T5Config(architectures=["T5ForConditionalGeneration"]).to_dict(),
    "t5, gated, not scaled": T5Config(
        architectures=["T5ForConditionalGeneration"],
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        num_decoder_layers=3,
    ).to_dict(),
    "t5 of 2021": {
        "architectures": ["T5ForConditionalGeneration"],
        "d_ff": 1024,
        "d_kv": 64,
        "d_model": 512,
        "decoder_start_token_id": 0,
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "initializer_factor": 1.0,
        "is_encoder_decoder": True,
        "layer_norm_epsilon": 1e-06,
        "model_type": "t5",
        "num_decoder_layers": 8,
        "num_heads": 6,
        "num_layers": 8,
        "output_past": True,
        "pad_token_id": 0,
        "relative_attention_num_buckets": 32,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": 32128,
    },
}
