"""Megatron's arguments for positions and for latent attention, whose rotary positions have their own. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

from converters.fields import FieldFault, Foreign
from workbench.spec.model import ModelConfig
from workbench.spec.rope import RopeScaling

LEARNED: Final = "learned_absolute"
LATENT_NORM_EPS: Final = 1e-6
"""Of the norms of latents, whatever a model's norm_eps is; Megatron has one for all norms."""
# RotaryEmbedding._apply_scaling has these as constants.
_BY_PARTS: Final = {"original_max_position_embeddings": 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@dataclass(frozen=True)
class Positions:
    """Learned positions, or rotary ones with their base, share and stretch."""

    keys: tuple[str, ...] = (
        "position_embedding_type",
        "add_position_embedding",
        "rotary_base",
        "rotary_percent",
        "rotary_seq_len_interpolation_factor",
        "use_rope_scaling",
        "rope_scaling_factor",
    )
    fields: tuple[str, ...] = ("position_embedding", "rope_theta", "partial_rotary_factor", "rope_scaling")

    def load(self, given: Foreign) -> dict[str, Any]:
        kind = given.get("position_embedding_type", LEARNED)
        if kind == LEARNED:
            return {"position_embedding": "learned"}
        if kind != "rope":
            raise FieldFault(f"position_embedding_type={kind!r} has no place here, only {LEARNED!r} or 'rope'")
        said = {
            "position_embedding": "rope",
            "rope_theta": given.get("rotary_base", 10000),
            "partial_rotary_factor": given.get("rotary_percent", 1.0),
        }
        if given.get("multi_latent_attention"):
            return said  # `Latent` says its stretch
        linear, by_parts = given.get("rotary_seq_len_interpolation_factor"), given.get("use_rope_scaling")
        if linear and by_parts:
            raise FieldFault(f"rotary_seq_len_interpolation_factor={linear} has no place with use_rope_scaling=True")
        if linear:
            said["rope_scaling"] = {"kind": "linear", "factor": linear}
        if by_parts:
            factor = given.get("rope_scaling_factor", 8.0)
            said["rope_scaling"] = {"kind": "by_parts", "factor": factor, **_BY_PARTS}
        return said

    def dump(self, model: ModelConfig) -> dict[str, Any]:
        if model.position_embedding == "learned":
            return {"position_embedding_type": LEARNED, "add_position_embedding": True, "use_rope_scaling": False}
        if model.position_embedding != "rope":
            raise FieldFault(f"position_embedding={model.position_embedding!r} has no place, only 'learned' or 'rope'")
        theta = int(model.rope_theta) if model.rope_theta.is_integer() else model.rope_theta
        said = {
            "position_embedding_type": "rope",
            "add_position_embedding": True,  # an old switch, which Megatron still compares
            "rotary_base": theta,
            "rotary_percent": model.partial_rotary_factor,
            "rotary_seq_len_interpolation_factor": None,
            "use_rope_scaling": False,
            "rope_scaling_factor": 8.0,
        }
        scaling = model.rope_scaling
        if scaling is None or model.latent is not None:
            return said
        if scaling.kind == "linear":
            return {**said, "rotary_seq_len_interpolation_factor": scaling.factor}
        if scaling.kind != "by_parts":
            raise FieldFault(f"rope_scaling.kind={scaling.kind!r} has no place, only 'linear' or 'by_parts'")
        for name, only in _BY_PARTS.items():
            if (value := scaling.model_dump()[name]) != only:
                raise FieldFault(f"rope_scaling.{name}={value} has no place, only {only}")
        return {**said, "use_rope_scaling": True, "rope_scaling_factor": scaling.factor}


@dataclass(frozen=True)
class Latent:
    """Sizes of latent attention (MLATransformerConfig) and the stretch of its rotary positions."""

    keys: tuple[str, ...] = (
        "multi_latent_attention",
        "q_lora_rank",
        "kv_lora_rank",
        "qk_head_dim",
        "qk_pos_emb_head_dim",
        "v_head_dim",
        "rope_type",
        "rotary_scaling_factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
    )
    fields: tuple[str, ...] = ("latent", "rope_scaling")

    def load(self, given: Foreign) -> dict[str, Any]:
        if not given.get("multi_latent_attention"):
            return {"latent": None}
        if (eps := given.get("norm_epsilon", 1e-5)) != LATENT_NORM_EPS:
            raise FieldFault(f"norm_epsilon={eps} has no place with multi_latent_attention, only {LATENT_NORM_EPS}")
        growth, kind = given.get("mscale_all_dim", 0.0), given.get("rope_type") or "yarn"
        said: dict[str, Any] = {
            "latent": {
                "q_lora_rank": given.get("q_lora_rank", 512),
                "kv_lora_rank": given.get("kv_lora_rank", 512),
                "qk_nope_head_dim": given.get("qk_head_dim", 128),
                "qk_rope_head_dim": given.get("qk_pos_emb_head_dim", 64),
                "v_head_dim": given.get("v_head_dim", 128),
                "mscale_all_dim": growth,
                "rope_interleave": True,
            }
        }
        if kind == "rope" and growth:
            raise FieldFault(f"mscale_all_dim={growth} has no place with rope_type='rope', only 0.0")
        if kind == "yarn":
            factor = float(given.get("rotary_scaling_factor", 40))
            scale = _growth(factor, given.get("mscale", 1.0)) / _growth(factor, growth)
            said["rope_scaling"] = {
                "kind": "ramp",
                "factor": factor,
                "original_max_position_embeddings": given.get("original_max_position_embeddings", 4096),
                "beta_fast": given.get("beta_fast", 32),
                "beta_slow": given.get("beta_slow", 1),
                "attention_factor": scale,
            }
        elif kind != "rope":
            raise FieldFault(f"rope_type={kind!r} is not one of rope, yarn")
        return said

    def dump(self, model: ModelConfig) -> dict[str, Any]:
        sizes, scaling = model.latent, model.rope_scaling
        if sizes is None:
            return {"multi_latent_attention": False}
        if model.norm_eps != LATENT_NORM_EPS:
            raise FieldFault(f"norm_eps={model.norm_eps} with latent has no place, only {LATENT_NORM_EPS}")
        said: dict[str, Any] = {
            "multi_latent_attention": True,
            "q_lora_rank": sizes.q_lora_rank,
            "kv_lora_rank": sizes.kv_lora_rank,
            "qk_head_dim": sizes.qk_nope_head_dim,
            "qk_pos_emb_head_dim": sizes.qk_rope_head_dim,
            "v_head_dim": sizes.v_head_dim,
            "mscale_all_dim": sizes.mscale_all_dim,
        }
        if scaling is None:
            return {**said, "rope_type": "rope", "mscale_all_dim": 0.0}
        if scaling.kind != "ramp" or not scaling.truncate or scaling.factor <= 1:
            raise FieldFault(f"rope_scaling={scaling.model_dump(exclude_defaults=True)} with latent has no place")
        return {
            **said,
            "rope_type": "yarn",
            "rotary_scaling_factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "mscale": _mscale(scaling, sizes.mscale_all_dim),
        }


def _growth(factor: float, mscale: float) -> float:
    """YarnRotaryEmbedding's `_yarn_get_mscale`."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _mscale(scaling: RopeScaling, all_dim: float) -> float:
    """The mscale that gives cosines and sines the scaling's attention factor, beside this mscale_all_dim."""
    if scaling.attention_scale == 1.0:
        return all_dim
    wanted = scaling.attention_scale * _growth(scaling.factor, all_dim)
    mscale = (wanted - 1.0) / (0.1 * math.log(scaling.factor))
    return float(round(mscale, 12))
