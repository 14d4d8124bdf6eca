"""Supervised fine-tuning: the model learns to answer, and only the answer's tokens (its end included) are supervised.

Rows are of any shape of answers (finetune/shapes.py): prompts, alpaca, messages, sharegpt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from finetune.chat import ChatTemplate, Piece
from finetune.rows import Row, places, text_of
from finetune.shapes import ANSWERS
from finetune.task import (
    IGNORE,
    Example,
    LabelledTable,
    Prepared,
    TooLong,
    eos_id_of,
    notes_of_too_long,
    pad_id_of,
    read,
)
from workbench.errors import DataError

if TYPE_CHECKING:
    from workbench.spec.model import ModelConfig
    from workbench.tokenizer import Tokenizer


class SftTable(LabelledTable):
    """[task] kind = "sft": learn to answer prompts."""

    packs: ClassVar[bool] = True

    kind: Literal["sft"] = "sft"
    too_long: TooLong = Field(default="truncate", description="What becomes of rows longer than batch.seq_len.")
    exact_match: bool = Field(
        default=True, description="Also report how many answers greedy decoding would give back word for word."
    )


class Sft:
    """Answers to prompts."""

    name = "sft"
    table = SftTable

    def prepare(self, table: SftTable, tokenizer: Tokenizer, *, model: ModelConfig, max_tokens: int) -> Prepared:
        """The encoded rows; DataError for rows without an answer, or whose answer is cut off whole."""
        return prepare_answers(table, tokenizer, max_tokens)


def prepare_answers(table: SftTable, tokenizer: Tokenizer, max_tokens: int) -> Prepared:
    """The encoded rows, for any model."""
    from finetune.judges import AnswerJudge, TextLoss

    encoder = _Encoder(tokenizer, max_tokens, table.too_long)
    found = read(table, *ANSWERS)
    train = encoder.examples(found.train)
    return Prepared(
        train=train,
        held_out={name: encoder.examples(rows) for name, rows in found.held_out.items()},
        judge=AnswerJudge() if table.exact_match else TextLoss(),
        num_labels=0,
        pad_id=pad_id_of(tokenizer),
        identity={"kind": table.kind, "too_long": table.too_long},
        notes=[*encoder.notes, *_stops(train, tokenizer)],
        read_as=found.read_as,
    )


class _Encoder:
    """Rows to examples; keeps notes of those that did not fit."""

    def __init__(self, tokenizer: Tokenizer, max_tokens: int, too_long: TooLong) -> None:
        self.tokenizer, self.max_tokens, self.too_long = tokenizer, max_tokens, too_long
        self.eos = eos_id_of(tokenizer)
        self.notes: list[str] = []
        self._template: ChatTemplate | None = None

    def examples(self, rows: Sequence[Row]) -> list[Example]:
        if empty := [row for row in rows if "messages" not in row.values and not text_of(row, "completion").strip()]:
            raise DataError(f"{len(empty)} rows have an empty answer, nothing to learn ({places(empty)}); remove them")
        conversations = [self._pieces(row) for row in rows]
        ids = iter(self.tokenizer.encode_batch([text for pieces in conversations for text, _ in pieces]))
        encoded = [[(next(ids), learned) for _, learned in pieces] for pieces in conversations]
        made = [self._example(row, pieces) for row, pieces in zip(rows, encoded, strict=True)]
        too_long = [row for row, (_, cut) in zip(rows, made, strict=True) if cut]
        self.notes += notes_of_too_long(too_long, self.max_tokens, self.too_long)
        kept = [(row, example) for row, (example, cut) in zip(rows, made, strict=True) if self._keeps(cut)]
        masked = [row for row, example in kept if not example.num_labels]
        if masked:
            raise DataError(
                f"{len(masked)} rows have no token to learn within {self.max_tokens} tokens: the prompt alone fills "
                f"them, or the answer is empty ({places(masked)}); raise batch.seq_len or set task.too_long = 'drop'"
            )
        if not kept:
            raise DataError(f"all {len(too_long)} rows are longer than {self.max_tokens} tokens; raise batch.seq_len")
        return [example for _, example in kept]

    def _keeps(self, cut: bool) -> bool:
        return not (cut and self.too_long == "drop")

    def _pieces(self, row: Row) -> list[Piece]:
        if "messages" in row.values:
            self._template = self._template or ChatTemplate(self.tokenizer)
            return self._template.pieces(row)
        return [(text_of(row, "prompt"), False), (text_of(row, "completion"), True)]

    def _example(self, row: Row, pieces: Sequence[tuple[list[int], bool]]) -> tuple[Example, bool]:
        """The example, and whether it was longer than allowed. Each token is labelled with the one after it."""
        start = [] if "messages" in row.values else self.tokenizer.start_ids
        ids = [*start, *(token for tokens, _ in pieces for token in tokens)]
        learned = [False] * len(start) + [flag for tokens, flag in pieces for _ in tokens]
        if ids[-1] != self.eos and "messages" not in row.values:
            ids, learned = [*ids, self.eos], [*learned, True]
        # The last token is only ever a label, so one more than max_tokens fits.
        cut = len(ids) > self.max_tokens + 1
        ids, learned = ids[: self.max_tokens + 1], learned[: self.max_tokens + 1]
        labels = np.where(learned[1:], ids[1:], IGNORE) if len(ids) > 1 else np.full(1, IGNORE)
        return Example(np.array(ids[:-1] or ids, dtype=np.int64), labels.astype(np.int64), row.place), cut


def _stops(examples: Sequence[Example], tokenizer: Tokenizer) -> list[str]:
    """A warning when no row teaches the token that ends a generation."""
    eos = eos_id_of(tokenizer)
    if any((example.labels == eos).any() for example in examples):
        return []
    last = examples[0].labels[examples[0].labels != IGNORE][-3:]
    return [
        f"no row teaches the end of text {tokenizer.decode([eos], skip_special_tokens=False)!r}: answers end with "
        f"{tokenizer.decode(last, skip_special_tokens=False)!r}, so a generation that waits for it never stops; make "
        "eos_token in tokenizer_config.json what the chat template ends a turn with, or raise batch.seq_len if all "
        "answers are cut"
    ]


TASK = Sft()
