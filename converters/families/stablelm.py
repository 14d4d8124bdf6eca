"""StableLM: LayerNorm, partly rotary heads, SwiGLU, a norm a branch or one for both (models/stablelm)."""

from __future__ import annotations

from converters.families._same_names import HEADS
from converters.family import Family
from converters.fields import ACTIVATIONS, Field, Fixed, Switch, TokenId
from converters.rope_fields import Rope
from converters.rules import Rule
from workbench.spec.model import ModelConfig

LAYER = "layers.{i}"

# Our names are these without the prefix.
NAMES = (
    *(f"{LAYER}.self_attn.{name}_proj.{kind}" for name in "qkv" for kind in ("weight", "bias")),
    *(f"{norm}.{kind}" for norm in (f"{LAYER}.input_layernorm", "norm") for kind in ("weight", "bias")),
    *(f"{LAYER}.post_attention_layernorm.{kind}" for kind in ("weight", "bias")),
    *(f"{LAYER}.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    f"{LAYER}.self_attn.o_proj.weight",
    "embed_tokens.weight",
)


def rules(_: ModelConfig) -> tuple[Rule, ...]:
    """Where each logical tensor lies."""
    heads = (Rule(name, name) for name in HEADS)
    return (*(Rule(name, f"model.{name}") for name in NAMES), *heads)


def faults(model: ModelConfig) -> list[str]:
    """Why transformers has no words for the size of this model's heads."""
    if model.head_dim * model.num_attention_heads != model.hidden_size:
        return [f"head_dim={model.head_dim} is not hidden_size / num_attention_heads"]
    return []


FAMILY = Family(
    name="stablelm",
    model_type="stablelm",
    causal_lm="StableLmForCausalLM",
    sequence_classification="StableLmForSequenceClassification",
    token_classification="StableLmForTokenClassification",
    body="StableLmModel",
    prefix="model.",
    fields=(
        Field("vocab_size", default=50304),
        Field("hidden_size", default=2560),
        Field("intermediate_size", default=6912),
        Field("num_hidden_layers", default=32),
        Field("num_attention_heads", default=32),
        Field("num_key_value_heads", default=32),
        Field("max_position_embeddings", default=4096),
        Field("hidden_act", default="silu", words=ACTIVATIONS),
        Field("layer_norm_eps", "norm_eps", default=1e-5),
        Field("tie_word_embeddings", default=False),
        Field("use_qkv_bias", "attention_bias", default=False),
        Switch("use_parallel_residual", ("parallel_residual", "shared_norm"), default=False),
        Field("attention_dropout", default=0.0),
        Field("initializer_range", default=0.02),
        Rope(default_partial=0.25),
        Fixed("qk_layernorm", (False,)),
        Fixed("hidden_dropout", (0.0,)),  # on the MLP alone there
        TokenId("bos_token_id", default=0),
        TokenId("eos_token_id", default=0),
        TokenId("pad_token_id"),
    ),
    features={"gated_mlp": True, "norm": "layernorm", "position_embedding": "rope"},
    unused=("head_dim",),
    training_only={"embed_dropout": 0.0, "hidden_dropout": 0.0, "scale_residual_init": False},
    rules=rules,
    faults=faults,
)
