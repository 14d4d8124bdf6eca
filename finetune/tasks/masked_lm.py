"""Hidden words: a model whose tokens see all others learns texts by filling in what is hidden, as in its pretraining.

A row is {"text": ...}. Which words are hidden is drawn anew each time that a row comes up, and is a function of the
seed and of how many came before it; in held-out rows it is always the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np

from finetune.rows import Row
from finetune.shapes import TEXTS
from finetune.task import IGNORE, Example, LabelledTable, Prepared, read
from finetune.tasks._texts import token_lists
from workbench.errors import DataError

if TYPE_CHECKING:
    from pretrain.engine import Vocabulary
    from workbench.spec.model import ModelConfig
    from workbench.tokenizer import Tokenizer

MARKS = 2
"""[CLS] and [SEP] of a row."""


class MaskedLmTable(LabelledTable):
    """[task] kind = "masked_lm": go on with the pretraining of a model that fills in hidden words."""

    kind: Literal["masked_lm"] = "masked_lm"


class MaskedLm:
    """Texts with hidden words."""

    name = "masked_lm"
    table = MaskedLmTable

    def prepare(self, table: MaskedLmTable, tokenizer: Tokenizer, *, model: ModelConfig, max_tokens: int) -> Prepared:
        """The encoded rows; DataError for rows without a text, or a model without an id for [MASK]."""
        from finetune.judges import TextLoss
        from pretrain.engine import Vocabulary

        room = max_tokens - MARKS
        if room < 1:
            raise DataError(f"batch.seq_len={max_tokens} leaves no room between [CLS] and [SEP]; raise it")
        vocabulary = Vocabulary(tokenizer, model.vocab_size)
        specials, seed = vocabulary.specials, 2 * table.seed

        def examples(rows: Sequence[Row]) -> list[Example]:
            pieces = [
                (row.place, [specials.first, *text[at : at + room], specials.separator])
                for row, text in zip(rows, token_lists(rows, tokenizer), strict=True)
                for at in range(0, len(text), room)
            ]
            return [Example(np.array(ids), np.full(len(ids), IGNORE), place) for place, ids in pieces]

        found = read(table, TEXTS)
        held_out = {
            name: [_hidden(vocabulary, seed + 1, example, number) for number, example in enumerate(examples(rows))]
            for name, rows in found.held_out.items()
        }
        return Prepared(
            train=examples(found.train),
            held_out=held_out,
            judge=TextLoss(),
            num_labels=0,
            pad_id=specials.padding,
            identity={"kind": self.name},
            read_as=found.read_as,
            notes=[
                f"{name}: {plain} of {len(shown)} rows hide nothing: each of their words is more than 15 % of them"
                for name, shown in held_out.items()
                if (plain := sum(not example.num_labels for example in shown))
            ],
            words="hidden",
            vary=partial(_hidden, vocabulary, seed),
        )


def _hidden(vocabulary: Vocabulary, seed: int, example: Example, number: int) -> Example:
    """The example with words hidden, always the same ones for a seed and a number."""
    from pretrain.engine import draws

    ids, labels = vocabulary.hide(example.input_ids, draws(seed, number))
    return replace(example, input_ids=ids, labels=labels)


TASK = MaskedLm()
