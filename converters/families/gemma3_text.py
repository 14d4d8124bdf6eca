"""Gemma 3, its text model: Gemma 2 without caps of scores, but with normed heads, five sliding layers to a full one and
rotary positions of their own in those that slide (transformers, models/gemma3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from converters.families._same_names import INVERSE_FREQUENCIES, PREFIX, TANH_FIRST, even_heads_faults, rules
from converters.family import Family
from converters.fields import Field, FieldFault, Fixed, Foreign, Switch, TokenId
from converters.rope_fields import Rope
from converters.sliding import KINDS, SlidingLayers
from workbench.spec.model import ModelConfig

FULL = Rope(default_theta=1_000_000.0)


@dataclass(frozen=True)
class RopeByLayer:
    """`rope_parameters` for each kind of layer, and the keys of older files for the same."""

    keys: tuple[str, ...] = ("rope_parameters", "rope_theta", "rope_scaling", "rope_local_base_freq")
    fields: tuple[str, ...] = ("rope_theta", "rope_scaling", "rope_local_theta", "partial_rotary_factor")

    def load(self, given: Foreign) -> dict[str, Any]:
        parameters = given.get("rope_parameters") or {}
        if not isinstance(parameters, Mapping) or set(parameters) - set(KINDS):
            raise FieldFault(f"rope_parameters={parameters!r} is not a table of {' and '.join(KINDS)}")
        full, sliding = (parameters.get(kind) or {} for kind in KINDS)
        if set(sliding) - {"rope_type", "rope_theta"} or sliding.get("rope_type", "default") != "default":
            raise FieldFault(f"rope_parameters.{KINDS[1]}={dict(sliding)!r} has no place here, only a rope_theta")
        bases = {base for base in (sliding.get("rope_theta"), given.get("rope_local_base_freq")) if base is not None}
        if len(bases) > 1:
            raise FieldFault(f"the rope_theta of {KINDS[1]} is given as {' and as '.join(map(str, sorted(bases)))}")
        return {
            **FULL.load({**given, "rope_parameters": full}),
            "rope_local_theta": float(bases.pop()) if bases else 10_000.0,
        }

    def dump(self, model: ModelConfig) -> dict[str, Any]:
        if model.rope_local_theta is None:
            raise FieldFault("rope_local_theta=None has no place; give the base of the layers that slide")
        full = FULL.dump(model)["rope_parameters"]
        return {
            "rope_parameters": {
                KINDS[0]: full,
                KINDS[1]: {"rope_type": "default", "rope_theta": model.rope_local_theta},
            }
        }


FAMILY = Family(
    name="gemma3_text",
    model_type="gemma3_text",
    causal_lm="Gemma3ForCausalLM",
    sequence_classification="Gemma3TextForSequenceClassification",
    body="Gemma3TextModel",
    prefix=PREFIX,
    fields=(
        Field("vocab_size", default=262208),
        Field("hidden_size", default=2304),
        Field("intermediate_size", default=9216),
        Field("num_hidden_layers", default=26),
        Field("num_attention_heads", default=8),
        Field("num_key_value_heads", default=4),
        Field("head_dim", default=256),
        Field("max_position_embeddings", default=131072),
        Field("hidden_activation", "hidden_act", default="gelu_pytorch_tanh", words=TANH_FIRST),
        Field("rms_norm_eps", "norm_eps", default=1e-6),
        Field("tie_word_embeddings", default=True),
        Switch("attention_bias", ("attention_bias", "attention_output_bias"), default=False),
        Field("query_pre_attn_scalar", default=256),
        Field("final_logit_softcapping", default=None),
        SlidingLayers(
            26,
            lambda given, layer: (layer + 1) % given.get("sliding_window_pattern", 6) != 0,
            older=("sliding_window_pattern",),
        ),
        Field("attention_dropout", default=0.0),
        Field("initializer_range", default=0.02),
        RopeByLayer(),
        TokenId("bos_token_id", default=2),
        TokenId("eos_token_id", default=1),
        TokenId("pad_token_id", default=0),
        Fixed("attn_logit_softcapping", (None,)),
        Fixed("use_bidirectional_attention", (None, False)),
    ),
    features={
        "gated_mlp": True,
        "norm": "rmsnorm",
        "norm_placement": "sandwich",
        "norm_unit_offset": True,
        "position_embedding": "rope",
        "qk_norm": "head",
        "scale_embeddings": True,
    },
    training_only={"embed_dropout": 0.0, "hidden_dropout": 0.0, "scale_residual_init": False},
    harmless=("cache_implementation", "hidden_act", "_sliding_window_pattern"),
    rules=rules,
    ignored=(INVERSE_FREQUENCIES,),
    faults=even_heads_faults,
)
