"""Where adapters lie in a PEFT folder: modules of the family's table, and adapter_config.json in both directions.

A family that keeps several projections in one fused tensor has one adapter for them all. Ours are stacked into it
exactly: A = [A_q; A_k; A_v] and B block-diagonal, of rank 3 r, which `rank_pattern` and `alpha_pattern` say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any, Final

import numpy as np

from converters.family import Family
from converters.names import fold
from converters.rules import TRANSPOSE, Rule, pull
from workbench.errors import ConversionError
from workbench.spec.geometry import Box
from workbench.spec.layout import ParallelLayout
from workbench.spec.lora import LoraSpec, factor_names, layer_pairs
from workbench.spec.model import ModelConfig

PREFIX: Final = "base_model.model."
CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
HEAD: Final = "score"
# What a LoRA configuration may say besides what `lora_of` reads, and the values that change nothing.
_INERT: Final[Mapping[str, tuple[Any, ...]]] = {
    "bias": ("none",),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "layers_to_transform": (None,),
    "layers_pattern": (None,),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "exclude_modules": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (False, None, {}),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "megatron_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
}


@dataclass(frozen=True)
class PeftModule:
    """One adapted module of a transformers model. parts: (logical weight, where each of its rows is in the output)."""

    path: str
    inputs: int
    outputs: int
    parts: tuple[tuple[str, np.ndarray], ...]

    @property
    def stacked(self) -> bool:
        """Whether several of our pairs, or one that covers part of the rows, make up the one adapter here."""
        return len(self.parts) > 1 or len(self.parts[0][1]) != self.outputs

    @property
    def leaf(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def keys(self) -> tuple[str, str]:
        """The names of A and B in the file."""
        a, b = factor_names(f"{PREFIX}{self.path}.weight")
        return a, b


def peft_modules(family: Family, model: ModelConfig, lora: LoraSpec) -> list[PeftModule]:
    """Every module that `lora` adapts, in network order."""
    rules = family.bind(model)
    pairs = (
        pair for layer in range(model.num_hidden_layers) for pair in layer_pairs(model, lora, ParallelLayout(), layer)
    )
    found: dict[str, PeftModule] = {}
    for part in (part for pair in pairs for part in pair.parts):
        module = _module(part.name, rules[part.name], part.shape)
        before = found.get(module.path)
        found[module.path] = replace(module, parts=(*(before.parts if before else ()), *module.parts))
    return list(found.values())


def _module(name: str, rule: Rule, shape: tuple[int, ...]) -> PeftModule:
    """The module in which a weight of this shape lies, with that part alone; ConversionError if its inputs are
    reordered, as those of its adapter then would be."""
    foreign, out = rule.foreign_shape(shape), 1 if TRANSPOSE in rule.view else 0
    numbers = [np.arange(size).reshape([-1, 1] if dim == 0 else [1, -1]) for dim, size in enumerate(foreign)]
    rows, inputs = (np.broadcast_to(numbers[dim], foreign) for dim in (out, 1 - out))
    first_column, first_row = Box((0, 0), (shape[0], 1)), Box((0, 0), (1, shape[1]))
    if not np.array_equal(pull(rule.view, first_row, lambda box: inputs[box.slices])[0], np.arange(shape[1])):
        raise ConversionError(f"{name}: this family reorders its inputs; its adapters cannot be written")
    places = pull(rule.view, first_column, lambda box: rows[box.slices])[:, 0]
    return PeftModule(rule.foreign.removesuffix(".weight"), foreign[1 - out], foreign[out], ((name, places),))


def stored_transposed(family: Family, model: ModelConfig, modules: Sequence[PeftModule]) -> bool:
    """Whether the family keeps these weights as (in, out); ConversionError when it does for some and not for others."""
    rules = family.bind(model)
    found = {TRANSPOSE in rules[module.parts[0][0]].view for module in modules}
    if len(found) > 1:
        raise ConversionError(f"family {family.name!r} stores some adapted weights transposed and others not")
    return found.pop()


def adapter_config(family: Family, model: ModelConfig, lora: LoraSpec, *, base: str) -> dict[str, Any]:
    """adapter_config.json: every module is named as far as needed, and nothing is left to a default that matters."""
    modules = peft_modules(family, model, lora)
    names = _target_names(family, model, modules)
    stacked = {names[module.path]: len(module.parts) for module in modules if module.stacked}
    growth = math.sqrt if lora.rslora else float
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if model.num_labels else "CAUSAL_LM",
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
        "r": lora.r,
        "lora_alpha": _number(lora.alpha),
        "use_rslora": lora.rslora,
        "use_dora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(set(names.values())),
        "modules_to_save": [HEAD] if model.num_labels else None,
        "fan_in_fan_out": stored_transposed(family, model, modules),
        "init_lora_weights": True,
        "rank_pattern": {name: lora.r * count for name, count in stacked.items()},
        "alpha_pattern": {name: _number(lora.alpha * growth(count)) for name, count in stacked.items()},
        "layers_to_transform": None,
        "layers_pattern": None,
        "peft_version": metadata.version("peft"),
    }


def _target_names(family: Family, model: ModelConfig, modules: Sequence[PeftModule]) -> dict[str, str]:
    """The shortest name of each module that matches no module besides: its leaf, or the leaf with its parent."""
    adapted = {fold(module.path) for module in modules}
    weights = {rule.foreign for rule in family.bind(model).values() if rule.foreign.endswith(".weight")}
    others = {fold(weight.removesuffix(".weight")) for weight in weights} - adapted
    found = {}
    for module in modules:
        words = module.path.split(".")
        for count in range(1, len(words) + 1):
            name = ".".join(words[-count:])
            if not any(path == name or path.endswith(f".{name}") for path in others):
                found[module.path] = name
                break
    shared = {name for name in found.values() if len({fold(path) for path, n in found.items() if n == name}) > 1}
    # A pattern of ranks must not reach a module of another kind, so kinds that share a leaf are told apart.
    return {path: ".".join(path.split(".")[-2:]) if name in shared else name for path, name in found.items()}


def lora_of(config: Mapping[str, Any], where: str) -> tuple[int, float, bool]:
    """(r, alpha, rslora) of a configuration; ConversionError names every feature that has no place here."""
    faults = [] if config.get("peft_type") == "LORA" else [f"peft_type={config.get('peft_type')!r}, only 'LORA'"]
    faults += [f"{k}={config[k]!r}" for k, inert in _INERT.items() if k in config and config[k] not in inert]
    saved = config.get("modules_to_save")
    if saved and not set(saved) <= {HEAD, "classifier"}:
        faults.append(f"modules_to_save={saved!r}, only {HEAD!r}")
    r, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    if type(r) is not int or r < 1 or not isinstance(alpha, int | float):
        faults.append(f"r={r!r} with lora_alpha={alpha!r}")
    if faults:
        raise ConversionError(f"{where}: has no place here for: {'; '.join(faults)}")
    return r, float(alpha), bool(config.get("use_rslora", False))


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value
