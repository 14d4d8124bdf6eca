"""What tasks that choose labels for a row share: one label a row under "label", or a list of them under "labels"."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from finetune.rows import Row
from finetune.shapes import Shape
from finetune.task import Example, LabelledTable, Prepared, pad_id_of, read
from finetune.tasks._texts import TextEncoder, row_example, texts_of
from workbench.config_faults import nearest
from workbench.errors import DataError

if TYPE_CHECKING:
    from pretrain.engine import Criterion
    from workbench.tokenizer import Tokenizer

Label = str | int


class LabelTable(LabelledTable):
    """What the [task] table of a classification has."""

    labels: tuple[Label, ...] | None = Field(
        default=None, description="The labels in the order of the head's outputs; by default those of train, sorted."
    )
    class_weights: tuple[float, ...] | Literal["none", "balanced"] = Field(
        default="none",
        description='How many times a row of each label counts, in the order of labels; "balanced": each label as '
        "much as any other. Where a row has several labels: how much more its presence counts than its absence.",
    )


def prepare_labels(table: LabelTable, kind: str, tokenizer: Tokenizer, max_tokens: int, *shapes: Shape) -> Prepared:
    """The encoded rows; DataError for rows without a text or with a label that is not known."""
    from finetune.judges import LabelJudge, MultiLabelJudge
    from finetune.losses import LabelLoss, MultiLabelLoss

    found = read(table, *shapes)
    rows = found.train
    several = "labels" in rows[0].values
    names = list(table.labels) if table.labels is not None else sorted_labels(rows, several=several)
    if len(names) < 2:
        raise DataError(
            f"{rows[0].path}: only the label {names[0]!r} occurs in {len(rows)} rows, so there is nothing to tell "
            "apart; add rows with other labels"
        )
    encoder = TextEncoder(tokenizer, max_tokens)
    classes = {name: index for index, name in enumerate(names)}

    def examples(rows: Sequence[Row]) -> list[Example]:
        sets = [[class_of(row, label, classes) for label in labels_of(row, several=several)] for row in rows]
        encoded = encoder.encode(rows, [texts_of(row) for row in rows])
        if not several:
            return [row_example(one, chosen[0], row) for one, chosen, row in zip(encoded, sets, rows, strict=True)]
        return [
            row_example(one, 0, row, [float(index in chosen) for index in range(len(names))])
            for one, chosen, row in zip(encoded, sets, rows, strict=True)
        ]

    train = examples(rows)
    weights = class_weights(table, train, len(names))
    common = Counter(_answer(example) for example in train).most_common(1)[0][0]
    smoothing = table.label_smoothing
    criterion: Criterion | None = None
    if several:
        criterion = MultiLabelLoss(weights, smoothing)
    elif weights is not None:
        criterion = LabelLoss(weights, smoothing)
    return Prepared(
        train=train,
        held_out={name: examples(rows) for name, rows in found.held_out.items()},
        judge=MultiLabelJudge(common) if several else LabelJudge(int(common[0])),
        num_labels=len(names),
        pad_id=pad_id_of(tokenizer),
        identity={"kind": kind, "labels": names},
        notes=encoder.notes,
        read_as=found.read_as,
        problem_type="multi_label_classification" if several else "single_label_classification",
        criterion=criterion,
    )


def class_weights(table: LabelTable, train: Sequence[Example], num_labels: int) -> tuple[float, ...] | None:
    """The weight of each label, if there are any; DataError unless there is one for each.

    Balanced ones are inverse to how often the label occurs, so that the mean weight of a training row is one; where
    rows have several labels, they make up for how much rarer presence is than absence.
    """
    if table.class_weights == "none":
        return None
    if table.class_weights == "balanced":
        several = "target" in train[0].values
        answers = np.array([_answer(example) for example in train])
        counts = answers.sum(axis=0) if several else np.bincount(answers[:, 0].astype(int), minlength=num_labels)
        counts = np.maximum(counts, 1)
        balanced = (len(train) - counts) / counts if several else len(train) / (num_labels * counts)
        return tuple(balanced.tolist())
    if len(table.class_weights) != num_labels:
        raise DataError(
            f"task.class_weights has {len(table.class_weights)} numbers, but there are {num_labels} labels; give one "
            "for each"
        )
    return table.class_weights


def class_of(row: Row, label: Label, classes: Mapping[Label, int]) -> int:
    """The number of a label; DataError when it is not known."""
    if label not in classes:
        known = {str(name): name for name in classes}
        raise DataError(f"{row.place}: label {label!r} is not known{nearest(str(label), known)}")
    return classes[label]


def labels_of(row: Row, *, several: bool) -> list[Label]:
    """The labels of a row: one, or a list of any number."""
    key = "labels" if several else "label"
    given = row.values.get(key)
    found = given if several else [given]
    if not isinstance(found, list) or not all(_is_label(label) for label in found):
        what = "a list of labels, each" if several else "a label,"
        raise DataError(f"{row.place}: needs {what} text or a whole number, under {key!r}, not {given!r}")
    return found


def sorted_labels(rows: Sequence[Row], *, several: bool) -> list[Label]:
    """Every label of the rows: numbers by value, then text by alphabet."""
    found = {label for row in rows for label in labels_of(row, several=several)}
    return sorted(found, key=lambda label: (isinstance(label, str), label))


def _is_label(value: object) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)


def _answer(example: Example) -> tuple[float, ...]:
    """The class number of a row, or which labels it has."""
    return tuple(np.atleast_1d(example.values.get("target", example.labels)).astype(float).tolist())
