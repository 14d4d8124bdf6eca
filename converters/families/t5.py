"""T5: an encoder and a decoder, biases by distance, RMSNorm, a plain or gated MLP (transformers, models/t5)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from converters.family import Family, IgnoredTensor
from converters.fields import ACTIVATIONS, Field, FieldFault, Fixed, Foreign, Switch, TokenId
from converters.rules import Rule
from workbench.spec.model import ModelConfig


def rules(model: ModelConfig) -> tuple[Rule, ...]:
    """Where each logical tensor lies. Layers of the encoder come first, and those of the decoder count anew."""
    table = {
        "embed_tokens.weight": "shared.weight",
        "encoder_norm.weight": "encoder.final_layer_norm.weight",
        "norm.weight": "decoder.final_layer_norm.weight",
        "lm_head.weight": "lm_head.weight",
    }
    for side in ("encoder", "decoder"):
        table[f"{side}_bias.weight"] = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    for layer in range(model.num_hidden_layers):
        decodes = layer >= model.num_encoder_layers
        side, block = ("decoder", layer - model.num_encoder_layers) if decodes else ("encoder", layer)
        ours, theirs = f"layers.{layer}", f"{side}.block.{block}.layer"
        mlp = f"{theirs}.{2 if decodes else 1}"
        names = {f"self_attn.{name}_proj": f"{theirs}.0.SelfAttention.{name}" for name in "qkvo"}
        names["input_layernorm"] = f"{theirs}.0.layer_norm"
        if decodes:
            names |= {f"cross_attn.{name}_proj": f"{theirs}.1.EncDecAttention.{name}" for name in "qkvo"}
            names["cross_attention_layernorm"] = f"{theirs}.1.layer_norm"
        names["post_attention_layernorm"] = f"{mlp}.layer_norm"
        names["mlp.gate_proj"] = f"{mlp}.DenseReluDense.wi_0"
        names["mlp.up_proj"] = f"{mlp}.DenseReluDense.{'wi_1' if model.gated_mlp else 'wi'}"
        names["mlp.down_proj"] = f"{mlp}.DenseReluDense.wo"
        table |= {f"{ours}.{name}.weight": f"{place}.weight" for name, place in names.items()}
    return tuple(Rule(ours, theirs) for ours, theirs in table.items())


DROPOUTS = ("embed_dropout", "attention_dropout", "hidden_dropout", "mlp_dropout", "final_dropout")


@dataclass(frozen=True)
class Layers:
    """num_layers of the encoder, and num_decoder_layers, which are as many when absent or null."""

    keys: tuple[str, ...] = ("num_layers", "num_decoder_layers")
    fields: tuple[str, ...] = ("num_hidden_layers", "num_encoder_layers")

    def load(self, given: Foreign) -> dict[str, Any]:
        encoder = given.get("num_layers", 6)
        decoder = given.get("num_decoder_layers")
        return {"num_encoder_layers": encoder, "num_hidden_layers": encoder + (encoder if decoder is None else decoder)}

    def dump(self, model: ModelConfig) -> dict[str, Any]:
        encoder = model.num_encoder_layers
        return {"num_layers": encoder, "num_decoder_layers": model.num_hidden_layers - encoder}


@dataclass(frozen=True)
class Heads:
    """num_heads: as many key/value heads."""

    keys: tuple[str, ...] = ("num_heads",)
    fields: tuple[str, ...] = ("num_attention_heads", "num_key_value_heads")

    def load(self, given: Foreign) -> dict[str, Any]:
        return dict.fromkeys(self.fields, given.get("num_heads", 8))

    def dump(self, model: ModelConfig) -> dict[str, Any]:
        heads = model.num_attention_heads
        if model.num_key_value_heads != heads:
            raise FieldFault(f"num_key_value_heads={model.num_key_value_heads} is not num_attention_heads={heads}")
        return {"num_heads": heads}


@dataclass(frozen=True)
class FeedForward:
    """feed_forward_proj: an activation, or gated- and one, where gated-gelu is the tanh approximation."""

    keys: tuple[str, ...] = ("feed_forward_proj", "dense_act_fn", "is_gated_act")
    fields: tuple[str, ...] = ("hidden_act", "gated_mlp")

    def load(self, given: Foreign) -> dict[str, Any]:
        asked = given.get("feed_forward_proj", "relu")
        word = asked.removeprefix("gated-")
        gated, word = word != asked, "gelu_new" if asked == "gated-gelu" else word
        for key, value in (("dense_act_fn", word), ("is_gated_act", gated)):
            if given.get(key, value) != value:
                raise FieldFault(f"{key}={given[key]!r}, but feed_forward_proj={asked!r} means {value!r}")
        if word not in ACTIVATIONS:
            raise FieldFault(f"feed_forward_proj={asked!r} has no place here, only {', '.join(ACTIVATIONS)}")
        return {"hidden_act": ACTIVATIONS[word], "gated_mlp": gated}

    def dump(self, model: ModelConfig) -> dict[str, Any]:
        word = next(word for word, ours in ACTIVATIONS.items() if ours == model.hidden_act)
        asked = f"gated-{word}" if model.gated_mlp else word
        if asked == "gated-gelu":
            raise FieldFault("hidden_act='gelu' of a gated MLP has no word: gated-gelu is the tanh approximation")
        asked = "gated-gelu" if asked == "gated-gelu_new" else asked
        return {"feed_forward_proj": asked, "dense_act_fn": word, "is_gated_act": model.gated_mlp}


@dataclass(frozen=True)
class Head:
    """tie_word_embeddings, and whether what the head reads is scaled, which follows from it in old files."""

    keys: tuple[str, ...] = ("tie_word_embeddings", "scale_decoder_outputs")
    fields: tuple[str, ...] = ("tie_word_embeddings", "logit_scale")

    def load(self, given: Foreign) -> dict[str, Any]:
        tied = given.get("tie_word_embeddings", True)
        scaled = given.get("scale_decoder_outputs", tied)
        return {"tie_word_embeddings": tied, "logit_scale": given.get("d_model", 512) ** -0.5 if scaled else 1.0}

    def dump(self, model: ModelConfig) -> dict[str, Any]:
        scaled = model.logit_scale != 1.0
        if scaled and not math.isclose(model.logit_scale, model.hidden_size**-0.5):
            raise FieldFault(f"logit_scale={model.logit_scale} is neither 1 nor 1/sqrt(hidden_size)")
        return {"tie_word_embeddings": model.tie_word_embeddings, "scale_decoder_outputs": scaled}


FAMILY = Family(
    name="t5",
    model_type="t5",
    other_classes={"T5ForConditionalGeneration": {}},
    prefix="",
    fields=(
        Field("vocab_size", default=32128),
        Field("d_model", "hidden_size", default=512),
        Field("d_kv", "head_dim", default=64),
        Field("d_ff", "intermediate_size", default=2048),
        Layers(),
        Heads(),
        FeedForward(),
        Head(),
        Field("relative_attention_num_buckets", default=32),
        Field("relative_attention_max_distance", default=128),
        Field("layer_norm_epsilon", "norm_eps", default=1e-6),
        Switch("dropout_rate", DROPOUTS, default=0.1),
        TokenId("bos_token_id"),
        TokenId("eos_token_id", default=1),
        TokenId("pad_token_id", default=0),
        Fixed("is_encoder_decoder", (True,)),
        Fixed("is_decoder", (False,)),
    ),
    features={
        "norm": "rmsnorm",
        "position_embedding": "relative",
        "query_pre_attn_scalar": 1,
    },
    unused=("rope_theta",),
    training_only={"max_position_embeddings": 2048, "initializer_range": 0.02, "scale_residual_init": False},
    harmless=("initializer_factor", "classifier_dropout", "n_positions", "output_past"),
    rules=rules,
    ignored=(
        IgnoredTensor(
            "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight", "is not read by the model"
        ),
    ),
    repeats={
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
        "lm_head.weight": "shared.weight",
    },
)
