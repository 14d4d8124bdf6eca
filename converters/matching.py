"""Foreign tensors matched with the table of a family; what is left over on either side is told. No torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Final

from converters.family import Family, families
from converters.names import fold, summarise
from converters.rules import Rule
from workbench.errors import ConversionError
from workbench.spec.geometry import LogicalTensor
from workbench.spec.model import ModelConfig
from workbench.spec.schema import logical_tensors

_MAX_STACKED: Final = 1024  # experts in one tensor


@dataclass(frozen=True)
class Match:
    """Foreign tensors matched with logical ones. `places`: (name in the file, rule) of each logical tensor.

    repeated: (name, name of what it repeats) of tensors that must equal others, bit for bit, and are then dropped.
    ignored: names that carry no weights, and why. over: names that have no place.
    """

    places: Mapping[str, tuple[str, Rule]]
    schema: Mapping[str, LogicalTensor]
    repeated: tuple[tuple[str, str], ...]
    ignored: Mapping[str, str]
    over: tuple[str, ...] = ()


def match(
    family: Family,
    model: ModelConfig,
    foreign: Mapping[str, LogicalTensor],
    where: str,
    *,
    may_leave_over: bool = False,
) -> Match:
    """Which foreign tensor each logical tensor lies in.

    ConversionError unless all names and shapes match, with nothing over on either side. may_leave_over: the caller
    tells of `Match.over` itself.
    """
    if model.num_hidden_layers > len(foreign) or _experts(model) > _MAX_STACKED * len(foreign):
        raise ConversionError(
            f"{where}: {len(foreign)} tensors cannot hold num_hidden_layers={model.num_hidden_layers}"
            + (f" with num_experts={model.moe.num_experts}" if model.moe else "")
            + "; is the configuration that of these weights?"
        )
    foreign = {family.current(name): tensor for name, tensor in foreign.items()}
    bound = _bound(family, model, foreign)
    actual = _names_in_file(family, bound, foreign)
    shapes = {name: tensor.shape for name, tensor in logical_tensors(model, "F32").items()}
    faults, places, schema, used = [], {}, {}, set()
    missing = sorted({rule.foreign for rule in bound.values() if actual(rule.foreign) not in foreign})
    for name, rule in bound.items():
        found = foreign.get(actual(rule.foreign))
        if found is None:
            continue
        expected = rule.foreign_shape(shapes[name])
        if found.shape != expected:
            faults.append(f"{found.name!r} has shape {list(found.shape)}, the configuration says {list(expected)}")
        places[name] = (found.name, rule)
        schema[name] = LogicalTensor(name, shapes[name], found.dtype)
        used.add(actual(rule.foreign))
    ignored = {
        name: entry.why
        for name in foreign.keys() - used
        for entry in family.ignored
        if entry.matches(name) or entry.matches(family.prefix + name)
    }
    repeated = _repeated(family, model, foreign, {name: place for name, (place, _) in places.items()})
    over = set(foreign) - used - ignored.keys() - {name for name, _ in repeated}
    if over and (faults or missing or not may_leave_over):
        faults.append(without_place(family, model, over))
    if missing:
        faults.append(f"{summarise(missing, 'is', 'are')} missing{_why_missing(missing)}")
    if faults:
        shown = faults[:8] + ([f"and {len(faults) - 8} more"] if len(faults) > 8 else [])
        raise ConversionError(f"{where}: {'; '.join(shown)}")
    return Match(places, schema, repeated, ignored, tuple(name for name in foreign if name in over))


def without_place(family: Family, model: ModelConfig, names: Collection[str]) -> str:
    """That these foreign tensors have no place, with the family that has one, if there is one."""
    hint = _hint(family, model, set(names))
    return f"{summarise(names, 'has', 'have')} no place in family {family.name!r}{hint}"


def _experts(model: ModelConfig) -> int:
    return model.num_hidden_layers * model.moe.num_experts if model.moe else 0


def _bound(family: Family, model: ModelConfig, foreign: Mapping[str, LogicalTensor]) -> dict[str, Rule]:
    """The table by which the file is stored: of the family's two, that of which fewer tensors are missing."""
    tables = [family.bind(model)]
    if family.also_read is not None:
        tables.append(family.bind(model, family.also_read(model)))
    known = foreign.keys() | {family.prefix + name for name in foreign}
    return min(tables, key=lambda bound: len({rule.foreign for rule in bound.values()} - known))


def _names_in_file(
    family: Family, bound: Mapping[str, Rule], foreign: Mapping[str, LogicalTensor]
) -> Callable[[str], str]:
    """From the names of the family's table to those in this file: with the prefix of the body, or all without it."""
    body = [rule.foreign for rule in bound.values() if rule.foreign.startswith(family.prefix)]
    if any(name in foreign for name in body) or not any(name.removeprefix(family.prefix) in foreign for name in body):
        return lambda name: name
    return lambda name: name.removeprefix(family.prefix)


def _repeated(
    family: Family, model: ModelConfig, foreign: Mapping[str, LogicalTensor], places: Mapping[str, str]
) -> tuple[tuple[str, str], ...]:
    """A tied head that was stored all the same."""
    if family.repeats:
        pairs = family.repeats.items()
        own = set(places.values())
        return tuple((name, other) for name, other in pairs if {name, other} <= foreign.keys() and name not in own)
    if model.tie_word_embeddings and "lm_head.weight" in foreign and "embed_tokens.weight" in places:
        return (("lm_head.weight", places["embed_tokens.weight"]),)
    return ()


def _why_missing(missing: list[str]) -> str:
    if missing == ["lm_head.weight"]:
        return "; if the head is the embedding, config.json must say tie_word_embeddings=true"
    return ""


def _hint(family: Family, model: ModelConfig, over: set[str]) -> str:
    """Another family that knows all of the names that this one does not."""
    for other in families():
        patterns = {fold(rule.foreign.replace("{i}", "0")) for rule in other.rules(model)}
        folded = {fold(name) for name in over}
        bare = {pattern.removeprefix(other.prefix) for pattern in patterns}
        if other.name != family.name and folded <= patterns | bare:
            return f"; is this {other.name!r}? try --family {other.name}"
    return ""
