"""Encoded examples as the engine wants them: microbatches in an order that the seed alone decides, padded to the right.

A row is an example, or several that do not see each other.

The n-th row of a run is a function of n: not of ranks, batch size or steps, so a resume only needs to know n.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from finetune.packing import bins_of
from finetune.task import IGNORE, Example, Judge, Prepared
from pretrain.engine import Evaluation, Permutation, Rows, Share
from workbench.models.batch import Batch
from workbench.models.decoder import Output


class TaskObjective:
    """Learns from the training rows of a task, judged by its held-out rows (`Objective`)."""

    def __init__(
        self,
        prepared: Prepared,
        *,
        seed: int,
        judged_by: Sequence[str] = ("valid",),
        packed_tokens: int | None = None,
    ) -> None:
        """packed_tokens: of the rows that examples share; None when each has its own."""
        self._prepared = prepared
        lengths = [len(example.input_ids) for example in prepared.train]
        self._bins = None if packed_tokens is None else bins_of(lengths, packed_tokens, seed=seed)
        size = len(lengths if self._bins is None else self._bins)
        self._order = lru_cache(maxsize=4)(lambda epoch: Permutation(size, key=f"seed {seed}/rows/epoch {epoch}"))
        self.evaluations: tuple[Evaluation, ...] = evaluations(prepared, judged_by)
        packing = {} if packed_tokens is None else {"packed_tokens": packed_tokens}
        self.identity: dict[str, Any] = {**prepared.identity, "seed": seed, "rows": size, **packing}

    def train_rows(self, share: Share, *, step: int, first_sample: int, global_size: int) -> list[Rows]:
        """This rank's microbatches of the step that begins at row `first_sample` of the endless order.

        Rows of like length share a microbatch, so that little is padded; which rows make the step does not change.
        """
        order = sorted(range(first_sample, first_sample + global_size), key=lambda n: (self._length(n), n))
        starts = range(share.dp_rank * share.micro_size, global_size, share.dp_size * share.micro_size)
        return [self._rows(order[start : start + share.micro_size]) for start in starts]

    def _length(self, sample: int) -> int:
        return sum(len(example.input_ids) for example in self._examples(sample))

    def _rows(self, ids: Sequence[int]) -> Rows:
        rows, pad_id = [self._examples(n) for n in ids], self._prepared.pad_id
        return pad([row[0] for row in rows], ids, pad_id) if self._bins is None else pack(rows, ids, pad_id)

    def _examples(self, sample: int) -> list[Example]:
        """What row `sample` of the endless order holds."""
        epoch, position = divmod(sample, self.identity["rows"])
        row = self._order(epoch)(position)
        return [self._prepared.train[n] for n in ([row] if self._bins is None else self._bins[row])]


class TaskEvaluation:
    """The judge's metrics over all held-out rows (`Evaluation`). Rows of like length share a batch."""

    def __init__(self, name: str, examples: Sequence[Example], judge: Judge, pad_id: int) -> None:
        self.name, self.output = name, _output(judge)
        self._examples, self._judge, self._pad_id = examples, judge, pad_id

    def batches(self, share: Share, *, num_microbatches: int, max_samples: int | None) -> Iterator[list[Rows]]:
        """This rank's microbatches; the same number on each, filled up with rows without labels."""
        total = min(len(self._examples), max_samples or len(self._examples))
        order = sorted(range(total), key=lambda index: (len(self._examples[index].input_ids), index))
        across = share.micro_size * share.dp_size
        for first in range(0, total, across * num_microbatches):
            starts = range(first + share.dp_rank * share.micro_size, first + across * num_microbatches, across)
            yield [self._rows(order[start : start + share.micro_size], share.micro_size) for start in starts]

    def tally(self, batch: Batch, output: torch.Tensor) -> torch.Tensor:
        return self._judge.tally(batch, output)

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        return self._judge.metrics(sums)

    def _rows(self, indices: Sequence[int], size: int) -> Rows:
        examples = [self._examples[index] for index in indices]
        like = self._examples[0].labels
        empty = Example(np.full(1, self._pad_id), np.full(like.shape and 1, IGNORE))
        missing = size - len(examples)
        return pad([*examples, *[empty] * missing], [*indices, *[0] * missing], self._pad_id)


def evaluations(prepared: Prepared, names: Sequence[str]) -> tuple[Evaluation, ...]:
    """Those of the task's evaluations that are called one of `names`."""
    return tuple(
        TaskEvaluation(name, examples, prepared.judge, prepared.pad_id)
        for name, examples in prepared.held_out.items()
        if name in names
    )


def pad(examples: Sequence[Example], sample_ids: Sequence[int], pad_id: int) -> Rows:
    """The examples as one microbatch as long as the longest of them."""
    lengths = np.array([len(example.input_ids) for example in examples], dtype=np.int64)
    shape = (len(examples), int(lengths.max()))
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    by_token = examples[0].labels.ndim > 0
    labels = np.full(shape if by_token else shape[:1], IGNORE, dtype=np.int64)
    for row, example in enumerate(examples):
        input_ids[row, : lengths[row]] = example.input_ids
        if by_token:
            labels[row, : lengths[row]] = example.labels
        else:
            labels[row] = example.labels
    return Rows(input_ids, labels, np.array(sample_ids, dtype=np.int64), lengths)


def pack(bins: Sequence[Sequence[Example]], sample_ids: Sequence[int], pad_id: int) -> Rows:
    """One row a bin. A document is numbered by the place where it begins; each token of padding is one of its own."""
    joined = [
        Example(np.concatenate([one.input_ids for one in parts]), np.concatenate([one.labels for one in parts]))
        for parts in bins
    ]
    rows = pad(joined, sample_ids, pad_id)
    documents = np.tile(np.arange(rows.input_ids.shape[1]), (len(bins), 1))
    for row, parts in enumerate(bins):
        lengths = [len(one.input_ids) for one in parts]
        documents[row, : sum(lengths)] = np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
    return replace(rows, documents=documents)


def _output(judge: Judge) -> Output:
    return judge.output
