"""How one or a few keys of a foreign configuration become fields of ModelConfig, and back. No torch.

Each kind of rule knows both directions. A family lists its rules; what no rule names is refused (`family.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from workbench.spec.model import ModelConfig

Foreign = Mapping[str, Any]

ACTIVATIONS: Final[Mapping[str, str]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "relu": "relu",
}
"""transformers' activation words (activations.py, ACT2CLS) -> ours."""


class FieldFault(Exception):
    """One key or field that the other side cannot represent; the family collects them into one error."""


class FieldRule(Protocol):
    """Keys of a foreign configuration and the fields of ModelConfig that say the same."""

    @property
    def keys(self) -> tuple[str, ...]: ...

    @property
    def fields(self) -> tuple[str, ...]: ...

    def load(self, given: Foreign) -> dict[str, Any]:
        """The fields of ModelConfig; FieldFault when the keys ask for what has no place there."""
        ...

    def dump(self, model: ModelConfig) -> dict[str, Any]:
        """The keys of the foreign configuration; FieldFault when they cannot say what the fields say."""
        ...


@dataclass(frozen=True)
class Field:
    """One key that is one field. `default` is the foreign program's own, for a key that is absent."""

    key: str
    field: str = ""
    default: Any = ...
    words: Mapping[str, str] | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.field or self.key,)

    def load(self, given: Foreign) -> dict[str, Any]:
        value = given.get(self.key, self.default)
        if value is ...:
            raise FieldFault(f"{self.key} is missing")
        if self.words is not None:
            if value not in self.words:
                raise FieldFault(f"{self.key}={value!r} is not one of {', '.join(self.words)}")
            value = self.words[value]
        return {self.fields[0]: value}

    def dump(self, model: ModelConfig) -> dict[str, Any]:
        value = model.model_dump()[self.fields[0]]
        if self.words is not None:
            words = [word for word, ours in self.words.items() if ours == value]
            if not words:
                raise FieldFault(f"{self.fields[0]}={value!r} has no word for {self.key}")
            value = words[0]
        return {self.key: value}


@dataclass(frozen=True)
class OptionalField:
    """A key that may be absent or null, which then means `derive(other keys)`. Always written out."""

    key: str
    derive: Callable[[Foreign], Any]
    field: str = ""

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.field or self.key,)

    def load(self, given: Foreign) -> dict[str, Any]:
        value = given.get(self.key)
        return {self.fields[0]: self.derive(given) if value is None else value}

    def dump(self, model: ModelConfig) -> dict[str, Any]:
        return {self.key: model.model_dump()[self.fields[0]]}


@dataclass(frozen=True)
class ImpliedHeadDim:
    """`head_dim` where the configuration has no such key of its own, but heeds it where heads do not share out the
    hidden size."""

    keys: tuple[str, ...] = ("head_dim",)
    fields: tuple[str, ...] = ("head_dim",)

    def load(self, given: Foreign) -> dict[str, Any]:
        value = given.get("head_dim")
        return {"head_dim": 0 if value is None else value}

    def dump(self, model: ModelConfig) -> dict[str, Any]:
        implied = model.hidden_size == model.head_dim * model.num_attention_heads
        return {} if implied else {"head_dim": model.head_dim}


@dataclass(frozen=True)
class Switch:
    """One key that stands for several fields which must agree."""

    key: str
    fields: tuple[str, ...]
    default: Any

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    def load(self, given: Foreign) -> dict[str, Any]:
        return dict.fromkeys(self.fields, given.get(self.key, self.default))

    def dump(self, model: ModelConfig) -> dict[str, Any]:
        values = [model.model_dump()[name] for name in self.fields]
        if any(value != values[0] for value in values):
            said = ", ".join(f"{name}={value}" for name, value in zip(self.fields, values, strict=True))
            raise FieldFault(f"{said}: {self.key} is one switch for both")
        return {self.key: values[0]}


@dataclass(frozen=True)
class TokenId:
    """A special token. A list (several end tokens) is represented by its first."""

    key: str
    default: int | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.key,)

    def load(self, given: Foreign) -> dict[str, Any]:
        value = given.get(self.key, self.default)
        if isinstance(value, list):
            value = value[0] if value else None
        return {self.key: value}

    def dump(self, model: ModelConfig) -> dict[str, Any]:
        return {self.key: model.model_dump()[self.key]}


@dataclass(frozen=True)
class Fixed:
    """A key that changes what the model computes and that we have just one value of."""

    key: str
    allowed: tuple[Any, ...]
    fields: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    def load(self, given: Foreign) -> dict[str, Any]:
        if self.key in given and given[self.key] not in self.allowed:
            allowed = " or ".join(repr(value) for value in self.allowed)
            raise FieldFault(f"{self.key}={given[self.key]!r} has no place here, only {allowed}")
        return {}

    def dump(self, model: ModelConfig) -> dict[str, Any]:
        return {}
