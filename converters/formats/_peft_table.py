"""Where adapters lie in a PEFT folder: modules of the family's table, and what adapter_config.json says of them.

A family that keeps several projections in one fused tensor has one adapter for them all. Ours are stacked into it
exactly: A = [A_q; A_k; A_v] and B block-diagonal, of rank 3 r, which `rank_pattern` and `alpha_pattern` say.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any, Final

import numpy as np

from converters.auto import auto_class
from converters.family import Family
from converters.rules import TRANSPOSE, Rule, pull
from workbench.errors import ConversionError
from workbench.spec.geometry import Box
from workbench.spec.layout import ParallelLayout
from workbench.spec.lora import (
    EMBEDDING,
    MAGNITUDE,
    LoraSpec,
    adapted_pairs,
    factor_names,
    judging_specs,
    merged_model,
    module_of,
)
from workbench.spec.model import ModelConfig

PREFIX: Final = "base_model.model."
CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
_TASKS: Final = {
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
    "AutoModel": "FEATURE_EXTRACTION",
}


@dataclass(frozen=True)
class PeftModule:
    """One adapted module of a transformers model. parts: (logical weight, where each of its rows is in the output).

    rank, alpha: of its one adapter. Of an embedding the inputs are its ids, and the parts are columns.
    """

    path: str
    inputs: int
    outputs: int
    parts: tuple[tuple[str, np.ndarray], ...]
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    is_embedding: bool = False

    @property
    def covers(self) -> bool:
        """Whether its parts are all of its rows."""
        return sum(len(rows) for _, rows in self.parts) == self.outputs

    @property
    def keys(self) -> tuple[str, str]:
        """The names of A and B in the file."""
        if self.is_embedding:
            return f"{PREFIX}{self.path}.lora_embedding_A", f"{PREFIX}{self.path}.lora_embedding_B"
        a, b = factor_names(f"{PREFIX}{self.path}.weight")
        return a, b

    @property
    def magnitude_key(self) -> str:
        """The name of its magnitudes in the file."""
        return f"{PREFIX}{self.path}.{MAGNITUDE}"

    def shape(self, *, rslora: bool) -> tuple[int, float]:
        """(rank, alpha) that scale the stacked adapter as each of its pairs; ConversionError when those differ."""
        rank = sum(self.ranks)
        growth = math.sqrt if rslora else float
        alphas = {alpha * growth(rank / r) for alpha, r in zip(self.alphas, self.ranks, strict=True)}
        if len(alphas) > 1:
            raise ConversionError(
                f"{self.path}: one module here, whose projections are scaled in different ways; give them one alpha"
            )
        return rank, alphas.pop()


def peft_modules(family: Family, model: ModelConfig, lora: LoraSpec) -> list[PeftModule]:
    """Every module that `lora` adapts, in network order; ConversionError for what peft does not adapt like this."""
    rules = family.bind(merged_model(model, lora))
    found: dict[str, PeftModule] = {}
    for pair in adapted_pairs(model, lora, ParallelLayout()):
        for part in pair.parts:
            if ".experts." in part.name:
                raise ConversionError(
                    f"{part.name}: transformers keeps the experts of a layer in one parameter, to which these adapters "
                    "are not written; merge them and export --to hf"
                )
            name = module_of(part.name)
            module = _module(part.name, rules[part.name], part.shape, lora.rank_of(name), lora.alpha_of(name))
            before = found.get(module.path)
            if before is not None:
                module = replace(
                    module,
                    parts=(*before.parts, *module.parts),
                    ranks=(*before.ranks, *module.ranks),
                    alphas=(*before.alphas, *module.alphas),
                )
            found[module.path] = module
    for module in found.values():
        if lora.dora and not module.covers:
            raise ConversionError(
                f"{module.path}: holds more than {', '.join(name for name, _ in module.parts)}, and magnitudes (dora) "
                "are of all its rows; adapt all of it, or merge"
            )
    return list(found.values())


def _module(name: str, rule: Rule, shape: tuple[int, ...], r: int, alpha: float) -> PeftModule:
    """The module in which a weight of this shape lies, with that part alone; ConversionError if its inputs are
    reordered, as those of its adapter then would be."""
    foreign, path = rule.foreign_shape(shape), rule.foreign.removesuffix(".weight")
    if name == f"{EMBEDDING}.weight":
        if rule.view:
            raise ConversionError(f"{name}: this family stores it otherwise; its adapters cannot be written")
        columns = ((name, np.arange(shape[1])),)
        return PeftModule(path, shape[0], shape[1], columns, (r,), (alpha,), is_embedding=True)
    out = 1 if TRANSPOSE in rule.view else 0
    numbers = [np.arange(size).reshape([-1, 1] if dim == 0 else [1, -1]) for dim, size in enumerate(foreign)]
    rows, inputs = (np.broadcast_to(numbers[dim], foreign) for dim in (out, 1 - out))
    first_column, first_row = Box((0, 0), (shape[0], 1)), Box((0, 0), (1, shape[1]))
    if not np.array_equal(pull(rule.view, first_row, lambda box: inputs[box.slices])[0], np.arange(shape[1])):
        raise ConversionError(f"{name}: this family reorders its inputs; its adapters cannot be written")
    places = pull(rule.view, first_column, lambda box: rows[box.slices])[:, 0]
    return PeftModule(path, foreign[1 - out], foreign[out], ((name, places),), (r,), (alpha,))


def judging_keys(family: Family, model: ModelConfig) -> dict[str, str]:
    """The names in the file of what is trained whole beside the adapters, by logical name."""
    rules, found = family.bind(model), {}
    for spec in judging_specs(model, ParallelLayout()):
        rule = rules[spec.path]
        if rule.view:
            raise ConversionError(f"{spec.path}: this family stores it otherwise; it cannot be kept with an adapter")
        found[spec.path] = f"{PREFIX}{rule.foreign}"
    return found


def stored_transposed(family: Family, model: ModelConfig, modules: Sequence[PeftModule]) -> bool:
    """Whether the family keeps these weights as (in, out); ConversionError when it does for some and not for others."""
    rules = family.bind(model)
    found = {TRANSPOSE in rules[module.parts[0][0]].view for module in modules if not module.is_embedding}
    if len(found) > 1:
        raise ConversionError(f"family {family.name!r} stores some adapted weights transposed and others not")
    return True in found


def adapter_config(family: Family, model: ModelConfig, lora: LoraSpec, *, base: str) -> dict[str, Any]:
    """adapter_config.json: every module is named as far as needed, and nothing is left to a default that matters."""
    modules = peft_modules(family, model, lora)
    shapes = {module.path: module.shape(rslora=lora.rslora) for module in modules}
    names = _target_names(family, merged_model(model, lora), shapes)
    by_name = {names[path]: shape for path, shape in shapes.items()}
    saved = {key.removeprefix(PREFIX).rpartition(".")[0] for key in judging_keys(family, model).values()}
    return {
        "peft_type": "LORA",
        "task_type": _TASKS.get(auto_class(model).name),
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
        "r": lora.r,
        "lora_alpha": _number(lora.alpha),
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(set(names.values())),
        "modules_to_save": sorted(saved) or None,
        "fan_in_fan_out": stored_transposed(family, merged_model(model, lora), modules),
        "init_lora_weights": True,
        "rank_pattern": {name: rank for name, (rank, _) in by_name.items() if rank != lora.r},
        "alpha_pattern": {name: _number(alpha) for name, (_, alpha) in by_name.items() if alpha != lora.alpha},
        "layers_to_transform": None,
        "layers_pattern": None,
        "peft_version": metadata.version("peft"),
    }


def _target_names(family: Family, model: ModelConfig, shapes: Mapping[str, tuple[int, float]]) -> dict[str, str]:
    """The shortest end of each module's path that stands for modules adapted alike, and for no others."""
    weights = {rule.foreign for rule in family.bind(model).values() if rule.foreign.endswith(".weight")}
    kinds: dict[str, set[tuple[int, float] | None]] = {}
    for path in (weight.removesuffix(".weight") for weight in weights):
        for end in _ends(path):
            kinds.setdefault(end, set()).add(shapes.get(path))
    return {path: next((end for end in _ends(path) if len(kinds[end]) == 1), path) for path in shapes}


def _ends(path: str) -> Iterator[str]:
    """The last word of a path, the last two, and so on."""
    words = path.split(".")
    return (".".join(words[-count:]) for count in range(1, len(words) + 1))


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value
