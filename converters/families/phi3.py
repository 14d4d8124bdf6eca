"""Phi-3 and Phi-4: fused projections, a rope factor for each dimension (transformers, models/phi3)."""

from __future__ import annotations

from converters.families._same_names import HEADS, INVERSE_FREQUENCIES
from converters.family import Family
from converters.fields import ACTIVATIONS, Field, OptionalField, TokenId
from converters.rope_fields import Rope
from converters.rules import Rule, Slice
from workbench.spec.model import ModelConfig

LAYER = "layers.{i}"

# Our names are these without the prefix.
NAMES = (
    f"{LAYER}.self_attn.o_proj.weight",
    f"{LAYER}.mlp.down_proj.weight",
    f"{LAYER}.input_layernorm.weight",
    f"{LAYER}.post_attention_layernorm.weight",
    "embed_tokens.weight",
    "norm.weight",
)


def rules(model: ModelConfig) -> tuple[Rule, ...]:
    """Where each logical tensor lies: rows of q, of k, of v in one matrix, of gate and of up in another."""
    q, kv = (heads * model.head_dim for heads in (model.num_attention_heads, model.num_key_value_heads))
    fused = (
        ("self_attn.qkv_proj", (("self_attn.q_proj", q), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv))),
        ("mlp.gate_up_proj", (("mlp.gate_proj", model.intermediate_size), ("mlp.up_proj", model.intermediate_size))),
    )
    found = [Rule(name, f"model.{name}") for name in NAMES]
    for theirs, parts in fused:
        start, total = 0, sum(size for _, size in parts)
        for ours, size in parts:
            view = (Slice(0, start, size, total),)
            found.append(Rule(f"{LAYER}.{ours}.weight", f"model.{LAYER}.{theirs}.weight", view))
            start += size
    return (*found, *(Rule(name, name) for name in HEADS))


def faults(model: ModelConfig) -> list[str]:
    """Why transformers has no words for this model's heads and positions (Phi3Config.validate_rope)."""
    found = []
    if model.head_dim * model.num_attention_heads != model.hidden_size:
        found.append(f"head_dim={model.head_dim} is not hidden_size / num_attention_heads")
    if model.rope_scaling is not None and model.rope_scaling.kind != "per_dimension":
        found.append(f"rope_scaling.kind={model.rope_scaling.kind!r} has no place, only 'per_dimension'")
    return found


FAMILY = Family(
    name="phi3",
    model_type="phi3",
    causal_lm="Phi3ForCausalLM",
    sequence_classification="Phi3ForSequenceClassification",
    token_classification="Phi3ForTokenClassification",
    body="Phi3Model",
    prefix="model.",
    fields=(
        Field("vocab_size", default=32064),
        Field("hidden_size", default=3072),
        Field("intermediate_size", default=8192),
        Field("num_hidden_layers", default=32),
        Field("num_attention_heads", default=32),
        OptionalField("num_key_value_heads", lambda given: given["num_attention_heads"]),
        Field("max_position_embeddings", default=4096),
        Field("hidden_act", default="silu", words=ACTIVATIONS),
        Field("rms_norm_eps", "norm_eps", default=1e-5),
        Field("tie_word_embeddings", default=False),
        Field("attention_dropout", default=0.0),
        Field("embd_pdrop", "embed_dropout", default=0.0),
        Field("resid_pdrop", "hidden_dropout", default=0.0),
        Field("initializer_range", default=0.02),
        Rope(default_partial=1.0),
        Field("sliding_window", default=None),
        TokenId("bos_token_id", default=1),
        TokenId("eos_token_id", default=32000),
        TokenId("pad_token_id", default=32000),
    ),
    features={"gated_mlp": True, "norm": "rmsnorm", "position_embedding": "rope"},
    unused=("head_dim",),
    training_only={"scale_residual_init": False},
    rules=rules,
    ignored=(INVERSE_FREQUENCIES,),
    faults=faults,
)
