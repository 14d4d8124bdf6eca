"""Strict, frozen configuration objects, and the way from a TOML file to one of them."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Tag,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
)
from pydantic_core import PydanticCustomError

from workbench.config_faults import explain, nearest, shown
from workbench.errors import ConfigError
from workbench.toml_lines import key_lines


class Config(BaseModel):
    """Base of every configuration table: values never change, unknown keys are refused, text is never coerced."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @field_validator("*", mode="wrap")
    @classmethod
    def _refuse_coercion(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        parsed = handler(value)
        if _coerced(value, parsed):
            wanted = "true or false" if isinstance(parsed, bool) else "a number"
            raise PydanticCustomError("coerced", "must be {wanted}", {"wanted": wanted})
        return parsed


def _coerced(value: Any, parsed: Any) -> bool:
    """Whether text became a number, or a number a truth value, on the way."""
    if isinstance(value, list | tuple) and isinstance(parsed, list | tuple) and len(value) == len(parsed):
        return any(_coerced(one, other) for one, other in zip(value, parsed, strict=True))
    if isinstance(parsed, bool) or isinstance(value, bool):
        return isinstance(parsed, bool | int | float) and type(value) is not type(parsed)
    return isinstance(value, str) and isinstance(parsed, int | float)


def table_by_kind(tables: Mapping[str, type[Config]]) -> Any:
    """The annotation of a table that is one of `tables`, told apart by its key `kind`."""
    tagged = [Annotated[table, Tag(name)] for name, table in tables.items()]
    return Annotated[reduce(or_, tagged), Discriminator(_kind)]


def _kind(value: Any) -> Any:
    return value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)


C = TypeVar("C", bound=Config)
Presets = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Table -> name of a preset -> the values it stands for: {"model": {"tiny": {"hidden_size": 64}}}."""


@dataclass(frozen=True)
class Loaded(Generic[C]):
    """A resolved configuration and what it was made of."""

    config: C
    path: Path | None
    text: str
    overrides: tuple[str, ...]


def load_config(
    path: Path | str | None, model: type[C], overrides: Sequence[str] = (), presets: Presets | None = None
) -> Loaded[C]:
    """The configuration of `path` under `overrides` ("optim.lr=3e-4"): defaults < preset < file < overrides.

    Raises one ConfigError that lists every fault, each with file and line, or with the override it stands in.
    """
    path = Path(path) if path is not None else None
    text = _read(path) if path is not None else ""
    data = _parse(path, text)
    places = Places(path, key_lines(text))
    faults = [fault for word in overrides if (fault := _override(data, word, places))]
    unfilled = set()
    for table, known in (presets or {}).items():
        if fault := _preset(data, table, known, model, places):
            faults.append(fault)
            unfilled.add(table)
    try:
        config = model.model_validate(data)
    except ValidationError as error:
        # What an unknown preset would have filled in is missing because of that, and not a fault of its own.
        found = [one for one in explain(error, data, model) if not (one.is_missing and one.where[0] in unfilled)]
        raise ConfigError("\n".join([*faults, *(f"{places.of(one.where)}{one.message}" for one in found)])) from None
    if faults:
        raise ConfigError("\n".join(faults))
    return Loaded(config, path, text, tuple(overrides))


def resolved_json(config: Config) -> str:
    """Every value in force, as JSON that `Model.model_validate_json` reads back."""
    return json.dumps(config.model_dump(mode="json"), indent=2) + "\n"


class Places:
    """Where each key was said: a line of the file or a word of the command line."""

    def __init__(self, path: Path | None, lines: Mapping[tuple[str | int, ...], int]) -> None:
        self._name = str(path) if path is not None else "configuration"
        self._lines = lines
        self._words: dict[tuple[str | int, ...], str] = {}

    def said_by(self, where: tuple[str | int, ...], word: str) -> None:
        self._words[where] = word

    def of(self, where: tuple[str | int, ...]) -> str:
        """'tiny.toml:7: ' for a key or the nearest table around it."""
        for length in range(len(where), 0, -1):
            if where[:length] in self._words:
                return f"{self._words[where[:length]]}: "
            if where[:length] in self._lines:
                return f"{self._name}:{self._lines[where[:length]]}: "
        return f"{self._name}: "


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; `wb init {path}` writes one to start from") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; name the TOML file in it") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}); a configuration is a TOML file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def _parse(path: Path | None, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message, _, place = str(error).partition(" (at line ")
        line = place.partition(",")[0] if place else str(text.count("\n") + 1)
        hint = "; text needs quotes" if message == "Invalid value" else ""
        raise ConfigError(f"{path}:{line}: not valid TOML: {message}{hint}") from None


def _override(data: dict[str, Any], word: str, places: Places) -> str | None:
    """Sets one `key=value` in `data`; returns the fault when it cannot be set."""
    key, equals, text = word.partition("=")
    if not equals or not all(key.strip().split(".")):
        return f"{word}: not an override; write table.key=value, for example optim.lr=3e-4"
    try:
        value = _value(text.strip())
    except tomllib.TOMLDecodeError:
        return f"{word}: {text} is not a TOML value; quote it so that the shell leaves it alone"
    where: tuple[str | int, ...] = ()
    *outer, last = key.strip().split(".")
    table: Any = data
    for name in outer:
        where = (*where, name)
        if isinstance(table, list):
            if not name.isdigit() or int(name) >= len(table):
                return f"{word}: {'.'.join(map(str, where[:-1]))} has no element {name}; it has {len(table)}, from 0"
            where = (*where[:-1], int(name))
            table = table[int(name)]
        else:
            table = table.setdefault(name, {})
        if not isinstance(table, dict | list):
            return f"{word}: {'.'.join(map(str, where))} is {shown(table)}, not a table"
    if isinstance(table, list):
        return f"{word}: {'.'.join(map(str, where))} is a list; set it whole"
    table[last] = value
    places.said_by((*where, last), word)
    return None


def _value(text: str) -> Any:
    """A TOML value, or the bare text where it is none: `name=tiny` needs no quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        if not text or text[0] in "[{\"'":
            raise
        return text


def _preset(
    data: dict[str, Any], table: str, known: Mapping[str, Mapping[str, Any]], model: type[Config], places: Places
) -> str | None:
    """Puts the values of a named preset under those of `table`; returns the fault when there is none of that name."""
    own = data.get(table)
    if not isinstance(own, dict) or "preset" not in own:
        return None
    name = own["preset"]
    if not isinstance(name, str) or name not in known:
        place = places.of((table, "preset"))
        del own["preset"]
        return f"{place}{table}.preset = {shown(name)}: no such preset{nearest(str(name), known)}"
    annotation = model.model_fields[table].annotation if table in model.model_fields else None
    if not (isinstance(annotation, type) and issubclass(annotation, BaseModel) and "preset" in annotation.model_fields):
        own = {key: value for key, value in own.items() if key != "preset"}
    data[table] = _merged(known[name], own)
    return None


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `under`, table by table."""
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged
