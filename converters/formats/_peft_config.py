"""What a PEFT folder says of its adapter, as a LoraSpec: its configuration, and which modules its tensors adapt.

peft builds what the configuration says and passes over tensors that it does not expect; here that is an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar

from pydantic import ValidationError

from converters.family import Family
from converters.formats._peft_source import Arrays
from converters.formats._peft_table import (
    CONFIG,
    PREFIX,
    PeftModule,
    adapter_config,
    has_experts_one_by_one,
    peft_modules,
)
from converters.names import summarise
from workbench.errors import ConversionError
from workbench.spec.lora import LoraSpec, adaptable_modules, leaf_of, module_of, projections
from workbench.spec.model import ModelConfig

RECORDED: Final = "workbench_lora"
"""In the metadata of the weights, for peft drops what it does not know from its configuration: the spec, whole."""
_DECISIVE: Final = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
# What a LoRA configuration may say besides what is read here, and the values that change nothing.
_INERT: Final[Mapping[str, tuple[Any, ...]]] = {
    "bias": ("none",),
    "lora_bias": (False, None),
    "layers_to_transform": (None,),
    "layers_pattern": (None,),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "exclude_modules": (None, []),
    "ensure_weight_tying": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None, {}),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "megatron_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
}
_LARGEST: Final = 1e300
T = TypeVar("T")


def spec_of(
    config: Mapping[str, Any], recorded: str | None, file: Arrays, family: Family, model: ModelConfig, where: str
) -> LoraSpec:
    """The shape of the adapter in a folder; ConversionError names every feature that has no place here, tensors that
    the configuration passes over, and ranks in which the two differ. recorded: what a folder of ours says of itself."""
    if faults := _faults(config):
        raise ConversionError(f"{where}/{CONFIG}: has no place here for: {'; '.join(faults)}")
    try:
        if recorded is not None:
            spec = LoraSpec.model_validate_json(recorded)
            ours = adapter_config(family, model, spec, base="")
            if all(config.get(key) == ours[key] for key in _DECISIVE):
                return spec
        return _foreign_spec(config, file, family, model, where)
    except re.error as error:
        raise ConversionError(f"{where}/{CONFIG}: {error.pattern!r} is no regular expression: {error}") from None
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        raise ConversionError(f"{where}/{CONFIG}: {'; '.join(faults)}") from None


def _foreign_spec(config: Mapping[str, Any], file: Arrays, family: Family, model: ModelConfig, where: str) -> LoraSpec:
    r, alpha = config.get("r", 8), float(config.get("lora_alpha", 8))
    known = _modules(config, family, model, one_by_one=has_experts_one_by_one(file))
    ours = [module for module in known if module.keys[0] in file]
    if not ours:
        some = next(iter(file), "nothing")
        raise ConversionError(
            f"{where}: adapts no projection of family {family.name!r}; it holds {some!r}, and names must begin with "
            f"{PREFIX!r}"
        )
    if passed := [module.path for module in ours if not _is_target(config, module)]:
        raise ConversionError(
            f"{where}/{CONFIG}: target_modules={config.get('target_modules')!r} passes over what the file adapts: "
            f"{summarise(passed, 'is', 'are')} not among them"
        )
    ranks = {module.path: _pattern(config.get("rank_pattern"), module.target, r) for module in ours}
    alphas = {module.path: float(_pattern(config.get("alpha_pattern"), module.target, alpha)) for module in ours}
    everything = adaptable_modules(model)
    of = {module_of(weight): module.path for module in ours for weight in module.weights}
    order = projections(model)
    targets = sorted(_by_leaf(dict.fromkeys(of, True), everything), key=lambda name: order.index(leaf_of(name)))
    return LoraSpec(
        r=r,
        alpha=alpha,
        rslora=bool(config.get("use_rslora", False)),
        dora=bool(config.get("use_dora", False)),
        targets=tuple(targets),
        rank_pattern=_by_leaf({name: ranks[path] for name, path in of.items() if ranks[path] != r}, everything),
        alpha_pattern=_by_leaf({name: alphas[path] for name, path in of.items() if alphas[path] != alpha}, everything),
    )


def _faults(config: Mapping[str, Any]) -> list[str]:
    faults = [] if config.get("peft_type") == "LORA" else [f"peft_type={config.get('peft_type')!r}, only 'LORA'"]
    faults += [f"{k}={config[k]!r}" for k, inert in _INERT.items() if k in config and config[k] not in inert]
    r, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    if type(r) is not int or r < 1 or not _is_number(alpha):
        faults.append(f"r={r!r} with lora_alpha={alpha!r}")
    faults += [
        f"{key}={config[key]!r}"
        for key in ("rank_pattern", "alpha_pattern")
        if not isinstance(config.get(key) or {}, dict) or not all(map(_is_number, (config.get(key) or {}).values()))
    ]
    return faults


def _is_number(value: Any) -> bool:
    """Whether it is one that float64 can hold: JSON integers have no bounds, and Python reads Infinity and NaN."""
    return isinstance(value, int | float) and -_LARGEST < value < _LARGEST


def _modules(config: Mapping[str, Any], family: Family, model: ModelConfig, *, one_by_one: bool) -> list[PeftModule]:
    """Every module that could be adapted here; of experts those of `target_parameters`, by which their names differ."""
    names = adaptable_modules(model)
    targets = config.get("target_parameters") or []
    if any(".experts." in name for name in names) and not one_by_one:
        experts = [m for m in peft_modules(family, model, LoraSpec(targets=tuple(names))) if m.experts]
        others = {module_of(w) for m in experts if not _ends_with(m.target, targets) for w in m.weights}
        names = [name for name in names if name not in others]
    found = peft_modules(family, model, LoraSpec(targets=tuple(names)), one_by_one=one_by_one)
    paths = [path for module in found for path in (module.path, f"{module.path}.weight")]
    if unknown := [target for target in targets if not any(_ends_with(path, [target]) for path in paths)]:
        raise ConversionError(f"{CONFIG}: target_parameters: {unknown[0]!r} has no place here")
    return found


def _is_target(config: Mapping[str, Any], module: PeftModule) -> bool:
    """Whether peft adapts the module: a list is of ends of paths, a text a regular expression."""
    targets = config.get("target_modules")
    if _ends_with(module.path if module.experts else f"{module.path}.weight", config.get("target_parameters") or ()):
        return True
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, module.path) is not None
    return _ends_with(module.path, targets or ())


def _ends_with(path: str, ends: Sequence[str]) -> bool:
    return any(path == end or path.endswith(f".{end}") for end in ends)


def _pattern(pattern: Mapping[str, T] | None, path: str, otherwise: T) -> T:
    """The value of the first key that matches `path` as in peft (utils/other.py, get_pattern_key)."""
    return next((v for key, v in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", path)), otherwise)


def _by_leaf(values: Mapping[str, T], everything: Sequence[str]) -> dict[str, T]:
    """`values` by the last word of a module's name, where all modules that end so have one; else by whole name."""
    found: dict[str, T] = {}
    for name, value in values.items():
        leaf = name.rpartition(".")[2]
        alike = all(values.get(other) == value for other in everything if other.rpartition(".")[2] == leaf)
        found[leaf if alike else name] = value
    return found
