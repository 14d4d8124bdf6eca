"""Classification of pairs of texts: does the one follow from the other, do they say the same, does it answer.

A row is {"text": ..., "text_pair": ..., "label": ...}. Both texts are read as one row, with the tokenizer's own
separator between them and, where the model knows kinds of segments, each as one of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from finetune.shapes import PAIR_SETS, PAIRS
from finetune.task import Prepared
from finetune.tasks._labels import LabelTable, prepare_labels

if TYPE_CHECKING:
    from workbench.spec.model import ModelConfig
    from workbench.tokenizer import Tokenizer


class PairTable(LabelTable):
    """[task] kind = "pair": tell which label two texts have together."""

    kind: Literal["pair"] = "pair"


class Pair:
    """Labels of pairs of texts."""

    name = "pair"
    table = PairTable

    def prepare(self, table: PairTable, tokenizer: Tokenizer, *, model: ModelConfig, max_tokens: int) -> Prepared:
        """The encoded rows; DataError for rows without both texts or with a label that is not known."""
        return prepare_labels(table, self.name, tokenizer, max_tokens, PAIRS, PAIR_SETS)


TASK = Pair()
