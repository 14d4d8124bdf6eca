"""Continued pretraining: every token of a text is learned, and its end. A row is {"text": ...}.

A text longer than `batch.seq_len` goes on in a row of its own; none of it is lost. Short ones share rows by
`batch.packing`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from finetune.rows import Row
from finetune.shapes import TEXTS
from finetune.task import Example, LabelledTable, Prepared, eos_id_of, pad_id_of, read
from finetune.tasks._texts import token_lists

if TYPE_CHECKING:
    from workbench.spec.model import ModelConfig
    from workbench.tokenizer import Tokenizer


class LmTable(LabelledTable):
    """[task] kind = "lm": go on with pretraining, on texts of your own."""

    packs: ClassVar[bool] = True

    kind: Literal["lm"] = "lm"


class Lm:
    """Texts."""

    name = "lm"
    table = LmTable

    def prepare(self, table: LmTable, tokenizer: Tokenizer, *, model: ModelConfig, max_tokens: int) -> Prepared:
        """The encoded rows; DataError for rows without a text, or a tokenizer that cannot end one."""
        from finetune.judges import TextLoss

        end = eos_id_of(tokenizer, otherwise="not learn where texts end")

        def examples(rows: Sequence[Row]) -> list[Example]:
            texts = [np.array([*tokenizer.start_ids, *ids, end]) for ids in token_lists(rows, tokenizer)]
            return [
                piece for row, ids in zip(rows, texts, strict=True) for piece in _pieces(ids, max_tokens, row.place)
            ]

        found = read(table, TEXTS)

        return Prepared(
            train=examples(found.train),
            held_out={name: examples(rows) for name, rows in found.held_out.items()},
            judge=TextLoss(),
            num_labels=0,
            pad_id=pad_id_of(tokenizer),
            identity={"kind": self.name},
            read_as=found.read_as,
        )


def _pieces(ids: np.ndarray, max_tokens: int, place: str) -> list[Example]:
    """A text in rows, each token labelled with the one after it; its end is only ever a label."""
    inputs, labels = ids[:-1], ids[1:]
    starts = range(0, len(inputs), max_tokens)
    return [Example(inputs[at : at + max_tokens], labels[at : at + max_tokens], place) for at in starts]


TASK = Lm()
