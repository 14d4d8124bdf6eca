"""Rotary positions in a foreign configuration: transformers 5's `rope_parameters`, and the keys of older versions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from converters.fields import FieldFault, Foreign
from workbench.spec.model import ModelConfig
from workbench.spec.rope import RopeKind, RopeScaling

_KINDS: Final[Mapping[str, RopeKind]] = {
    "linear": "linear",
    "dynamic": "by_length",
    "llama3": "by_parts",
    "yarn": "ramp",
    "longrope": "per_dimension",
    "su": "per_dimension",
}
"""transformers' words -> ours; "su" is what longrope was called at first."""
_NEEDED: Final[Mapping[RopeKind, tuple[str, ...]]] = {
    "linear": ("factor",),
    "by_length": ("factor",),
    "by_parts": ("factor", "low_freq_factor", "high_freq_factor"),
    "ramp": (),
    "per_dimension": ("short_factor", "long_factor"),
}
_ORIGINAL: Final = "original_max_position_embeddings"
_MSCALES: Final = ("mscale", "mscale_all_dim")


@dataclass(frozen=True)
class Rope:
    """Rotary base, the share of each head that turns, and scaling.

    New keys and old ones are written, so that a reader of either age sees the same frequencies. theta_keys,
    partial_keys: what the base and the share are called outside of `rope_parameters`, what is written first.
    default_partial: the share where no key says it; None: the family turns whole heads.
    """

    default_theta: float = 10000.0
    default_partial: float | None = None
    theta_keys: tuple[str, ...] = ("rope_theta",)
    partial_keys: tuple[str, ...] = ("partial_rotary_factor",)
    fields: tuple[str, ...] = ("rope_theta", "rope_scaling", "partial_rotary_factor")

    @property
    def keys(self) -> tuple[str, ...]:
        return ("rope_parameters", "rope_scaling", _ORIGINAL, *self.theta_keys, *self.partial_keys)

    def load(self, given: Foreign) -> dict[str, Any]:
        new, old = given.get("rope_parameters"), given.get("rope_scaling")
        for key, value in (("rope_parameters", new), ("rope_scaling", old)):
            if value is not None and not isinstance(value, Mapping):
                raise FieldFault(f"{key}={value!r} is not a table")
        if new and old and _scaling(new, given) != _scaling(old, given):
            raise FieldFault(f"rope_parameters={dict(new)!r} and rope_scaling={dict(old)!r} disagree")
        parameters = new or old or {}
        partial = _one("partial_rotary_factor", parameters, given, self.partial_keys)
        if partial is None:
            partial = 1.0 if self.default_partial is None else self.default_partial
        self._check_partial(partial)
        theta = _one("rope_theta", parameters, given, self.theta_keys)
        return {
            "rope_theta": self.default_theta if theta is None else theta,
            "rope_scaling": _scaling(parameters, given),
            "partial_rotary_factor": partial,
        }

    def dump(self, model: ModelConfig) -> dict[str, Any]:
        self._check_partial(model.partial_rotary_factor)
        scaling = None if model.rope_scaling is None else _said(model.rope_scaling)
        parameters = {**(scaling or {"rope_type": "default"}), "rope_theta": model.rope_theta}
        said: dict[str, Any] = {self.theta_keys[0]: model.rope_theta, "rope_scaling": scaling}
        if self.default_partial is not None:
            parameters["partial_rotary_factor"] = said[self.partial_keys[0]] = model.partial_rotary_factor
        if scaling is not None and scaling["rope_type"] == "longrope":
            # Phi3Config reads it here, and takes 4096 where it is not (standardize_rope_params).
            said[_ORIGINAL] = scaling[_ORIGINAL]
        return {"rope_parameters": parameters, **said}

    def _check_partial(self, partial: float) -> None:
        if self.default_partial is None and partial != 1:
            raise FieldFault(f"partial_rotary_factor={partial} has no place here, only 1.0")


def _one(name: str, parameters: Foreign, given: Foreign, keys: tuple[str, ...]) -> float | None:
    """The number that `name` of the table and `keys` beside it say; None when none is there."""
    said = [parameters.get(name), *(given.get(key) for key in keys)]
    found = {float(value) for value in said if value is not None}
    if len(found) > 1:
        raise FieldFault(f"{name} is given as {' and as '.join(map(str, sorted(found)))}")
    return found.pop() if found else None


def _scaling(parameters: Foreign, given: Foreign) -> RopeScaling | None:
    """The scaling of a table; what it leaves out is taken from the rest of the configuration, as transformers does."""
    values = {key: value for key, value in parameters.items() if value is not None}
    word = values.pop("rope_type", None) or values.get("type") or "default"
    for known in ("type", "rope_theta", "partial_rotary_factor"):
        values.pop(known, None)
    kind = _KINDS.get(word)
    if kind is None and word != "default":
        raise FieldFault(f"rope_type={word!r} has no place here, only default, {', '.join(_KINDS)}")
    needed: tuple[str, ...] = () if kind is None else _NEEDED[kind]
    reads = () if kind is None else RopeScaling(kind=kind).reads
    if missing := [key for key in needed if key not in values]:
        raise FieldFault(f"rope_type={word!r} lacks {', '.join(missing)}")
    if unknown := sorted(set(values) - {*reads, _ORIGINAL, *(_MSCALES if kind == "ramp" else ())}):
        raise FieldFault(f"rope_type={word!r} with {', '.join(f'{key}={values[key]}' for key in unknown)}: unknown")
    if kind is None:
        return None
    if _ORIGINAL in reads:
        values[_ORIGINAL] = given.get(_ORIGINAL) or values.get(_ORIGINAL) or given["max_position_embeddings"]
        values["factor"] = values.get("factor") or given["max_position_embeddings"] / values[_ORIGINAL]
    numerator, denominator = (values.get(name) for name in _MSCALES)
    if kind == "ramp" and "attention_factor" not in values and numerator and denominator:
        scale = RopeScaling(kind="ramp", factor=values["factor"]).attention_scale - 1
        values["attention_factor"] = (scale * numerator + 1) / (scale * denominator + 1)
    return RopeScaling.model_validate({"kind": kind, **{key: values[key] for key in reads if key in values}})


def _said(scaling: RopeScaling) -> dict[str, Any]:
    """The table of a scaling, in transformers' words."""
    word = next(word for word, kind in _KINDS.items() if kind == scaling.kind)
    values = scaling.model_dump(mode="json", include=set(scaling.reads), exclude_none=True)
    return {"rope_type": word, **{key: values[key] for key in scaling.reads if key in values}}
