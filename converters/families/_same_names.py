"""Rules of families whose tensors have our names, behind `model.`, and are stored as we compute with them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from converters.family import IgnoredTensor
from converters.fields import ACTIVATIONS
from converters.rules import Rule
from workbench.spec.model import ModelConfig
from workbench.spec.schema import logical_tensors

PREFIX = "model."
HEADS = ("lm_head.weight", "score.weight", "score.bias")
INVERSE_FREQUENCIES = IgnoredTensor("model.layers.{i}.self_attn.rotary_emb.inv_freq", "computed from rope_theta")

TANH_FIRST = {"gelu_pytorch_tanh": "gelu_tanh", **ACTIVATIONS}
"""The words for an activation, where the first one for the tanh approximation is written."""


def rules(model: ModelConfig) -> tuple[Rule, ...]:
    """Where each logical tensor lies."""
    names = {re.sub(r"^layers\.\d+\.", "layers.{i}.", name) for name in logical_tensors(model, "F32")}
    return tuple(Rule(name, name if name in HEADS else PREFIX + name) for name in sorted(names))


def derived_head_dim(given: Mapping[str, Any]) -> int:
    """The size of a head in a configuration that does not say it."""
    return int(given["hidden_size"]) // int(given["num_attention_heads"])


def even_heads_faults(model: ModelConfig) -> list[str]:
    """Why transformers would refuse this model (`validate_architecture` of several configurations)."""
    if model.hidden_size % model.num_attention_heads:
        return [f"hidden_size={model.hidden_size} is not a multiple of num_attention_heads={model.num_attention_heads}"]
    return []
