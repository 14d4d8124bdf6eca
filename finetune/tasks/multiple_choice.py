"""Multiple choice: which of a few answers fits a text, from a head that scores each answer with the text before it.

A row is {"text": ..., "choices": [...], "label": the place of the right one, counted from 0}. Rows may have differently
many choices. The score is that of one output (Radford et al. 2018, sec. 3.3; arXiv:1810.04805, sec. 4.4).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from finetune.rows import Row, text_of
from finetune.shapes import CHOICES
from finetune.task import IGNORE, Example, Prepared, TaskTable, pad_id_of, read
from finetune.tasks._texts import TEXT, TextEncoder, row_example
from workbench.errors import DataError

if TYPE_CHECKING:
    from workbench.spec.model import ModelConfig
    from workbench.tokenizer import EncodedRow, Tokenizer


class MultipleChoiceTable(TaskTable):
    """[task] kind = "multiple_choice": find the right answer among a few."""

    kind: Literal["multiple_choice"] = "multiple_choice"


class MultipleChoice:
    """The right one of a few answers."""

    name = "multiple_choice"
    table = MultipleChoiceTable

    def prepare(
        self, table: MultipleChoiceTable, tokenizer: Tokenizer, *, model: ModelConfig, max_tokens: int
    ) -> Prepared:
        """The encoded rows; DataError for rows without choices, or whose label is not the place of one."""
        from finetune.judges import ChoiceJudge
        from finetune.losses import ChoiceLoss

        data = read(table, CHOICES)
        rows = {"train": data.train, **data.held_out}
        group = max(len(choices_of(row)) for found in rows.values() for row in found)
        encoder = TextEncoder(tokenizer, max_tokens)
        absent = Example(
            np.full(1, pad_id_of(tokenizer)),
            np.array(IGNORE),
            segments=np.zeros(1, dtype=np.int64),
            values={"target": np.zeros(1)},
        )

        def examples(rows: Sequence[Row]) -> list[Example]:
            texts = [(text_of(row, TEXT), choice) for row in rows for choice in choices_of(row)]
            owners = [row for row in rows for _ in choices_of(row)]
            encoded = iter(encoder.encode(owners, texts))
            found: list[Example] = []
            for row in rows:
                mine = [next(encoded) for _ in choices_of(row)]
                found += [*_sample(row, mine), *[absent] * (group - len(mine))]
            return found

        samples = {name: examples(found) for name, found in rows.items()}
        return Prepared(
            train=samples.pop("train"),
            held_out=samples,
            judge=ChoiceJudge(group),
            num_labels=1,
            pad_id=pad_id_of(tokenizer),
            identity={"kind": self.name},
            notes=encoder.notes,
            read_as=data.read_as,
            group=group,
            criterion=ChoiceLoss(group),
        )


def choices_of(row: Row) -> list[str]:
    """The answers of a row, two or more; DataError when there are not."""
    found = row.values.get("choices")
    if not isinstance(found, list) or len(found) < 2 or not all(isinstance(choice, str) for choice in found):
        raise DataError(f"{row.place}: needs a list of two texts or more under 'choices', not {str(found)[:40]}")
    return found


def _sample(row: Row, choices: Sequence[EncodedRow]) -> list[Example]:
    """The choices of a row; the first one carries which of them is right."""
    label = row.values.get("label")
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < len(choices):
        raise DataError(f"{row.place}: needs the place of the right choice, 0 to {len(choices) - 1}, not {label!r}")
    return [row_example(one, IGNORE if place else label, row, [1.0]) for place, one in enumerate(choices)]


TASK = MultipleChoice()
