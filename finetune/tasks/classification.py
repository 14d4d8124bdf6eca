"""Sequence classification: one label for a text, or any number of them, from a head that reads the whole of it.

A row is {"text": ..., "label": ...} or {"text": ..., "labels": [...]}; labels are text or whole numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from finetune.shapes import LABEL_SETS, LABELS
from finetune.task import Prepared
from finetune.tasks._labels import LabelTable, prepare_labels

if TYPE_CHECKING:
    from workbench.spec.model import ModelConfig
    from workbench.tokenizer import Tokenizer


class ClassificationTable(LabelTable):
    """[task] kind = "classification": tell which label a text has, or which ones."""

    kind: Literal["classification"] = "classification"


class Classification:
    """Labels of texts."""

    name = "classification"
    table = ClassificationTable

    def prepare(
        self, table: ClassificationTable, tokenizer: Tokenizer, *, model: ModelConfig, max_tokens: int
    ) -> Prepared:
        """The encoded rows; DataError for rows without a text or with a label that is not known."""
        return prepare_labels(table, self.name, tokenizer, max_tokens, LABELS, LABEL_SETS)


TASK = Classification()
