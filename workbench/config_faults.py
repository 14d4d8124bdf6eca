"""Validation errors in the words of the person who wrote the configuration."""

from __future__ import annotations

import difflib
import json
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

Where = tuple[str | int, ...]

_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text in quotes",
    "path": "a path in quotes",
    "tuple": "a list, like [1, 2]",
    "list": "a list, like [1, 2]",
    "dict": "a table",
    "model": "a table",
}
_BOUNDS = {
    "greater_than": "greater than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "multiple_of": "a multiple of {multiple_of}",
    "too_short": "at least {min_length} long",
    "too_long": "at most {max_length} long",
    "string_too_short": "text of at least {min_length} characters",
    "coerced": "{wanted}",
}


@dataclass(frozen=True)
class Fault:
    """What is wrong with one key."""

    where: Where
    message: str
    is_missing: bool = False


def explain(error: ValidationError, data: Mapping[str, Any], model: type[BaseModel]) -> list[Fault]:
    """Each fault once, in the order of the paths."""
    wanted: dict[Where, list[str]] = {}
    found: list[Fault] = []
    for fault in error.errors():
        where = _where(fault, data)
        name = ".".join(map(str, where))
        if fault["type"] == "extra_forbidden":
            found.append(Fault(where, f"{name}: unknown key{_suggestion(where, model, data)}"))
        elif fault["type"] == "missing":
            found.append(Fault(where, f"{name}: is missing, and has no default", is_missing=True))
        elif fault["type"] == "union_tag_not_found":
            found.append(Fault(where, f"{name}.kind: is missing, and has no default", is_missing=True))
        elif fault["type"] == "union_tag_invalid":
            wanted.setdefault((*where, "kind"), []).append(_choice(fault["ctx"]["expected_tags"]))
        elif fault["type"] == "value_error":
            found.append(Fault(where, (f"{name}: " if name else "") + fault["msg"].removeprefix("Value error, ")))
        else:
            wanted.setdefault(where, []).append(_allowed(fault))
    for where, choices in wanted.items():
        name, value = ".".join(map(str, where)), _at(where, data)
        found.append(Fault(where, f"{name} = {shown(value)}: must be {' or '.join(dict.fromkeys(choices))}"))
    return sorted(dict.fromkeys(found), key=lambda fault: tuple(map(str, fault.where)))


def nearest(name: str, known: Iterable[str]) -> str:
    """'; did you mean 'tp'?', or the list of what there is when it is short."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; there are: {', '.join(names)}" if 0 < len(names) <= 24 else ""


def shown(value: Any) -> str:
    """A value as one would write it in TOML, shortened."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _where(fault: ErrorDetails, data: Any) -> Where:
    """The key at fault. Names that pydantic puts in for a branch of a union are no keys, and are left out."""
    *outer, last = fault["loc"] or ("",)
    found: list[str | int] = []
    for part in outer:
        if _has(data, part):
            data = data[part]
            found.append(part)
    if last != "" and (fault["type"] == "missing" or _has(data, last)):
        found.append(last)
    return tuple(found)


def _has(data: Any, part: str | int) -> bool:
    if isinstance(data, Mapping):
        return part in data
    return isinstance(data, list | tuple) and isinstance(part, int) and part < len(data)


def _at(where: Where, data: Any) -> Any:
    for part in where:
        data = data[part] if _has(data, part) else None
    return data


def _allowed(fault: ErrorDetails) -> str:
    context: dict[str, Any] = fault.get("ctx") or {}
    if fault["type"] in ("literal_error", "enum"):
        return str(context["expected"])
    if fault["type"] in _BOUNDS:
        return _BOUNDS[fault["type"]].format(**context)
    kind = fault["type"].partition("_")[0]
    if kind in _KINDS:
        return _KINDS[kind]
    if fault["type"] == "none_required":
        return "left out"
    return fault["msg"][0].lower() + fault["msg"][1:]


def _choice(tags: str) -> str:
    """pydantic's "'a', 'b'" as "'a' or 'b'"."""
    return " or ".join(tags.split(", "))


def _suggestion(where: Where, model: type[BaseModel], data: Mapping[str, Any]) -> str:
    """The nearest key of the same table, or the same key in the table where it belongs."""
    *table, key = where
    known = {name for one in _models_at(tuple(table), model, data) for name in one.model_fields}
    if difflib.get_close_matches(str(key), known, n=1, cutoff=0.6):
        return nearest(str(key), known)
    here = ".".join(map(str, where))
    elsewhere = [path for path in _all_paths(model) if path.rpartition(".")[2] == key and path != here]
    if elsewhere:
        return f"; did you mean '{elsewhere[0]}'?"
    return nearest(str(key), known)


def _models_at(where: Where, model: type[BaseModel], data: Mapping[str, Any]) -> list[type[BaseModel]]:
    """The table classes that may stand at a path, given the `kind` that the table there has."""
    models = [model]
    for part in where:
        if isinstance(part, str):
            fields = [one.model_fields[part] for one in models if part in one.model_fields]
            models = [inner for field in fields for inner in _models_in(field.annotation)]
    table = _at(where, data)
    kind = table.get("kind") if isinstance(table, Mapping) else None
    of_that_kind = [one for one in models if "kind" in one.model_fields and one.model_fields["kind"].default == kind]
    return of_that_kind or models


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _models_in(argument)


def _all_paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        for inner in _models_in(field.annotation):
            yield from _all_paths(inner, f"{prefix}{name}.")
