"""Labels of words, such as names of persons and places: a head that reads every token.

A row is {"tokens": [words], "labels": [a label a word]}. The words are joined by spaces. One token of each word carries
its label: the first, as elsewhere, or in a model that sees only what came before, the last, which has seen the word.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from finetune.rows import Row
from finetune.shapes import WORDS
from finetune.spans import are_bio
from finetune.task import IGNORE, Example, LabelledTable, Prepared, pad_id_of, read
from finetune.tasks._labels import Label, class_of, labels_of, sorted_labels
from finetune.tasks._texts import TextEncoder
from workbench.errors import DataError

if TYPE_CHECKING:
    from workbench.spec.model import ModelConfig
    from workbench.tokenizer import EncodedRow, Tokenizer


class TokenClassificationTable(LabelledTable):
    """[task] kind = "token_classification": tell the label of each word."""

    kind: Literal["token_classification"] = "token_classification"
    labels: tuple[Label, ...] | None = Field(
        default=None, description="The labels in the order of the head's outputs; by default those of train, sorted."
    )


class TokenClassification:
    """Labels of words."""

    name = "token_classification"
    table = TokenClassificationTable

    def prepare(
        self, table: TokenClassificationTable, tokenizer: Tokenizer, *, model: ModelConfig, max_tokens: int
    ) -> Prepared:
        """The encoded rows; DataError for rows without a label for each word, or with one that is not known."""
        from finetune.judges import TokenJudge

        found = read(table, WORDS)
        rows = found.train
        names = list(table.labels) if table.labels is not None else sorted_labels(rows, several=True)
        if len(names) < 2:
            raise DataError(f"{rows[0].path}: needs two labels or more to tell apart, but has {names}")
        classes = {name: index for index, name in enumerate(names)}
        encoder = TextEncoder(tokenizer, max_tokens)

        def examples(rows: Sequence[Row]) -> list[Example]:
            labels = [_classes(row, classes) for row in rows]
            words = [words_of(row) for row in rows]
            encoded = encoder.encode(rows, [" ".join(spoken) for spoken in words])
            return [
                replace(labelled(one, spoken, numbers, last=model.causal), place=row.place)
                for one, spoken, numbers, row in zip(encoded, words, labels, rows, strict=True)
            ]

        train = examples(rows)
        common = Counter(int(i) for example in train for i in example.labels if i != IGNORE).most_common(1)[0][0]
        return Prepared(
            train=train,
            held_out={name: examples(rows) for name, rows in found.held_out.items()},
            judge=TokenJudge([str(name) for name in names], common=common, entities=are_bio(names)),
            num_labels=len(names),
            pad_id=pad_id_of(tokenizer),
            identity={"kind": self.name, "labels": names},
            notes=encoder.notes,
            read_as=found.read_as,
            label_tokens=True,
            problem_type="single_label_classification",
        )


def labelled(encoded: EncodedRow, words: Sequence[str], classes: Sequence[int], *, last: bool) -> Example:
    """The tokens of words that are joined by spaces, of which the first or the last of each word has its class."""
    labels = np.full(len(encoded.ids), IGNORE, dtype=np.int64)
    starts = np.cumsum([0, *(len(word) + 1 for word in words)])
    carrier: dict[int, int] = {}
    for place, (start, end) in enumerate(encoded.spans):
        # By its last character, for a token may begin with the space before its word; a space alone is of no word.
        word = int(np.searchsorted(starts, end - 1, side="right")) - 1
        if start < end <= starts[word] + len(words[word]) and (last or word not in carrier):
            carrier[word] = place
    for word, place in carrier.items():
        labels[place] = classes[word]
    return Example(np.array(encoded.ids, dtype=np.int64), labels, segments=np.array(encoded.segments, dtype=np.int64))


def words_of(row: Row) -> list[str]:
    """The words of a row; DataError when they are not a list of texts, none of them empty."""
    found = row.values.get("tokens")
    if not isinstance(found, list) or not found or not all(isinstance(word, str) and word for word in found):
        raise DataError(f"{row.place}: needs a list of words under 'tokens', not {str(found)[:40]}")
    return found


def _classes(row: Row, classes: Mapping[Label, int]) -> list[int]:
    labels, words = labels_of(row, several=True), words_of(row)
    if len(labels) != len(words):
        raise DataError(f"{row.place}: has {len(words)} words, but {len(labels)} labels; give one for each word")
    return [class_of(row, label, classes) for label in labels]


TASK = TokenClassification()
