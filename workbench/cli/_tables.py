"""The configuration as tables of keys: one description that the template, the schema and docs/config.md are made of."""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from workbench.config import Config

KINDS = ("pretrain", "finetune")
_WORDS = {int: "whole number", float: "number", bool: "true or false", str: "text", Path: "path"}
_BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


@dataclass(frozen=True)
class Key:
    """One key of a table. `default` is TOML text; None when there is no default, '' when it is 'not set'."""

    name: str
    kind: str
    default: str | None
    help: str


@dataclass(frozen=True)
class Table:
    """One table: its TOML header, what it is for, and its keys. The top of a file has the header ''; a list of tables
    has its own brackets, '[data.train]'. A table that may be of several kinds is there once for each."""

    header: str
    help: str
    keys: tuple[Key, ...]


def models() -> dict[str, type[Config]]:
    """The configuration classes by the command that reads them."""
    from finetune.config import FinetuneConfig
    from pretrain.config import PretrainConfig

    return {"pretrain": PretrainConfig, "finetune": FinetuneConfig}


def presets() -> dict[str, Any]:
    """The presets of every table, as `load_config` takes them."""
    from pretrain.presets import PRESETS

    return {"model": PRESETS}


def kind_of(path: Path) -> Literal["pretrain", "finetune"]:
    """Which command a file is for: fine-tuning files name a base, a task or a method."""
    import tomllib

    try:
        named = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "pretrain"  # whoever loads it says what is wrong with it
    return "finetune" if {"base", "task", "method"} & set(named) else "pretrain"


def tables(model: type[Config], header: str = "") -> Iterator[Table]:
    """The tables of a configuration class, the outer before the inner, in the order of its fields."""
    own, inner = [], []
    for name, field in model.model_fields.items():
        path = f"{header}.{name}" if header else name
        found = list(_inner_models(field.annotation))
        is_list = _is_list(field.annotation)
        if is_list or not found:
            own.append(_key(name, field))
        for one in found:
            inner += list(tables(one, f"[{path}]" if is_list else path))
    own.sort(key=lambda key: key.name != "kind")
    yield Table(header, _first_paragraph(model.__doc__), tuple(own))
    yield from inner


def _key(name: str, field: FieldInfo) -> Key:
    default = None
    if not field.is_required():
        value = field.get_default(call_default_factory=True)
        default = "" if value is None else toml(value)
    limits = [
        f"{word} {_short(getattr(rule, short))}"
        for rule in field.metadata
        for short, word in _BOUNDS.items()
        if getattr(rule, short, None) is not None
    ]
    return Key(name, ", ".join([_kind(field.annotation), *limits]), default, _sentence(field.description or ""))


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("." if text and text[-1] not in ".:" else "")


def _short(number: float) -> str:
    return f"{number:g}"


def _kind(annotation: Any) -> str:
    """A type in words: 'whole number', '"auto" or whole number', 'list of numbers'."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in _WORDS:
        return _WORDS[annotation]
    if origin is Literal:
        return " or ".join(toml(choice) for choice in arguments)
    if origin is typing.Annotated:
        return _kind(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_kind(one) for one in arguments if one is not type(None)))
    if origin in (tuple, list):
        inner = _kind(arguments[0])
        return f"list of {inner}" if inner.endswith("text") else f"list of {inner}s"
    if origin is dict or list(_inner_models(annotation)):
        return "table"
    return getattr(annotation, "__name__", str(annotation))


def _inner_models(annotation: Any) -> Iterator[type[Config]]:
    from pydantic import BaseModel

    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield typing.cast("type[Config]", annotation)
    for argument in typing.get_args(annotation):
        yield from _inner_models(argument)


def _is_list(annotation: Any) -> bool:
    origin = typing.get_origin(annotation)
    if origin in (tuple, list):
        return True
    return origin is typing.Annotated and _is_list(typing.get_args(annotation)[0])


def _first_paragraph(doc: str | None) -> str:
    """What a docstring says first, as a sentence; a header that it begins with is shown anyway."""
    text = " ".join((doc or "").strip().split("\n\n")[0].split())
    text = re.sub(r'^\[\w+\] kind = "\w+": ', "", text)
    return text[:1].upper() + text[1:]


def toml(value: Any) -> str:
    """A value as TOML text; tables inside lists become inline tables."""
    from pydantic import BaseModel

    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", exclude_none=True)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(value) if 1e-4 <= abs(value) < 1e6 or value == 0 else f"{value:g}"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml(one) for one in value) + "]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {toml(one)}" for key, one in value.items()) + " }" if value else "{}"
    return json.dumps(str(value), ensure_ascii=False)
