"""Sequence classification: one of a few labels for a text, from a head on its last token.

A row is {"text": ..., "label": ...}; labels are text or whole numbers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from finetune.jsonl import Row, places, read_rows, text_of
from finetune.task import IGNORE, Example, LabelledTable, Prepared, files_of, pad_id_of
from workbench.config_faults import nearest
from workbench.errors import DataError

if TYPE_CHECKING:
    import torch

    from workbench.models.batch import Batch
    from workbench.tokenizer import Tokenizer

Label = str | int


class ClassificationTable(LabelledTable):
    """[task] kind = "classification": tell which label a text has."""

    kind: Literal["classification"] = "classification"
    labels: tuple[Label, ...] | None = Field(
        default=None, description="The labels in the order of the head's outputs; by default those of train, sorted."
    )


class Classification:
    """Labels of texts."""

    name = "classification"
    table = ClassificationTable

    def prepare(self, table: ClassificationTable, tokenizer: Tokenizer, *, max_tokens: int) -> Prepared:
        """The encoded rows; DataError for rows without a text or with a label that is not known."""
        rows = read_rows(table.train)
        names = list(table.labels) if table.labels is not None else _sorted_labels(rows)
        if len(names) < 2:
            raise DataError(
                f"{rows[0].path}: only the label {names[0]!r} occurs in {len(rows)} rows, so there is nothing to tell "
                "apart; add rows with other labels"
            )
        encoder = _Encoder(tokenizer, max_tokens, {name: index for index, name in enumerate(names)})
        train = encoder.examples(rows)
        held_out = {name: encoder.examples(read_rows(paths)) for name, paths in files_of(table).items()}
        common = Counter(int(example.labels) for example in train).most_common(1)[0][0]
        return Prepared(
            train=train,
            held_out=held_out,
            judge=LabelJudge(common),
            num_labels=len(names),
            pad_id=pad_id_of(tokenizer),
            identity={"kind": self.name, "labels": names},
            notes=encoder.notes,
        )


class _Encoder:
    """Rows to examples; keeps notes of those that did not fit."""

    def __init__(self, tokenizer: Tokenizer, max_tokens: int, classes: Mapping[Label, int]) -> None:
        self.tokenizer, self.max_tokens, self.classes = tokenizer, max_tokens, classes
        self.notes: list[str] = []

    def examples(self, rows: Sequence[Row]) -> list[Example]:
        labels = [self._class(row) for row in rows]
        start, end = self.tokenizer.start_ids, self.tokenizer.end_ids
        room = self.max_tokens - len(start) - len(end)
        ids = self.tokenizer.encode_batch([text_of(row, "text") for row in rows])
        if empty := [row for row, tokens in zip(rows, ids, strict=True) if not tokens]:
            raise DataError(f"{len(empty)} rows have an empty text ({places(empty)}); remove them")
        if cut := [row for row, tokens in zip(rows, ids, strict=True) if len(tokens) > room]:
            what = f"{len(cut)} rows are longer than {self.max_tokens} tokens ({places(cut)})"
            self.notes.append(f"{what}; only their beginning is read")
        return [
            Example(np.array([*start, *tokens[:room], *end], dtype=np.int64), np.array(label, dtype=np.int64))
            for tokens, label in zip(ids, labels, strict=True)
        ]

    def _class(self, row: Row) -> int:
        label = _label(row)
        if label not in self.classes:
            known = {str(name): name for name in self.classes}
            raise DataError(f"{row.place}: label {label!r} is not known{nearest(str(label), known)}")
        return self.classes[label]


class LabelJudge:
    """Accuracy with its standard error, beside that of always saying the commonest label of the training rows."""

    output: Literal["loss", "token_losses", "logits"] = "logits"

    def __init__(self, common: int) -> None:
        self._common = common

    def tally(self, batch: Batch, output: torch.Tensor) -> torch.Tensor:
        import torch
        import torch.nn.functional as F

        assert batch.labels is not None
        wide = output.to(torch.promote_types(output.dtype, torch.float32))
        loss = F.cross_entropy(wide, batch.labels, ignore_index=IGNORE, reduction="sum")
        right = output.argmax(dim=-1) == batch.labels
        counts = [right.sum(), (batch.labels == self._common).sum(), (batch.labels != IGNORE).sum()]
        return torch.stack([loss.double(), *(count.double() for count in counts)])

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        loss, right, common, rows = sums
        rows = max(rows, 1.0)
        accuracy = right / rows
        return {
            "loss": loss / rows,
            "accuracy": accuracy,
            "accuracy_error": math.sqrt(accuracy * (1 - accuracy) / rows),
            "majority": common / rows,
            "rows": rows,
        }


def _label(row: Row) -> Label:
    label = row.values.get("label")
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise DataError(f"{row.place}: needs a label, text or a whole number, under 'label', not {label!r}")
    return label


def _sorted_labels(rows: Sequence[Row]) -> list[Label]:
    """Numbers by value, then text by alphabet."""
    return sorted({_label(row) for row in rows}, key=lambda label: (isinstance(label, str), label))


TASK = Classification()
