"""GPT-2: LayerNorm, learned positions, fused projections stored (in, out) (transformers, models/gpt2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from converters.family import Family, IgnoredTensor
from converters.fields import ACTIVATIONS, Field, FieldFault, Fixed, Foreign, TokenId
from converters.rules import TRANSPOSE, Rule, Slice
from workbench.spec.model import ModelConfig

OURS, THEIRS = "layers.{i}", "transformer.h.{i}"

PLAIN = {
    "embed_tokens.weight": "transformer.wte.weight",
    "embed_positions.weight": "transformer.wpe.weight",
    f"{OURS}.input_layernorm.weight": f"{THEIRS}.ln_1.weight",
    f"{OURS}.input_layernorm.bias": f"{THEIRS}.ln_1.bias",
    f"{OURS}.self_attn.o_proj.bias": f"{THEIRS}.attn.c_proj.bias",
    f"{OURS}.post_attention_layernorm.weight": f"{THEIRS}.ln_2.weight",
    f"{OURS}.post_attention_layernorm.bias": f"{THEIRS}.ln_2.bias",
    f"{OURS}.mlp.up_proj.bias": f"{THEIRS}.mlp.c_fc.bias",
    f"{OURS}.mlp.down_proj.bias": f"{THEIRS}.mlp.c_proj.bias",
    "norm.weight": "transformer.ln_f.weight",
    "norm.bias": "transformer.ln_f.bias",
    "lm_head.weight": "lm_head.weight",
}
TRANSPOSED = {
    f"{OURS}.self_attn.o_proj.weight": f"{THEIRS}.attn.c_proj.weight",
    f"{OURS}.mlp.up_proj.weight": f"{THEIRS}.mlp.c_fc.weight",
    f"{OURS}.mlp.down_proj.weight": f"{THEIRS}.mlp.c_proj.weight",
}


def rules(model: ModelConfig) -> tuple[Rule, ...]:
    """Where each logical tensor lies. c_attn is [hidden, 3 * hidden]: columns of q, of k, of v (modeling_gpt2.py)."""
    h = model.hidden_size
    found = [Rule(ours, theirs) for ours, theirs in PLAIN.items()]
    head = "classifier" if model.label_tokens else "score"
    found += [Rule(f"score.{kind}", f"{head}.{kind}") for kind in ("weight", "bias")]
    found += [Rule(ours, theirs, (TRANSPOSE,)) for ours, theirs in TRANSPOSED.items()]
    for index, name in enumerate("qkv"):
        ours, theirs = f"{OURS}.self_attn.{name}_proj", f"{THEIRS}.attn.c_attn"
        found.append(Rule(f"{ours}.weight", f"{theirs}.weight", (Slice(1, index * h, h, 3 * h), TRANSPOSE)))
        found.append(Rule(f"{ours}.bias", f"{theirs}.bias", (Slice(0, index * h, h, 3 * h),)))
    return tuple(found)


@dataclass(frozen=True)
class Heads:
    """n_head: as many key/value heads, each of n_embd / n_head."""

    keys: tuple[str, ...] = ("n_head",)
    fields: tuple[str, ...] = ("num_attention_heads", "num_key_value_heads", "head_dim")

    def load(self, given: Foreign) -> dict[str, Any]:
        heads = given.get("n_head", 12)
        return {"num_attention_heads": heads, "num_key_value_heads": heads}

    def dump(self, model: ModelConfig) -> dict[str, Any]:
        heads = model.num_attention_heads
        if model.num_key_value_heads != heads:
            raise FieldFault(f"num_key_value_heads={model.num_key_value_heads} is not num_attention_heads={heads}")
        if model.head_dim * heads != model.hidden_size:
            raise FieldFault(f"head_dim={model.head_dim} is not hidden_size / num_attention_heads")
        return {"n_head": heads}


@dataclass(frozen=True)
class Inner:
    """n_inner: null means four times n_embd."""

    keys: tuple[str, ...] = ("n_inner",)
    fields: tuple[str, ...] = ("intermediate_size",)

    def load(self, given: Foreign) -> dict[str, Any]:
        inner = given.get("n_inner")
        return {"intermediate_size": 4 * given.get("n_embd", 768) if inner is None else inner}

    def dump(self, model: ModelConfig) -> dict[str, Any]:
        return {"n_inner": None if model.intermediate_size == 4 * model.hidden_size else model.intermediate_size}


FAMILY = Family(
    name="gpt2",
    model_type="gpt2",
    causal_lm="GPT2LMHeadModel",
    sequence_classification="GPT2ForSequenceClassification",
    token_classification="GPT2ForTokenClassification",
    body="GPT2Model",
    prefix="transformer.",
    fields=(
        Field("vocab_size", default=50257),
        Field("n_embd", "hidden_size", default=768),
        Field("n_layer", "num_hidden_layers", default=12),
        Field("n_positions", "max_position_embeddings", default=1024),
        Heads(),
        Inner(),
        Field("activation_function", "hidden_act", default="gelu_new", words=ACTIVATIONS),
        Field("layer_norm_epsilon", "norm_eps", default=1e-5),
        Field("tie_word_embeddings", default=True),
        Field("embd_pdrop", "embed_dropout", default=0.1),
        Field("attn_pdrop", "attention_dropout", default=0.1),
        Field("resid_pdrop", "hidden_dropout", default=0.1),
        Field("initializer_range", default=0.02),
        TokenId("bos_token_id", default=50256),
        TokenId("eos_token_id", default=50256),
        TokenId("pad_token_id"),
        Fixed("scale_attn_weights", (True,)),
        Fixed("scale_attn_by_inverse_layer_idx", (False,)),
        Fixed("add_cross_attention", (False,)),
    ),
    features={
        "gated_mlp": False,
        "norm": "layernorm",
        "position_embedding": "learned",
        "attention_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
    },
    unused=("rope_theta",),
    training_only={"scale_residual_init": True},
    # reorder_and_upcast_attn only moves the place of one cast under mixed precision; n_ctx repeats n_positions.
    harmless=(
        "reorder_and_upcast_attn",
        "n_ctx",
        "summary_type",
        "summary_use_proj",
        "summary_activation",
        "summary_proj_to_labels",
        "summary_first_dropout",
    ),
    rules=rules,
    ignored=(
        IgnoredTensor("transformer.h.{i}.attn.bias", "the causal mask"),
        IgnoredTensor("transformer.h.{i}.attn.masked_bias", "a constant of the causal mask"),
    ),
)
