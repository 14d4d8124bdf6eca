"""Supervised fine-tuning: the model learns to answer, and only the answer's tokens (its end included) are supervised.

A row is {"prompt", "completion"}, {"instruction", "input" (or not), "output"}, or {"messages": [{"role", "content"}]}.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from finetune.chat import ChatTemplate, Piece
from finetune.jsonl import Row, places, read_rows, text_of
from finetune.task import IGNORE, Example, LabelledTable, Prepared, files_of, pad_id_of
from workbench.errors import DataError

if TYPE_CHECKING:
    import torch

    from workbench.models.batch import Batch
    from workbench.tokenizer import Tokenizer


class SftTable(LabelledTable):
    """[task] kind = "sft": learn to answer prompts."""

    kind: Literal["sft"] = "sft"
    too_long: Literal["truncate", "drop", "error"] = Field(
        default="truncate", description="What becomes of rows longer than batch.seq_len."
    )
    exact_match: bool = Field(
        default=True, description="Also report how many answers greedy decoding would give back word for word."
    )


class Sft:
    """Answers to prompts."""

    name = "sft"
    table = SftTable

    def prepare(self, table: SftTable, tokenizer: Tokenizer, *, max_tokens: int) -> Prepared:
        """The encoded rows; DataError for rows without an answer, or whose answer is cut off whole."""
        if tokenizer.eos_id is None:
            raise DataError(
                f"{tokenizer.path}: the tokenizer names no end-of-text token, so the model would never learn to stop; "
                "name an eos_token in its tokenizer_config.json"
            )
        encoder = _Encoder(tokenizer, max_tokens, table.too_long)
        train = encoder.examples(read_rows(table.train))
        held_out = {name: encoder.examples(read_rows(paths)) for name, paths in files_of(table).items()}
        return Prepared(
            train=train,
            held_out=held_out,
            judge=AnswerJudge() if table.exact_match else AnswerLoss(),
            num_labels=0,
            pad_id=pad_id_of(tokenizer),
            identity={"kind": self.name, "too_long": table.too_long},
            notes=encoder.notes,
        )


class _Encoder:
    """Rows to examples; keeps notes of those that did not fit."""

    def __init__(self, tokenizer: Tokenizer, max_tokens: int, too_long: str) -> None:
        self.tokenizer, self.max_tokens, self.too_long = tokenizer, max_tokens, too_long
        self.notes: list[str] = []
        self._template: ChatTemplate | None = None

    def examples(self, rows: Sequence[Row]) -> list[Example]:
        conversations = [self._pieces(row) for row in rows]
        ids = iter(self.tokenizer.encode_batch([text for pieces in conversations for text, _ in pieces]))
        encoded = [[(next(ids), learned) for _, learned in pieces] for pieces in conversations]
        made = [self._example(row, pieces) for row, pieces in zip(rows, encoded, strict=True)]
        too_long = [row for row, (_, cut) in zip(rows, made, strict=True) if cut]
        self._report(too_long)
        kept = [(row, example) for row, (example, cut) in zip(rows, made, strict=True) if self._keeps(cut)]
        masked = [row for row, example in kept if not example.num_labels]
        if masked:
            raise DataError(
                f"{len(masked)} rows have no token to learn within {self.max_tokens} tokens: the prompt alone fills "
                f"them, or the answer is empty ({places(masked)}); raise batch.seq_len or set task.too_long = 'drop'"
            )
        if not kept:
            raise DataError(f"all {len(too_long)} rows are longer than {self.max_tokens} tokens; raise batch.seq_len")
        return [example for _, example in kept]

    def _keeps(self, cut: bool) -> bool:
        return not (cut and self.too_long == "drop")

    def _pieces(self, row: Row) -> list[Piece]:
        if "messages" in row.values:
            self._template = self._template or ChatTemplate(self.tokenizer)
            return self._template.pieces(row)
        if "instruction" in row.values:
            context = text_of(row, "input") if row.values.get("input") else ""
            prompt = "".join(f"{part}\n\n" for part in (text_of(row, "instruction"), context) if part)
            return [(prompt, False), (_answer(row, "output"), True)]
        return [(text_of(row, "prompt"), False), (_answer(row, "completion"), True)]

    def _example(self, row: Row, pieces: Sequence[tuple[list[int], bool]]) -> tuple[Example, bool]:
        """The example, and whether it was longer than allowed. Each token is labelled with the one after it."""
        eos = self.tokenizer.eos_id
        assert eos is not None
        start = [] if "messages" in row.values else self.tokenizer.start_ids
        ids = [*start, *(token for tokens, _ in pieces for token in tokens)]
        learned = [False] * len(start) + [flag for tokens, flag in pieces for _ in tokens]
        if ids[-1] != eos and "messages" not in row.values:
            ids, learned = [*ids, eos], [*learned, True]
        # The last token is only ever a label, so one more than max_tokens fits.
        cut = len(ids) > self.max_tokens + 1
        ids, learned = ids[: self.max_tokens + 1], learned[: self.max_tokens + 1]
        labels = np.where(learned[1:], ids[1:], IGNORE) if len(ids) > 1 else np.full(1, IGNORE)
        return Example(np.array(ids[:-1] or ids, dtype=np.int64), labels.astype(np.int64)), cut

    def _report(self, rows: Sequence[Row]) -> None:
        if not rows:
            return
        what = f"{len(rows)} rows are longer than {self.max_tokens} tokens ({places(rows)})"
        if self.too_long == "error":
            raise DataError(f"{what}; raise batch.seq_len, or set task.too_long = 'truncate' or 'drop'")
        self.notes.append(f"{what}; they were {'cut' if self.too_long == 'truncate' else 'left out'}")


class AnswerLoss:
    """Mean loss of the answers' tokens."""

    output: Literal["loss", "token_losses", "logits"] = "loss"

    def tally(self, batch: Batch, output: torch.Tensor) -> torch.Tensor:
        import torch

        assert batch.labels is not None
        return torch.stack([output.double(), (batch.labels != IGNORE).sum().double()])

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        loss = sums[0] / max(sums[1], 1.0)
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": sums[1]}


