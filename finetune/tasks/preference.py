"""Preference: the model learns to give the answers that people prefer, by DPO, IPO, ORPO or KTO.

A row is {"prompt", "chosen", "rejected"}; for KTO also {"prompt", "completion", "label": true or false}. Answers are
text, or lists of messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from finetune.dialogues import Dialogue, DialogueEncoder, Encoded, dialogue
from finetune.rows import Row
from finetune.shapes import JUDGED, PREFERENCES
from finetune.task import IGNORE, Example, Prepared, TaskTable, TooLong, eos_id_of, pad_id_of, read
from pretrain.data.permutation import Permutation
from workbench.errors import DataError

if TYPE_CHECKING:
    from workbench.spec.model import ModelConfig
    from workbench.tokenizer import Tokenizer


_SETTINGS = {"loss", "beta", "label_smoothing", "desirable_weight", "undesirable_weight", "too_long"}


class PreferenceTable(TaskTable):
    """[task] kind = "preference": learn which of two answers is better, or whether one is good."""

    kind: Literal["preference"] = "preference"
    loss: Literal["dpo", "ipo", "orpo", "kto"] = Field(
        default="dpo",
        description="dpo, ipo: pairs, measured against the base. orpo: pairs, without a base. kto: single answers with "
        "a label, measured against the base.",
    )
    beta: float = Field(
        default=0.1, gt=0, description="How much the distance from the base costs; orpo: the weight of the odds."
    )
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5, description="dpo: the share of labels that are wrong.")
    desirable_weight: float = Field(default=1.0, gt=0, description="kto: the weight of desirable answers.")
    undesirable_weight: float = Field(default=1.0, gt=0, description="kto: the weight of undesirable answers.")
    too_long: TooLong = Field(
        default="truncate", description="What becomes of rows with an answer that ends beyond batch.seq_len."
    )

    @model_validator(mode="after")
    def _settings_belong_to_the_loss(self) -> Self:
        owners = {"label_smoothing": "dpo", "desirable_weight": "kto", "undesirable_weight": "kto"}
        if strays := [name for name, owner in owners.items() if owner != self.loss and name in self.model_fields_set]:
            raise ValueError("; ".join(f"{name} is for loss = '{owners[name]}', not '{self.loss}'" for name in strays))
        return self


class Preference:
    """Answers that are preferred to others."""

    name = "preference"
    table = PreferenceTable

    def prepare(self, table: PreferenceTable, tokenizer: Tokenizer, *, model: ModelConfig, max_tokens: int) -> Prepared:
        """The encoded rows, two by two; DataError for rows without answers, or whose answer is cut off whole."""
        from finetune.tasks._preference_loss import Kto, PairPreference

        eos_id_of(tokenizer)
        # The last token is only ever a label, so one more than max_tokens fits.
        encoder = DialogueEncoder(tokenizer, max_tokens + 1, table.too_long)
        judge: Kto | PairPreference
        if table.loss == "kto":
            weights = {"desirable_weight": table.desirable_weight, "undesirable_weight": table.undesirable_weight}
            found, examples, judge = read(table, PREFERENCES, JUDGED), _single, Kto(beta=table.beta, **weights)
        else:
            found, examples = read(table, PREFERENCES), _pairs
            judge = PairPreference(table.loss, beta=table.beta, label_smoothing=table.label_smoothing)
        return Prepared(
            train=examples(encoder, found.train, table.seed),
            held_out={name: examples(encoder, rows, table.seed) for name, rows in found.held_out.items()},
            judge=judge,
            num_labels=0,
            pad_id=pad_id_of(tokenizer),
            identity={"kind": self.name, **table.model_dump(include=_SETTINGS)},
            notes=encoder.notes,
            read_as=found.read_as,
            criterion=judge,
            group=2,
            reference=table.loss != "orpo",
        )


def _pairs(encoder: DialogueEncoder, rows: Sequence[Row], seed: int) -> list[Example]:
    """The preferred answer and the other one of each row."""
    found = encoder.encode([(dialogue(row, "chosen"), dialogue(row, "rejected")) for row in rows])
    return [_example(one) for group in found if group is not None for one in group]


def _single(encoder: DialogueEncoder, rows: Sequence[Row], seed: int) -> list[Example]:
    """Each answer, and its prompt with the answer to another one, chosen by the seed alone."""
    labelled = [one for row in rows for one in _labelled(row)]
    if len(labelled) < 2:
        raise DataError(f"{rows[0].place}: is the only answer, but loss = 'kto' compares with answers to other prompts")
    order = [*map(Permutation(len(labelled), key=f"seed {seed}/mismatched"), range(len(labelled)))]
    after = dict(zip(order, [*order[1:], order[0]], strict=True))
    groups = [
        (one, Dialogue(one.row, one.prompt, labelled[after[index]][0].answer))
        for index, (one, _) in enumerate(labelled)
    ]
    return [
        _example(one, desirable=float(desirable))
        for group, (_, desirable) in zip(encoder.encode(groups), labelled, strict=True)
        if group is not None
        for one in group
    ]


def _labelled(row: Row) -> list[tuple[Dialogue, bool]]:
    """The answers of a row, and whether each is desirable."""
    if "chosen" in row.values:
        return [(dialogue(row, "chosen"), True), (dialogue(row, "rejected"), False)]
    label = row.values.get("label")
    if not isinstance(label, bool):
        raise DataError(f"{row.place}: needs true or false under 'label' beside 'completion', not {label!r}")
    return [(dialogue(row, "completion"), label)]


def _example(one: Encoded, **values: float) -> Example:
    """Each token labelled with the one after it, where that is the answer's."""
    ids = np.array(one.ids, dtype=np.int64)
    return Example(ids[:-1], np.where(one.is_answer[1:], ids[1:], IGNORE), one.place, values=values)


TASK = Preference()
