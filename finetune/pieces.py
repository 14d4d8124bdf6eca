"""Rows and examples as pieces of text that are learned or not: what a user looks at before training. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.chat import Piece
from finetune.rows import Row
from finetune.task import IGNORE, Example

if TYPE_CHECKING:
    from workbench.tokenizer import Tokenizer


def pieces_of_example(example: Example, tokenizer: Tokenizer) -> list[Piece]:
    """The text of an example as the model sees it. Where labels are the tokens that follow, those are learned; where
    they are about a token itself, that token; where they are of the whole row, nothing."""
    ids, labels = example.input_ids, example.labels
    learned = np.broadcast_to(False, ids.shape)
    if labels.shape == ids.shape:
        counts = labels != IGNORE
        if (labels[:-1] == ids[1:])[counts[:-1]].all():
            ids = np.append(ids, labels[-1]) if counts[-1] else ids
            learned = np.concatenate([[False], counts])[: len(ids)]
        else:
            learned = counts
    runs = groupby(zip(ids.tolist(), learned.tolist(), strict=True), key=lambda pair: pair[1])
    return [(tokenizer.decode([token for token, _ in run], skip_special_tokens=False), flag) for flag, run in runs]


def pieces_of_row(row: Row) -> list[Piece]:
    """The text of a recognised row, without a tokenizer and so without a chat template or an end of text."""
    values = row.values
    if "messages" in values:
        return [piece for message in values["messages"] for piece in _turn(message)]
    learned = next(name for name in ("completion", "label", "chosen") if name in values)
    shown = [name for name in ("prompt", "text", "completion", "chosen", "rejected", "label") if name in values]
    return [piece for name in shown for piece in ((f"\n{name}: ", False), (_text(values[name]), name == learned))]


def shortened(pieces: Iterable[Piece], chars: int) -> list[Piece]:
    """The first `chars` characters of the pieces."""
    found = []
    for text, learned in pieces:
        if chars > 0 and text:
            found.append((text[:chars], learned))
        chars -= len(text)
    return found


def _turn(message: Any) -> list[Piece]:
    return [(f"\n{message['role']}: ", False), (_text(message["content"]), message["role"] == "assistant")]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
