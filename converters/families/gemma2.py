"""Gemma 2: every other layer slides, four norms a layer that scale by 1 + w, capped scores and logits, scaled
embeddings (transformers, models/gemma2)."""

from __future__ import annotations

from converters.families._same_names import INVERSE_FREQUENCIES, PREFIX, TANH_FIRST, even_heads_faults, rules
from converters.family import Family
from converters.fields import Field, Fixed, Switch, TokenId
from converters.rope_fields import Rope
from converters.sliding import SlidingLayers

FAMILY = Family(
    name="gemma2",
    model_type="gemma2",
    causal_lm="Gemma2ForCausalLM",
    sequence_classification="Gemma2ForSequenceClassification",
    token_classification="Gemma2ForTokenClassification",
    body="Gemma2Model",
    prefix=PREFIX,
    fields=(
        Field("vocab_size", default=256000),
        Field("hidden_size", default=2304),
        Field("intermediate_size", default=9216),
        Field("num_hidden_layers", default=26),
        Field("num_attention_heads", default=8),
        Field("num_key_value_heads", default=4),
        Field("head_dim", default=256),
        Field("max_position_embeddings", default=8192),
        Field("hidden_activation", "hidden_act", default="gelu_pytorch_tanh", words=TANH_FIRST),
        Field("rms_norm_eps", "norm_eps", default=1e-6),
        Field("tie_word_embeddings", default=True),
        Switch("attention_bias", ("attention_bias", "attention_output_bias"), default=False),
        Field("query_pre_attn_scalar", default=256),
        Field("attn_logit_softcapping", default=50.0),
        Field("final_logit_softcapping", default=30.0),
        SlidingLayers(26, lambda _, layer: layer % 2 == 0),
        Field("attention_dropout", default=0.0),
        Field("initializer_range", default=0.02),
        Rope(),
        TokenId("bos_token_id", default=2),
        TokenId("eos_token_id", default=1),
        TokenId("pad_token_id", default=0),
        Fixed("use_bidirectional_attention", (None, False)),
    ),
    features={
        "gated_mlp": True,
        "norm": "rmsnorm",
        "norm_placement": "sandwich",
        "norm_unit_offset": True,
        "position_embedding": "rope",
        "scale_embeddings": True,
    },
    training_only={"embed_dropout": 0.0, "hidden_dropout": 0.0, "scale_residual_init": False},
    harmless=("cache_implementation", "hidden_act", "sliding_window_size"),
    rules=rules,
    ignored=(INVERSE_FREQUENCIES,),
    faults=even_heads_faults,
)
