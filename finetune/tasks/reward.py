"""Reward model: a head of one number tells how good an answer is, learned from pairs of answers.

A row is {"prompt" (or not), "chosen", "rejected", "margin" (or not)}; answers are text, or lists of messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from finetune.dialogues import DialogueEncoder, dialogue
from finetune.rows import Row
from finetune.shapes import PREFERENCES
from finetune.task import Example, Prepared, TaskTable, TooLong, pad_id_of, read
from workbench.errors import DataError

if TYPE_CHECKING:
    from workbench.spec.model import ModelConfig
    from workbench.tokenizer import Tokenizer


class RewardTable(TaskTable):
    """[task] kind = "reward": give the better one of two answers the higher number."""

    kind: Literal["reward"] = "reward"
    center: float = Field(
        default=0.0, ge=0, description="Weight of the squared sum of a pair's rewards, which keeps them about zero."
    )
    too_long: TooLong = Field(
        default="truncate", description="What becomes of rows with an answer longer than batch.seq_len."
    )


class Reward:
    """Numbers for answers."""

    name = "reward"
    table = RewardTable

    def prepare(self, table: RewardTable, tokenizer: Tokenizer, *, model: ModelConfig, max_tokens: int) -> Prepared:
        """The encoded rows, two by two; DataError for rows without answers, or whose answer is cut off whole."""
        from finetune.tasks._preference_loss import RewardJudge

        found = read(table, PREFERENCES)
        encoder, judge = DialogueEncoder(tokenizer, max_tokens, table.too_long), RewardJudge(table.center)
        return Prepared(
            train=_examples(encoder, found.train),
            held_out={name: _examples(encoder, rows) for name, rows in found.held_out.items()},
            judge=judge,
            num_labels=1,
            pad_id=pad_id_of(tokenizer),
            identity={"kind": self.name, "center": table.center, "too_long": table.too_long},
            notes=encoder.notes,
            read_as=found.read_as,
            criterion=judge,
            group=2,
        )


def _examples(encoder: DialogueEncoder, rows: Sequence[Row]) -> list[Example]:
    found = encoder.encode([(dialogue(row, "chosen"), dialogue(row, "rejected")) for row in rows])
    label = np.array(0, dtype=np.int64)
    return [
        Example(np.array(one.ids, dtype=np.int64), label, row.place, values={"margin": _margin(row)})
        for row, group in zip(rows, found, strict=True)
        if group is not None
        for one in group
    ]


def _margin(row: Row) -> float:
    margin = row.values.get("margin", 0.0)
    if isinstance(margin, bool) or not isinstance(margin, int | float):
        raise DataError(f"{row.place}: needs a number under 'margin', not {margin!r}")
    return float(margin)


TASK = Reward()
