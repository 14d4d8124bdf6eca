"""Qwen2 and Qwen2.5: a Llama with biases on queries, keys and values, whose later layers may slide (transformers,
models/qwen2)."""

from __future__ import annotations

from converters.families._same_names import INVERSE_FREQUENCIES, PREFIX, rules
from converters.family import Family
from converters.fields import ACTIVATIONS, Field, ImpliedHeadDim, OptionalField, TokenId
from converters.rope_fields import Rope
from converters.sliding import SlidingLayers

FAMILY = Family(
    name="qwen2",
    model_type="qwen2",
    causal_lm="Qwen2ForCausalLM",
    sequence_classification="Qwen2ForSequenceClassification",
    token_classification="Qwen2ForTokenClassification",
    body="Qwen2Model",
    prefix=PREFIX,
    fields=(
        Field("vocab_size", default=151936),
        Field("hidden_size", default=4096),
        Field("intermediate_size", default=22016),
        Field("num_hidden_layers", default=32),
        Field("num_attention_heads", default=32),
        OptionalField("num_key_value_heads", lambda given: given.get("num_attention_heads", 32)),
        ImpliedHeadDim(),
        Field("max_position_embeddings", default=32768),
        Field("hidden_act", default="silu", words=ACTIVATIONS),
        Field("rms_norm_eps", "norm_eps", default=1e-6),
        Field("tie_word_embeddings", default=False),
        SlidingLayers(
            32,
            lambda given, layer: layer >= given.get("max_window_layers", 28),
            older=("max_window_layers",),
            switched=True,
        ),
        Field("attention_dropout", default=0.0),
        Field("initializer_range", default=0.02),
        Rope(),
        TokenId("bos_token_id"),
        TokenId("eos_token_id"),
        TokenId("pad_token_id"),
    ),
    features={"attention_bias": True, "gated_mlp": True, "norm": "rmsnorm", "position_embedding": "rope"},
    training_only={"embed_dropout": 0.0, "hidden_dropout": 0.0, "scale_residual_init": False},
    harmless=("use_mrope",),
    rules=rules,
    ignored=(INVERSE_FREQUENCIES,),
)
