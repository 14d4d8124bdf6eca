"""Reward model: a head of one number tells how good an answer is, learned from pairs of answers.

A row is {"prompt" (or not), "chosen", "rejected", "margin" (or not)}; answers are text, or lists of messages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from finetune.dialogues import DialogueEncoder, TooLong, dialogue
from finetune.jsonl import Row, read_rows
from finetune.task import IGNORE, Example, Prepared, TaskTable, files_of, pad_id_of
from workbench.errors import DataError

if TYPE_CHECKING:
    import torch

    from pretrain.engine import Pipeline
    from workbench.models.batch import Batch
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

    def prepare(self, table: RewardTable, tokenizer: Tokenizer, *, max_tokens: int) -> Prepared:
        """The encoded rows, two by two; DataError for rows without answers, or whose answer is cut off whole."""
        encoder, judge = DialogueEncoder(tokenizer, max_tokens, table.too_long), RewardJudge(table.center)
        return Prepared(
            train=_examples(encoder, read_rows(table.train)),
            held_out={name: _examples(encoder, read_rows(paths)) for name, paths in files_of(table).items()},
            judge=judge,
            num_labels=1,
            pad_id=pad_id_of(tokenizer),
            identity={"kind": self.name, "center": table.center, "too_long": table.too_long},
            notes=encoder.notes,
            criterion=judge,
            group=2,
        )


class RewardJudge:
    """Criterion and judge of pairs of rewards (Bradley and Terry, 1952): the better answer's less the other's, less the
    margin that it is better by (arXiv:2307.09288, eq. 2). The rows of a batch are the better one, the other, and so on.

    Legend: B rows, P pairs.
    """

    output: Literal["loss", "token_losses", "logits"] = "logits"

    def __init__(self, center: float) -> None:
        self._center = center

    def loss(self, batch: Batch, output: torch.Tensor) -> torch.Tensor:
        return self._losses(batch, output).sum()

    def ready(self, pipeline: Pipeline, batches: Sequence[Batch]) -> Sequence[Batch]:
        return batches

    def tally(self, batch: Batch, output: torch.Tensor) -> torch.Tensor:
        import torch

        assert batch.labels is not None
        chosen_P, rejected_P = output.double().view(-1, 2).unbind(dim=-1)
        rewards_2P = (chosen_P, rejected_P)
        right_P, one_P = (chosen_P > rejected_P).double(), torch.ones_like(chosen_P)
        found = torch.stack((self._losses(batch, output), right_P, *rewards_2P, one_P))
        return found.masked_fill(batch.labels[::2] == IGNORE, 0.0).sum(dim=-1)

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        pairs = max(sums[-1], 1.0)
        loss, accuracy, chosen, rejected = (value / pairs for value in sums[:-1])
        return {
            "loss": loss,
            "accuracy": accuracy,
            "accuracy_error": math.sqrt(accuracy * (1 - accuracy) / pairs),
            "margin": chosen - rejected,
            "mean_reward": (chosen + rejected) / 2,
            "pairs": sums[-1],
        }

    def _losses(self, batch: Batch, output: torch.Tensor) -> torch.Tensor:
        import torch.nn.functional as F

        chosen_P, rejected_P = output.double().view(-1, 2).unbind(dim=-1)
        losses_P = -F.logsigmoid(chosen_P - rejected_P - batch.values["margin"][::2])
        return losses_P + self._center * (chosen_P + rejected_P).square()


def _examples(encoder: DialogueEncoder, rows: Sequence[Row]) -> list[Example]:
    found = encoder.encode([(dialogue(row, "chosen"), dialogue(row, "rejected")) for row in rows])
    label = np.array(0, dtype=np.int64)
    return [
        Example(np.array(one.ids, dtype=np.int64), label, {"margin": _margin(row)})
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