class AnswerJudge(AnswerLoss):
    """Also the share of tokens, and of whole answers, that the model would choose itself.

    When every token of an answer is the likeliest after those before it, then greedy decoding gives just this answer,
    and its end; so exact match costs no decoding.
    """

    output: Literal["loss", "token_losses", "logits"] = "logits"

    def tally(self, batch: Batch, output: torch.Tensor) -> torch.Tensor:
        import torch
        import torch.nn.functional as F

        assert batch.labels is not None
        counted = batch.labels != IGNORE
        wide = output.flatten(0, 1).to(torch.promote_types(output.dtype, torch.float32))
        loss = F.cross_entropy(wide, batch.labels.flatten(), ignore_index=IGNORE, reduction="sum")
        right = (output.argmax(dim=-1) == batch.labels) & counted
        answers = counted.any(dim=1)
        whole = answers & (right | ~counted).all(dim=1)
        counts = [counted.sum(), right.sum(), whole.sum(), answers.sum()]
        return torch.stack([loss.double(), *(count.double() for count in counts)])

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        loss, tokens, right, whole, answers = sums
        share = whole / max(answers, 1.0)
        return {
            **super().metrics([loss, tokens]),
            "token_accuracy": right / max(tokens, 1.0),
            "exact_match": share,
            "exact_match_error": math.sqrt(share * (1 - share) / max(answers, 1.0)),
            "answers": answers,
        }


def _answer(row: Row, key: str) -> str:
    answer = text_of(row, key)
    if not answer:
        raise DataError(f"{row.place}: {key!r} is empty; every row needs an answer to learn")
    return answer


TASK = Sft()
