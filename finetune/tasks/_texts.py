"""A text, or two, of a row as tokens, with the special tokens that the tokenizer's own template puts around them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from finetune.rows import Row, places, text_of
from finetune.task import Example
from workbench.errors import DataError

if TYPE_CHECKING:
    from workbench.tokenizer import EncodedRow, Tokenizer

TEXT, PAIR = "text", "text_pair"
Texts = str | tuple[str, str]


class TextEncoder:
    """Rows to tokens; keeps notes of those that did not fit."""

    def __init__(self, tokenizer: Tokenizer, max_tokens: int) -> None:
        self._tokenizer, self._max_tokens = tokenizer, max_tokens
        self.notes: list[str] = []

    def encode(self, rows: Sequence[Row], texts: Sequence[Texts]) -> list[EncodedRow]:
        """The tokens of each row's texts; DataError for rows without any."""
        found = self._tokenizer.encode_rows([self._joined(text) for text in texts], self._max_tokens)
        if empty := [row for row, one in zip(rows, found, strict=True) if not any(end for _, end in one.spans)]:
            raise DataError(f"{len(empty)} rows have an empty text ({places(empty)}); remove them")
        if cut := [row for row, one in zip(rows, found, strict=True) if one.was_cut]:
            what = f"{len(cut)} rows are longer than {self._max_tokens} tokens ({places(cut)})"
            self.notes.append(f"{what}; only their beginning is read")
        return found

    def _joined(self, text: Texts) -> Texts:
        """Two texts that the tokenizer's template would not tell apart become one of two lines."""
        return "\n".join(text) if isinstance(text, tuple) and not self._tokenizer.separates else text


def token_lists(rows: Sequence[Row], tokenizer: Tokenizer) -> list[list[int]]:
    """The tokens of the text of each row, without special tokens and of any length; DataError for empty ones."""
    found = tokenizer.encode_batch([text_of(row, TEXT) for row in rows])
    if empty := [row for row, ids in zip(rows, found, strict=True) if not ids]:
        raise DataError(f"{len(empty)} rows have an empty text ({places(empty)}); remove them")
    return found


def texts_of(row: Row) -> Texts:
    """The text of a row, with the second one if it has one."""
    return (text_of(row, TEXT), text_of(row, PAIR)) if PAIR in row.values else text_of(row, TEXT)


def row_example(encoded: EncodedRow, label: int, row: Row, target: Sequence[float] | None = None) -> Example:
    """A row with something to be said of it as a whole."""
    return Example(
        np.array(encoded.ids, dtype=np.int64),
        np.array(label, dtype=np.int64),
        row.place,
        segments=np.array(encoded.segments, dtype=np.int64),
        values={} if target is None else {"target": np.array(target, dtype=np.float64)},
    )
