"""The keys of a foreign configuration that describe experts, and experts stacked in one tensor. No torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from converters.fields import FieldFault, Foreign
from converters.rules import Merge, Rule, Slice
from workbench.spec.model import ModelConfig
from workbench.spec.moe import MixtureOfExperts

TRAINING_ONLY: Final = ("router_aux_loss_coef", "router_z_loss_coef", "bias_update_rate")
"""What of the experts only training reads: a family that cannot say one leaves it out, and the export says so."""
BALANCE: Final = "router_aux_loss_coef"
BALANCES: Final = "output_router_logits"
"""transformers adds the loss of `BALANCE` only where this is true (models/mixtral, MixtralForCausalLM.forward)."""


@dataclass(frozen=True)
class Experts:
    """`ModelConfig.moe`, one key for each of its fields that the family can say.

    words: the key of a field. defaults: the foreign program's own, by field. features: fields that have one value in
    this family; what is named nowhere has its default. aliases: other keys that mean the same, by key.
    """

    words: Mapping[str, str]
    defaults: Mapping[str, Any]
    features: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    fields: tuple[str, ...] = ("moe",)

    @property
    def keys(self) -> tuple[str, ...]:
        return (*self.words.values(), *self.aliases, *([BALANCES] if BALANCE in self.words else []))

    def load(self, given: Foreign) -> dict[str, Any]:
        named = {self.aliases[key]: given[key] for key in self.aliases if key in given}
        if clash := [key for key, value in named.items() if given.get(key, value) != value]:
            raise FieldFault(f"{clash[0]} is given as {given[clash[0]]} and as {named[clash[0]]}")
        said = {**named, **{key: given[key] for key in self.words.values() if given.get(key) is not None}}
        moe = {**self.features, **{name: said.get(key, self.defaults[name]) for name, key in self.words.items()}}
        moe = {name: tuple(value) if isinstance(value, list) else value for name, value in moe.items()}
        if BALANCE in moe and not given.get(BALANCES):
            moe[BALANCE] = 0.0
        return {"moe": moe}

    def dump(self, model: ModelConfig) -> dict[str, Any]:
        if model.moe is None:
            raise FieldFault("moe=None: this family has experts")
        values = model.moe.model_dump()
        usual = {name: info.default for name, info in MixtureOfExperts.model_fields.items()} | dict(self.features)
        for name, value in values.items():
            if name not in self.words and name not in TRAINING_ONLY and value != usual[name]:
                raise FieldFault(f"moe.{name}={value!r} has no place, only {usual[name]!r}")
        said = {key: list(v) if isinstance(v := values[name], tuple) else v for name, key in self.words.items()}
        if BALANCE not in self.words:
            return said
        off = {} if values[BALANCE] else {self.words[BALANCE]: self.defaults[BALANCE]}
        return {**said, **off, BALANCES: not off}


def stacked(rules: Callable[[ModelConfig], tuple[Rule, ...]]) -> Callable[[ModelConfig], tuple[Rule, ...]]:
    """The rules of files in which all experts of a layer are one tensor, as transformers 5 has them in memory:
    `mlp.experts.gate_up_proj` [experts, gate then up, hidden] and `mlp.experts.down_proj` [experts, hidden, width]."""

    def stack(model: ModelConfig) -> tuple[Rule, ...]:
        return tuple(_stacked(rule, model) for rule in rules(model))

    return stack


def _stacked(rule: Rule, model: ModelConfig) -> Rule:
    found = re.fullmatch(r"layers\.\{i\}\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight", rule.logical)
    if found is None or model.moe is None:
        return Rule(rule.logical, rule.foreign.replace("block_sparse_moe", "mlp"), rule.view)
    one, width = Slice(0, int(found[1]), 1, model.moe.num_experts), model.moe.moe_intermediate_size
    base = "model.layers.{i}.mlp.experts"
    if found[2] == "down":
        return Rule(rule.logical, f"{base}.down_proj", (one, Merge(0, (1, model.hidden_size))))
    half = Slice(1, width * (found[2] == "up"), width, 2 * width)
    return Rule(rule.logical, f"{base}.gate_up_proj", (one, half, Merge(0, (1, width))))
