"""Embedding of texts: a query is to lie nearest to the text that belongs to it, among all of its step (InfoNCE).

A row is {"query": ..., "positive": ...}, with a "negative" that does not belong to it or without.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from finetune.rows import Row, text_of
from finetune.shapes import QUERIES
from finetune.task import IGNORE, Example, Prepared, TaskTable, pad_id_of, read
from finetune.tasks._texts import TextEncoder, row_example
from workbench.errors import DataError

if TYPE_CHECKING:
    from workbench.models.pooling import Pooling
    from workbench.spec.model import ModelConfig
    from workbench.tokenizer import Tokenizer


class EmbeddingTable(TaskTable):
    """[task] kind = "embedding": bring texts that belong together near each other."""

    kind: Literal["embedding"] = "embedding"
    pooling: Literal["mean", "last"] = Field(
        default="mean", description="A text's vector: the mean state of its tokens, or that of the last one."
    )
    temperature: float = Field(default=0.05, gt=0, description="Cosines are divided by it.")

    @property
    def keeps_steps_whole(self) -> bool:
        return True


class Embedding:
    """Vectors of texts."""

    name = "embedding"
    table = EmbeddingTable

    def prepare(self, table: EmbeddingTable, tokenizer: Tokenizer, *, model: ModelConfig, max_tokens: int) -> Prepared:
        """The encoded rows; DataError for rows without both texts."""
        from finetune.judges import VectorJudge
        from finetune.losses import ContrastiveLoss

        encoder = TextEncoder(tokenizer, max_tokens)
        found = read(table, QUERIES)
        rows = found.train
        keys = ("query", "positive", *(("negative",) if "negative" in rows[0].values else ()))

        def examples(rows: Sequence[Row]) -> list[Example]:
            if over := [row for row in rows if "negative" in row.values and "negative" not in keys]:
                raise DataError(f"{over[0].place}: has a 'negative', but the first training row has none; give all one")
            owners = [row for row in rows for _ in keys]
            encoded = encoder.encode(owners, [text_of(row, key) for row in rows for key in keys])
            return [
                row_example(one, IGNORE if place % len(keys) else 0, row)
                for place, (one, row) in enumerate(zip(encoded, owners, strict=True))
            ]

        pooling: Pooling = "mean_state" if table.pooling == "mean" else "last_state"
        return Prepared(
            train=examples(rows),
            held_out={name: examples(rows) for name, rows in found.held_out.items()},
            judge=VectorJudge(pooling, len(keys)),
            num_labels=0,
            pad_id=pad_id_of(tokenizer),
            identity={"kind": self.name, "pooling": table.pooling, "temperature": table.temperature},
            notes=encoder.notes,
            read_as=found.read_as,
            words=None,
            group=len(keys),
            criterion=ContrastiveLoss(pooling, len(keys), table.temperature),
        )


TASK = Embedding()
