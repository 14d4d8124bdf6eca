"""BERT: tokens that see all others, norms after the sums, segments, two heads (transformers, models/bert)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from converters.family import Family, IgnoredTensor
from converters.fields import ACTIVATIONS, Field, FieldFault, Fixed, Foreign, Switch, TokenId
from converters.rules import Rule
from workbench.spec.model import ModelConfig

OURS, THEIRS = "layers.{i}", "bert.encoder.layer.{i}"
LAYERS = {
    f"{OURS}.self_attn.q_proj": f"{THEIRS}.attention.self.query",
    f"{OURS}.self_attn.k_proj": f"{THEIRS}.attention.self.key",
    f"{OURS}.self_attn.v_proj": f"{THEIRS}.attention.self.value",
    f"{OURS}.self_attn.o_proj": f"{THEIRS}.attention.output.dense",
    f"{OURS}.post_attention_layernorm": f"{THEIRS}.attention.output.LayerNorm",
    f"{OURS}.mlp.up_proj": f"{THEIRS}.intermediate.dense",
    f"{OURS}.mlp.down_proj": f"{THEIRS}.output.dense",
    f"{OURS}.post_feedforward_layernorm": f"{THEIRS}.output.LayerNorm",
    "embed_norm": "bert.embeddings.LayerNorm",
    "pooler": "bert.pooler.dense",
    "head_transform": "cls.predictions.transform.dense",
    "head_norm": "cls.predictions.transform.LayerNorm",
    "next_sentence": "cls.seq_relationship",
    "score": "classifier",
}
TABLES = {
    "embed_tokens.weight": "bert.embeddings.word_embeddings.weight",
    "embed_positions.weight": "bert.embeddings.position_embeddings.weight",
    "embed_types.weight": "bert.embeddings.token_type_embeddings.weight",
    "lm_head.bias": "cls.predictions.bias",
}
HEADS = {"lm_head": True, "head_transform": True, "lm_head_bias": True, "pooler": False, "next_sentence": False}
NO_WORDS = {"head_transform": False, "lm_head_bias": False, "pooler": True, "next_sentence": False}
OTHER = "belongs to another class than this configuration names"


def rules(_: ModelConfig) -> tuple[Rule, ...]:
    """Where each logical tensor lies."""
    layers = {f"{ours}.{kind}": f"{LAYERS[ours]}.{kind}" for ours in LAYERS for kind in ("weight", "bias")}
    return tuple(Rule(ours, theirs) for ours, theirs in {**layers, **TABLES}.items())


@dataclass(frozen=True)
class Heads:
    """num_attention_heads: as many key/value heads, each of hidden_size / num_attention_heads."""

    keys: tuple[str, ...] = ("num_attention_heads",)
    fields: tuple[str, ...] = ("num_attention_heads", "num_key_value_heads", "head_dim")

    def load(self, given: Foreign) -> dict[str, Any]:
        return dict.fromkeys(self.fields[:2], given.get("num_attention_heads", 12))

    def dump(self, model: ModelConfig) -> dict[str, Any]:
        heads = model.num_attention_heads
        if model.num_key_value_heads != heads:
            raise FieldFault(f"num_key_value_heads={model.num_key_value_heads} is not num_attention_heads={heads}")
        if model.head_dim * heads != model.hidden_size:
            raise FieldFault(f"head_dim={model.head_dim} is not hidden_size / num_attention_heads")
        return {"num_attention_heads": heads}


@dataclass(frozen=True)
class ClassifierDropout:
    """classifier_dropout: that of the hidden states when absent or null."""

    keys: tuple[str, ...] = ("classifier_dropout",)
    fields: tuple[str, ...] = ("classifier_dropout",)

    def load(self, given: Foreign) -> dict[str, Any]:
        value = given.get("classifier_dropout")
        return {"classifier_dropout": given.get("hidden_dropout_prob", 0.1) if value is None else value}

    def dump(self, model: ModelConfig) -> dict[str, Any]:
        is_hidden = model.classifier_dropout == model.hidden_dropout
        return {"classifier_dropout": None if is_hidden else model.classifier_dropout}


FAMILY = Family(
    name="bert",
    model_type="bert",
    sequence_classification="BertForSequenceClassification",
    token_classification="BertForTokenClassification",
    other_classes={
        "BertForMaskedLM": HEADS,
        "BertForPreTraining": {**HEADS, "pooler": True, "next_sentence": True},
        "BertForSequenceClassification": {"lm_head": True, **NO_WORDS},
        "BertForTokenClassification": {"lm_head": True, **NO_WORDS, "pooler": False},
        "BertModel": {"lm_head": False, **NO_WORDS},
    },
    prefix="bert.",
    fields=(
        Field("vocab_size", default=30522),
        Field("hidden_size", default=768),
        Field("num_hidden_layers", default=12),
        Heads(),
        Field("intermediate_size", default=3072),
        Field("max_position_embeddings", default=512),
        Field("type_vocab_size", default=2),
        Field("hidden_act", default="gelu", words=ACTIVATIONS),
        Field("layer_norm_eps", "norm_eps", default=1e-12),
        Switch("hidden_dropout_prob", ("hidden_dropout", "embed_dropout"), default=0.1),
        Field("attention_probs_dropout_prob", "attention_dropout", default=0.1),
        Field("initializer_range", default=0.02),
        TokenId("bos_token_id"),
        TokenId("eos_token_id"),
        TokenId("pad_token_id", default=0),
        Fixed("tie_word_embeddings", (True,)),
        Fixed("position_embedding_type", ("absolute",)),
        Fixed("is_decoder", (False,)),
        ClassifierDropout(),
    ),
    features={
        "gated_mlp": False,
        "norm": "layernorm",
        "norm_placement": "post_residual",
        "causal": False,
        "embed_norm": True,
        "position_embedding": "learned",
        "attention_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    unused=("rope_theta", "relative_attention_num_buckets", "relative_attention_max_distance"),
    training_only={"scale_residual_init": False},
    rules=rules,
    ignored=(
        IgnoredTensor("bert.embeddings.position_ids", "counts from 0"),
        *(IgnoredTensor(f"bert.pooler.dense.{kind}", OTHER) for kind in ("weight", "bias")),
        *(IgnoredTensor(f"cls.seq_relationship.{kind}", OTHER) for kind in ("weight", "bias")),
    ),
    renamed={"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"},
    repeats={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
)
