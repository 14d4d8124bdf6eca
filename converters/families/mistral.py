"""Mistral: a Llama all of whose layers may attend to a sliding window (transformers, models/mistral)."""

from __future__ import annotations

from converters.families._same_names import INVERSE_FREQUENCIES, PREFIX, derived_head_dim, rules
from converters.family import Family
from converters.fields import ACTIVATIONS, Field, OptionalField, TokenId
from converters.rope_fields import Rope

FAMILY = Family(
    name="mistral",
    model_type="mistral",
    causal_lm="MistralForCausalLM",
    sequence_classification="MistralForSequenceClassification",
    token_classification="MistralForTokenClassification",
    body="MistralModel",
    prefix=PREFIX,
    fields=(
        Field("vocab_size", default=32000),
        Field("hidden_size", default=4096),
        Field("intermediate_size", default=14336),
        Field("num_hidden_layers", default=32),
        Field("num_attention_heads", default=32),
        Field("num_key_value_heads", default=8),
        OptionalField("head_dim", derived_head_dim),
        Field("max_position_embeddings", default=131072),
        Field("hidden_act", default="silu", words=ACTIVATIONS),
        Field("rms_norm_eps", "norm_eps", default=1e-6),
        Field("tie_word_embeddings", default=False),
        Field("sliding_window", default=4096),
        Field("attention_dropout", default=0.0),
        Field("initializer_range", default=0.02),
        Rope(),
        TokenId("bos_token_id", default=1),
        TokenId("eos_token_id", default=2),
        TokenId("pad_token_id"),
    ),
    features={"gated_mlp": True, "norm": "rmsnorm", "position_embedding": "rope"},
    training_only={"embed_dropout": 0.0, "hidden_dropout": 0.0, "scale_residual_init": False},
    rules=rules,
    ignored=(INVERSE_FREQUENCIES,),
)
