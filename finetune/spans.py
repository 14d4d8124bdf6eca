"""Entities in a sequence of labels B-kind, I-kind and O. No torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence

_LABEL = re.compile(r"O|[BI]-.+")

Span = tuple[str, int, int]
"""Kind, first place, place after the last."""


def are_bio(labels: Collection[object]) -> bool:
    """Whether labels mark entities: each is O, or B- or I- with a kind, and there is some kind."""
    words = [label for label in labels if isinstance(label, str)]
    return len(words) == len(labels) and all(map(_LABEL.fullmatch, words)) and any(word != "O" for word in words)


def spans(labels: Sequence[str]) -> Iterator[Span]:
    """The entities, as conlleval counts them: one begins with B-, and with I- where none of its kind goes on."""
    kind, start = "", 0
    for place, label in enumerate([*labels, "O"]):
        mark, _, found = label.partition("-")
        if kind and (mark != "I" or found != kind):
            yield kind, start, place
            kind = ""
        if not kind and mark != "O":
            kind, start = found, place
