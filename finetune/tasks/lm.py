"""Continued pretraining: every token of a text is learned, and its end. A row is {"text": ...}.

A text longer than `batch.seq_len` goes on in a row of its own; none of it is lost. Packed or not, each piece is learned
by itself, from the same tokens before it, so that both ways have the same loss.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from finetune.jsonl import read_rows
from finetune.task import Example, Prepared, TaskTable, files_of, pad_id_of
from finetune.tasks._texts import token_lists
from workbench.errors import DataError

if TYPE_CHECKING:
    from workbench.spec.model import ModelConfig
    from workbench.tokenizer import Tokenizer


class LmTable(TaskTable):
    """[task] kind = "lm": go on with pretraining, on texts of your own."""

    kind: Literal["lm"] = "lm"
    packing: bool = Field(
        default=True,
        description="Put several short texts into a row; each sees itself alone, and its positions begin anew.",
    )

    @property
    def keeps_documents_apart(self) -> bool:
        return self.packing


class Lm:
    """Texts."""

    name = "lm"
    table = LmTable

    def prepare(self, table: LmTable, tokenizer: Tokenizer, *, model: ModelConfig, max_tokens: int) -> Prepared:
        """The encoded rows; DataError for rows without a text, or a tokenizer that cannot end one."""
        from finetune.judges import TextLoss

        if (end := tokenizer.eos_id) is None:
            raise DataError(
                f"{tokenizer.path}: the tokenizer names no end-of-text token, so the model would not learn where texts "
                "end; name an eos_token in its tokenizer_config.json"
            )

        def examples(paths: Sequence[str]) -> list[Example]:
            texts = [[*tokenizer.start_ids, *ids, end] for ids in token_lists(read_rows(paths), tokenizer)]
            pieces = [piece for text in texts for piece in _pieces(np.array(text, dtype=np.int64), max_tokens)]
            return pack(pieces, max_tokens) if table.packing else pieces

        return Prepared(
            train=examples(table.train),
            held_out={name: examples(paths) for name, paths in files_of(table).items()},
            judge=TextLoss(),
            num_labels=0,
            pad_id=pad_id_of(tokenizer),
            identity={"kind": self.name, "packing": table.packing},
        )


def pack(examples: Sequence[Example], max_tokens: int) -> list[Example]:
    """The examples in fewer rows of at most `max_tokens` tokens: each, longest first, into the fullest row in which it
    has room (best fit). None is cut, and each is a document of its row."""
    rows: list[list[Example]] = []
    open_rows: list[tuple[int, int]] = []  # (room, number), in order
    for example in sorted(examples, key=lambda example: -len(example.input_ids)):
        size = len(example.input_ids)
        at = bisect.bisect_left(open_rows, (size, 0))
        if at == len(open_rows):
            rows.append([])
            room, number = max_tokens, len(rows) - 1
        else:
            room, number = open_rows.pop(at)
        rows[number].append(example)
        bisect.insort(open_rows, (room - size, number))
    return [_row(row) for row in rows]


def _row(examples: Sequence[Example]) -> Example:
    lengths = [len(example.input_ids) for example in examples]
    return Example(
        np.concatenate([example.input_ids for example in examples]),
        np.concatenate([example.labels for example in examples]),
        documents=np.repeat(np.arange(len(examples)), lengths),
    )


def _pieces(ids: np.ndarray, max_tokens: int) -> list[Example]:
    """A text in rows, each token labelled with the one after it; its end is only ever a label."""
    inputs, labels = ids[:-1], ids[1:]
    starts = range(0, len(inputs), max_tokens)
    return [Example(inputs[at : at + max_tokens], labels[at : at + max_tokens]) for at in starts]


TASK = Lm()
