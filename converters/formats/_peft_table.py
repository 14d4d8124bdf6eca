"""Where adapters lie in a PEFT folder: modules of the family's table, and what adapter_config.json says of them.

A family that keeps several projections in one fused tensor has one adapter for them all. Ours are stacked into it
exactly: A = [A_q; A_k; A_v] and B block-diagonal, of rank 3 r, which `rank_pattern` and `alpha_pattern` say.

transformers keeps the experts of a layer in two parameters, `gate_up_proj` and `down_proj`, whose adapters peft finds
by `target_parameters`. Where both are adapted, the wrapper of the second is around that of the first, which the file
then calls `base_layer` (peft, tuners/lora/layer.py, ParamWrapper). transformers 4 had a module for each projection of
each expert, as the files of models still have; folders of that time are read (`one_by_one`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
_GATE_UP: Final = "gate_up_proj"
_DOWN: Final = "down_proj"
_NAMES_OF_EXPERTS: Final = ("gate_proj", "up_proj", _DOWN)
_ONE_EXPERT: Final = re.compile(r"\.experts\.\d+\.")
_TASKS: Final = {
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
    "AutoModel": "FEATURE_EXTRACTION",
}


@dataclass(frozen=True)
class PeftModule:
    """One adapted module of a transformers model. parts: (logical weight, where each of its rows is in the output).

    rank, alpha: of its one adapter. Of an embedding the inputs are its ids, and the parts are columns. experts: of a
    parameter of several, what each has of it, in order; the parts are theirs. holder: what the file calls it, if not by
    its path. by_parameter: whether peft finds it among parameters and not among modules.
    """

    path: str
    inputs: int
    outputs: int
    parts: tuple[tuple[str, np.ndarray], ...]
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    is_embedding: bool = False
    experts: tuple[PeftModule, ...] = ()
    holder: str = ""
    by_parameter: bool = False

    @property
    def target(self) -> str:
        """What peft knows it by."""
        return f"{self.path}.weight" if self.by_parameter and not self.experts else self.path

    @property
    def weights(self) -> list[str]:
        """The logical weights in it."""
        return [weight for own in self.experts or (self,) for weight, _ in own.parts]

    @property
    def covers(self) -> bool:
        """Whether its parts are all of its rows."""
        return sum(len(rows) for _, rows in self.parts) == self.outputs

    @property
    def keys(self) -> tuple[str, str]:
        """The names of A and B in the file."""
        if self.is_embedding:
            return f"{PREFIX}{self.path}.lora_embedding_A", f"{PREFIX}{self.path}.lora_embedding_B"
        a, b = factor_names(f"{PREFIX}{self.holder or self.path}.weight")
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


def peft_modules(family: Family, model: ModelConfig, lora: LoraSpec, *, one_by_one: bool = False) -> list[PeftModule]:
    """Every module that `lora` adapts, in network order; ConversionError for what peft does not adapt like this."""
    rules = weight_rules(family, merged_model(model, lora), one_by_one=one_by_one)
    found: dict[tuple[str, int], PeftModule] = {}
    for pair in adapted_pairs(model, lora, ParallelLayout()):
        for part in pair.parts:
            name = module_of(part.name)
            module, expert = _module(part.name, rules[part.name], part.shape, lora.rank_of(name), lora.alpha_of(name))
            if ".experts." in name and expert < 0 and not one_by_one:
                raise ConversionError(
                    f"{part.name}: peft adapts experts in one parameter a layer, which this family has not"
                )
            before = found.get((module.path, expert))
            if before is not None:
                module = replace(
                    module,
                    parts=(*before.parts, *module.parts),
                    ranks=(*before.ranks, *module.ranks),
                    alphas=(*before.alphas, *module.alphas),
                )
            found[module.path, expert] = module
    modules = _by_parameter(found) if model.moe and not one_by_one else list(found.values())
    for module in modules:
        if lora.dora and module.by_parameter:
            raise ConversionError(f"{module.path}: peft adapts it as a parameter, without magnitudes (dora); merge it")
        if lora.dora and not module.covers:
            raise ConversionError(
                f"{module.path}: holds more than {', '.join(name for name, _ in module.parts)}, and magnitudes (dora) "
                "are of all its rows; adapt all of it, or merge"
            )
    return modules


def weight_rules(family: Family, model: ModelConfig, *, one_by_one: bool = False) -> Mapping[str, Rule]:
    """Where each weight lies in a model of transformers: experts of a layer in one tensor, unlike in its files."""
    return family.bind(model, None if one_by_one or family.also_read is None else family.also_read(model))


def has_experts_one_by_one(keys: Iterable[str]) -> bool:
    """Whether a file has a pair for each projection of an expert."""
    return any(_ONE_EXPERT.search(key) for key in keys)


def _by_parameter(found: Mapping[tuple[str, int], PeftModule]) -> list[PeftModule]:
    """The modules of a model with experts, those of each parameter of experts as one. Others whose names peft takes for
    those of experts (utils/transformers_weight_conversion.py) are found among parameters too."""
    experts: dict[str, list[PeftModule]] = {}
    for (path, expert), module in found.items():
        if expert >= 0:
            experts.setdefault(path, []).append(module)
    gathered: dict[str, PeftModule] = {}
    for (path, expert), module in found.items():
        if expert < 0:
            gathered[path] = replace(module, by_parameter=path.rpartition(".")[2] in _NAMES_OF_EXPERTS)
        elif path not in gathered:
            owner, _, leaf = path.rpartition(".")
            inner = leaf == _GATE_UP and f"{owner}.{_DOWN}" in experts
            holder = f"{owner}.base_layer" if inner else owner
            gathered[path] = replace(module, experts=tuple(experts[path]), holder=holder, by_parameter=True)
    return list(gathered.values())


def _module(name: str, rule: Rule, shape: tuple[int, ...], r: int, alpha: float) -> tuple[PeftModule, int]:
    """The module in which a weight of this shape lies, with that part alone, and which of its experts it is, or -1;
    ConversionError if its inputs are reordered, as those of its adapter then would be."""
    foreign, path = rule.foreign_shape(shape), rule.foreign.removesuffix(".weight")
    if name == f"{EMBEDDING}.weight":
        if rule.view:
            raise ConversionError(f"{name}: this family stores it otherwise; its adapters cannot be written")
        columns = ((name, np.arange(shape[1])),)
        return PeftModule(path, shape[0], shape[1], columns, (r,), (alpha,), is_embedding=True), -1
    into, out = (-2, -1) if TRANSPOSE in rule.view else (-1, -2)

    def places(dim: int, box: Box) -> np.ndarray:
        """Where on a dimension of the foreign tensor the elements of a logical box are."""
        numbers = np.arange(foreign[dim]).reshape([-1 if size == dim else 1 for size in range(-len(foreign), 0)])
        whole = np.broadcast_to(numbers, foreign)
        return pull(rule.view, box, lambda part: whole[part.slices])

    if not np.array_equal(places(into, Box((0, 0), (1, shape[1])))[0], np.arange(shape[1])):
        raise ConversionError(f"{name}: this family reorders its inputs; its adapters cannot be written")
    rows = places(out, Box((0, 0), (shape[0], 1)))[:, 0]
    expert = int(places(-3, Box((0, 0), (1, 1)))[0, 0]) if len(foreign) == 3 else -1
    return PeftModule(path, foreign[into], foreign[out], ((name, rows),), (r,), (alpha,)), expert


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
    rules = weight_rules(family, model)
    found = {TRANSPOSE in rules[module.parts[0][0]].view for module in modules if not module.is_embedding}
    if len(found) > 1:
        raise ConversionError(f"family {family.name!r} stores some adapted weights transposed and others not")
    return True in found


def adapter_config(family: Family, model: ModelConfig, lora: LoraSpec, *, base: str) -> dict[str, Any]:
    """adapter_config.json: every module is named as far as needed, and nothing is left to a default that matters."""
    modules = peft_modules(family, model, lora)
    shapes = {module.target: module.shape(rslora=lora.rslora) for module in modules}
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
        "target_modules": sorted({names[module.target] for module in modules if not module.by_parameter}),
        "target_parameters": sorted({names[module.target] for module in modules if module.by_parameter}) or None,
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
    kinds: dict[str, set[tuple[int, float] | None]] = {}
    for rule in weight_rules(family, model).values():
        for path in {rule.foreign, rule.foreign.removesuffix(".weight")}:
            for end in _ends(path):
                kinds.setdefault(end, set()).add(shapes.get(path))
    return {path: next((end for end in _ends(path) if len(kinds[end]) == 1), path) for path in shapes}


def _ends(path: str) -> Iterator[str]:
    """The last word of a path, the last two, and so on."""
    words = path.split(".")
    return (".".join(words[-count:]) for count in range(1, len(words) + 1))


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value
