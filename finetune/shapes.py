"""The shapes that rows of instructions, conversations, preferences and labels are usually found in. No torch.

A shape is told by the columns that it needs. What is recognised is turned into the shape that a task works with, and
said; what is not is an error that names the columns found and what there could be.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from finetune.rows import Row, places, text_of
from workbench.config_faults import nearest
from workbench.errors import DataError

_ROLES: Final = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}


@dataclass(frozen=True, slots=True)
class Shape:
    """What rows look like. needs, may: columns; `plain`: the values of a row as its task works with them."""

    name: str
    needs: tuple[str, ...]
    may: tuple[str, ...] = ()
    plain: Callable[[Row], Mapping[str, Any]] = lambda row: row.values

    def __str__(self) -> str:
        return f"{self.name} ({', '.join([*self.needs, *(f'{name} or not' for name in self.may)])})"


def _from_alpaca(row: Row) -> Mapping[str, Any]:
    context = text_of(row, "input") if row.values.get("input") else ""
    prompt = "".join(f"{part}\n\n" for part in (text_of(row, "instruction"), context) if part)
    return {"prompt": prompt, "completion": text_of(row, "output")}


def _from_sharegpt(row: Row) -> Mapping[str, Any]:
    turns = row.values["conversations"]
    valid = isinstance(turns, list) and all(
        isinstance(turn, dict) and {"from", "value"} <= turn.keys() for turn in turns
    )
    if not valid:
        raise DataError(f'{row.place}: conversations must be a list of {{"from": ..., "value": text}}')
    system = [{"role": "system", "content": text_of(row, "system")}] if row.values.get("system") else []
    said = [{"role": _ROLES.get(turn["from"], turn["from"]), "content": turn["value"]} for turn in turns]
    return {"messages": system + said}


MESSAGES: Final = Shape("messages", ("messages",))
SHAREGPT: Final = Shape("sharegpt", ("conversations",), ("system",), _from_sharegpt)
ALPACA: Final = Shape("alpaca", ("instruction", "output"), ("input",), _from_alpaca)
PROMPTS: Final = Shape("prompts", ("prompt", "completion"))
PREFERENCES: Final = Shape("preferences", ("chosen", "rejected"), ("prompt", "margin"))
JUDGED: Final = Shape("judged answers", ("completion", "label"), ("prompt",))
LABELS: Final = Shape("labels", ("text", "label"), ("text_pair",))
LABEL_SETS: Final = Shape("label sets", ("text", "labels"), ("text_pair",))
PAIRS: Final = Shape("pairs", ("text", "text_pair", "label"))
PAIR_SETS: Final = Shape("label sets of pairs", ("text", "text_pair", "labels"))
WORDS: Final = Shape("words", ("tokens", "labels"))
TEXTS: Final = Shape("texts", ("text",))
CHOICES: Final = Shape("choices", ("text", "choices", "label"))
QUERIES: Final = Shape("queries", ("query", "positive"), ("negative",))
ANSWERS: Final = (MESSAGES, SHAREGPT, ALPACA, PROMPTS)
SHAPES: Final = (PREFERENCES, JUDGED, LABELS, *ANSWERS)


@dataclass(frozen=True)
class Recognised:
    """Rows as their task works with them, and what was recognised, to be shown: '48 rows of alpaca (...)'."""

    rows: list[Row]
    counts: Mapping[Shape, int]

    @property
    def told(self) -> str:
        return ", ".join(f"{count} rows of {shape}" for shape, count in self.counts.items())


def recognise(rows: Sequence[Row], shapes: Sequence[Shape], *, columns: Mapping[str, str] | None = None) -> Recognised:
    """The rows, each by the first of `shapes` whose columns it has; DataError naming those that have none.

    columns: the names that the user gave to columns, each of which must be one of a shape.
    """
    known = [name for shape in shapes for name in (*shape.needs, *shape.may)]
    if strange := [name for name in columns or () if name not in known]:
        raise DataError(f"task.columns names {strange[0]!r}, which no row needs{nearest(strange[0], known)}")
    found = [next((shape for shape in shapes if row.values.keys() >= set(shape.needs)), None) for row in rows]
    if lost := [row for row, shape in zip(rows, found, strict=True) if shape is None]:
        raise DataError(_unrecognised(lost, shapes))
    counts = Counter(shape for shape in found if shape is not None)
    plain = [replace(row, values=shape.plain(row)) for row, shape in zip(rows, found, strict=True) if shape is not None]
    return Recognised(plain, counts)


def _unrecognised(rows: Sequence[Row], shapes: Sequence[Shape]) -> str:
    have = list(rows[0].values)
    near = max(reversed(shapes), key=lambda shape: len(set(shape.needs) & set(have)))
    lacks = next(name for name in near.needs if name not in have)
    theirs = next((name for name in have if name not in (*near.needs, *near.may)), "NAME")
    return (
        f"{len(rows)} rows have no columns that are recognised ({places(rows)}): the first has "
        f"{', '.join(have) or 'nothing'}; recognised would be {'; '.join(map(str, shapes))}. Name columns by "
        f"task.columns = {{{lacks} = {json.dumps(theirs)}}} or --map {lacks}={theirs}"
    )
