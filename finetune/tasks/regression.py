"""Regression: a number for a text, or for two (how alike they are), from a head of one output.

A row is {"text": ..., "label": a number}, with a "text_pair" or without.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from finetune.rows import Row
from finetune.shapes import LABELS
from finetune.task import Example, Prepared, TaskTable, pad_id_of, read
from finetune.tasks._texts import TextEncoder, row_example, texts_of
from workbench.errors import DataError

if TYPE_CHECKING:
    from workbench.spec.model import ModelConfig
    from workbench.tokenizer import Tokenizer


class RegressionTable(TaskTable):
    """[task] kind = "regression": tell the number that belongs to a text, or to two."""

    kind: Literal["regression"] = "regression"


class Regression:
    """Numbers of texts."""

    name = "regression"
    table = RegressionTable

    def prepare(self, table: RegressionTable, tokenizer: Tokenizer, *, model: ModelConfig, max_tokens: int) -> Prepared:
        """The encoded rows; DataError for rows without a text or a finite number."""
        from finetune.judges import NumberJudge
        from finetune.losses import SquaredLoss

        found = read(table, LABELS)
        encoder = TextEncoder(tokenizer, max_tokens)

        def examples(rows: Sequence[Row]) -> list[Example]:
            numbers = [_number(row) for row in rows]
            encoded = encoder.encode(rows, [texts_of(row) for row in rows])
            return [row_example(one, 0, row, [n]) for one, row, n in zip(encoded, rows, numbers, strict=True)]

        train = examples(found.train)
        return Prepared(
            train=train,
            held_out={name: examples(rows) for name, rows in found.held_out.items()},
            judge=NumberJudge(float(np.mean([example.values["target"] for example in train]))),
            num_labels=1,
            pad_id=pad_id_of(tokenizer),
            identity={"kind": self.name},
            notes=encoder.notes,
            read_as=found.read_as,
            problem_type="regression",
            criterion=SquaredLoss(),
        )


def _number(row: Row) -> float:
    label = row.values.get("label")
    if isinstance(label, bool) or not isinstance(label, int | float) or not math.isfinite(label):
        raise DataError(f"{row.place}: needs a number under 'label', not {label!r}")
    return float(label)


TASK = Regression()
