"""Megatron's training arguments as a model, and back: every argument has a place here, or a reason not to. No torch.

Closed world, as for families: an argument that changes what the model computes becomes a feature or is refused by name
with its value; the others are on the list of reasons (`unread.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from pydantic import ValidationError

from converters.fields import Field, FieldFault, FieldRule, Fixed, Foreign
from converters.megatron.experts import Experts
from converters.megatron.features import (
    Activation,
    Biases,
    Dropout,
    HeadNorms,
    Heads,
    Norms,
    Tie,
    Vocabulary,
    Window,
)
from converters.megatron.positions import Latent, Positions
from converters.megatron.stages import KEYS as STAGE_KEYS
from converters.megatron.unread import reason
from workbench.errors import ConversionError
from workbench.spec.model import ModelConfig

ALIASES: Final[Mapping[str, str]] = {
    "layernorm_epsilon": "norm_epsilon",
    "layernorm_zero_centered_gamma": "apply_layernorm_1p",
    "num_moe_experts": "num_experts",
}
"""Names of the field in TransformerConfig, which newer versions use for the argument, and the older name."""

RULES: Final[tuple[FieldRule, ...]] = (
    Field("num_layers", "num_hidden_layers"),
    Field("hidden_size"),
    Field("ffn_hidden_size", "intermediate_size"),
    Field("max_position_embeddings"),
    Field("norm_epsilon", "norm_eps", default=1e-5),
    Field("attention_dropout", default=0.1),
    Field("init_method_std", "initializer_range", default=0.02),
    Vocabulary(),
    Heads(),
    Activation(),
    Norms(),
    HeadNorms(),
    Biases(),
    Window(),
    Dropout(),
    Tie(),
    Positions(),
    Latent(),
    Experts(),
)

_OFF: Final = (None, False, 0)
_ALWAYS_OFF: Final = """
    rotary_interleaved no_rope_freq softmax_scale qk_l2_norm attention_output_gate mrope_section
    apply_residual_connection_post_layernorm activation_func_clamp_value use_mup enable_mhc_connections
    mtp_num_layers mtp_standalone experimental_attention_variant linear_attention_freq is_hybrid_model
    hybrid_attention_ratio hybrid_mlp_ratio hybrid_layer_pattern hybrid_override_pattern heterogeneous_block_specs
    heterogeneous_layers_config_path retro_add_retriever use_legacy_models mla_down_proj_fusion moe_latent_size
    moe_apply_probs_on_input moe_token_dropping moe_expert_capacity_factor moe_router_topk_limited_devices
    moe_router_force_load_balancing moe_router_force_biased moe_mlp_glu_interleave_size
    moe_shared_expert_glu_interleave_size moe_single_grouped_weight moe_single_grouped_bias moe_extended_tp
    decoder_num_layers pipeline_model_parallel_split_rank encoder_pipeline_model_parallel_size
    encoder_tensor_model_parallel_size glu_linear_offset
"""
FIXED: Final = (
    Fixed("softmax_type", ("vanilla", None)),
    Fixed("heterogeneous_layers_config_encoded_json", (None, "")),
    *(Fixed(key, _OFF) for key in _ALWAYS_OFF.split()),
)
"""Arguments that change what the model computes, or how its files lie, and that have one value here."""

_COUNTS: Final = ("num_layers", "num_experts")
_MOST: Final = 100_000
"""More layers or experts than any model has: what is counted through before anything else is known of a file."""

# Features that no argument says: they have to be as in a GPT, which is ModelConfig's default, but for these.
_SAID_ELSEWHERE: Final[Mapping[str, str]] = {
    "scale_residual_init": "only the start of a training run reads it",
    "pad_token_id": "belongs to the tokenizer",
    "bos_token_id": "belongs to the tokenizer",
    "eos_token_id": "belongs to the tokenizer",
    "query_pre_attn_scalar": "checked with the heads",
}


@dataclass(frozen=True)
class Arguments:
    """What a checkpoint's arguments say. given: they themselves, by the names that are used here."""

    model: ModelConfig
    given: Foreign

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding, with padding."""
        return int(self.given.get("padded_vocab_size") or self.model.vocab_size)

    @property
    def notes(self) -> dict[str, str]:
        """What a reader should know of what was left out."""
        if self.given.get("vocab_size") is not None:
            return {}
        return {"vocabulary": f"{self.model.vocab_size} rows, padding included: vocab_size is not among the arguments"}


def load_arguments(given: Foreign, where: str) -> Arguments:
    """The model that training arguments describe; ConversionError with every argument that has no place."""
    given = _renamed(given, where)
    faults = [f"{key}={given[key]!r} is not 1 to {_MOST}" for key in _COUNTS if not _is_count(given.get(key))]
    if faults:
        raise ConversionError(f"{where}: {'; '.join(faults)}; the file is damaged")
    values: dict[str, Any] = {"scale_residual_init": True}
    for rule in (*RULES, *FIXED):
        try:
            values |= rule.load(given)
        except FieldFault as fault:
            faults.append(str(fault))
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
            said = ", ".join(f"{key}={given[key]!r}" for key in rule.keys if key in given)
            faults.append(f"{said or ', '.join(rule.keys)}: {error}")
    known = {key for rule in (*RULES, *FIXED) for key in rule.keys} | set(STAGE_KEYS)
    faults += [
        f"{key}={value!r} is unknown"
        for key, value in given.items()
        if key not in known and value not in _OFF and reason(key) is None
    ]
    if not faults:
        try:
            model = ModelConfig.model_validate(values)
            return Arguments(model, given)
        except ValidationError as error:
            faults = [f"{'.'.join(map(str, e['loc'])) or 'model'}: {e['msg']}" for e in error.errors()]
    raise ConversionError(f"{where}: Megatron's arguments have no place for: {'; '.join(faults)}")


def _is_count(value: Any) -> bool:
    return value is None or (type(value) is int and 0 < value <= _MOST)


def _renamed(given: Foreign, where: str) -> dict[str, Any]:
    """The arguments by the names that are used here."""
    found = {key: value for key, value in given.items() if key not in ALIASES}
    for new, old in ALIASES.items():
        if new in given and found.setdefault(old, given[new]) != given[new]:
            raise ConversionError(f"{where}: {new}={given[new]!r}, but {old}={found[old]!r}; they are one argument")
    return found


def dump_arguments(model: ModelConfig) -> dict[str, Any]:
    """The arguments that describe `model`; ConversionError with every feature that Megatron's GPT cannot have."""
    said: dict[str, Any] = {}
    faults: list[str] = []
    for rule in RULES:
        try:
            said |= rule.dump(model)
        except FieldFault as fault:
            faults.append(str(fault))
    named = {name for rule in RULES for name in rule.fields} | _SAID_ELSEWHERE.keys()
    values = model.model_dump()
    for name, field in ModelConfig.model_fields.items():
        if name not in named and values[name] != field.default:
            faults.append(f"{name}={values[name]!r} has no place, only {field.default!r}")
    if faults:
        raise ConversionError(f"Megatron's GPT cannot represent this model: {'; '.join(faults)}")
    return {**{rule.key: rule.allowed[0] for rule in FIXED}, **said}
