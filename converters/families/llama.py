"""Llama: RMSNorm, rotary positions, grouped-query attention, SwiGLU (transformers, models/llama)."""

from __future__ import annotations

from converters.families._same_names import HEADS, INVERSE_FREQUENCIES, derived_head_dim, even_heads_faults
from converters.family import Family
from converters.fields import ACTIVATIONS, Field, OptionalField, Switch, TokenId
from converters.rope_fields import Rope
from converters.rules import Rule
from workbench.spec.model import ModelConfig

LAYER = "layers.{i}"

# Our names are these without the prefix.
NAMES = (
    *(f"{LAYER}.self_attn.{name}_proj.{kind}" for name in "qkvo" for kind in ("weight", "bias")),
    *(f"{LAYER}.mlp.{name}_proj.{kind}" for name in ("gate", "up", "down") for kind in ("weight", "bias")),
    f"{LAYER}.input_layernorm.weight",
    f"{LAYER}.post_attention_layernorm.weight",
    "embed_tokens.weight",
    "norm.weight",
)


def rules(_: ModelConfig) -> tuple[Rule, ...]:
    """Where each logical tensor lies."""
    heads = (Rule(name, name) for name in HEADS)
    return (*(Rule(name, f"model.{name}") for name in NAMES), *heads)


FAMILY = Family(
    name="llama",
    model_type="llama",
    causal_lm="LlamaForCausalLM",
    sequence_classification="LlamaForSequenceClassification",
    token_classification="LlamaForTokenClassification",
    body="LlamaModel",
    prefix="model.",
    fields=(
        Field("vocab_size", default=32000),
        Field("hidden_size", default=4096),
        Field("intermediate_size", default=11008),
        Field("num_hidden_layers", default=32),
        Field("num_attention_heads", default=32),
        OptionalField("num_key_value_heads", lambda given: given["num_attention_heads"]),
        OptionalField("head_dim", derived_head_dim),
        Field("max_position_embeddings", default=2048),
        Field("hidden_act", default="silu", words=ACTIVATIONS),
        Field("rms_norm_eps", "norm_eps", default=1e-6),
        Field("tie_word_embeddings", default=False),
        Switch("attention_bias", ("attention_bias", "attention_output_bias"), default=False),
        Field("mlp_bias", default=False),
        Field("attention_dropout", default=0.0),
        Field("initializer_range", default=0.02),
        Rope(),
        TokenId("bos_token_id", default=1),
        TokenId("eos_token_id", default=2),
        TokenId("pad_token_id"),
    ),
    features={"gated_mlp": True, "norm": "rmsnorm", "position_embedding": "rope"},
    training_only={"embed_dropout": 0.0, "hidden_dropout": 0.0, "scale_residual_init": False},
    harmless=("pretraining_tp",),
    rules=rules,
    ignored=(INVERSE_FREQUENCIES,),
    faults=even_heads_faults,
)
