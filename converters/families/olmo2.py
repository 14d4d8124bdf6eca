"""OLMo 2: norms of what leaves attention and MLP, queries and keys normed over their whole width (transformers,
models/olmo2)."""

from __future__ import annotations

from converters.families._same_names import INVERSE_FREQUENCIES, PREFIX, rules
from converters.family import Family
from converters.fields import ACTIVATIONS, Field, ImpliedHeadDim, OptionalField, Switch, TokenId
from converters.rope_fields import Rope

FAMILY = Family(
    name="olmo2",
    model_type="olmo2",
    causal_lm="Olmo2ForCausalLM",
    sequence_classification="Olmo2ForSequenceClassification",
    body="Olmo2Model",
    prefix=PREFIX,
    fields=(
        Field("vocab_size", default=50304),
        Field("hidden_size", default=4096),
        Field("intermediate_size", default=11008),
        Field("num_hidden_layers", default=32),
        Field("num_attention_heads", default=32),
        OptionalField("num_key_value_heads", lambda given: given.get("num_attention_heads", 32)),
        ImpliedHeadDim(),
        Field("max_position_embeddings", default=2048),
        Field("hidden_act", default="silu", words=ACTIVATIONS),
        Field("rms_norm_eps", "norm_eps", default=1e-5),
        Field("tie_word_embeddings", default=False),
        Switch("attention_bias", ("attention_bias", "attention_output_bias"), default=False),
        Field("attention_dropout", default=0.0),
        Field("initializer_range", default=0.02),
        Rope(),
        TokenId("bos_token_id"),
        TokenId("eos_token_id", default=50279),
        TokenId("pad_token_id", default=1),
    ),
    features={
        "gated_mlp": True,
        "norm": "rmsnorm",
        "norm_placement": "post",
        "position_embedding": "rope",
        "qk_norm": "full",
    },
    training_only={"embed_dropout": 0.0, "hidden_dropout": 0.0, "scale_residual_init": False},
    rules=rules,
    ignored=(INVERSE_FREQUENCIES,),
)
