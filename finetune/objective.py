"""Encoded examples as the engine wants them: microbatches in an order that the seed alone decides, padded to the right.

The n-th row of a run is a function of n: not of ranks, batch size or steps, so a resume only needs to know n. Where
rows belong together (`Prepared.group`), the n-th group is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from finetune.task import IGNORE, Example, Prepared
from pretrain.engine import Criterion, Evaluation, Permutation, Rows, Share
from workbench.models.batch import Batch


class TaskObjective:
    """Learns from the training rows of a task, judged by its held-out rows (`Objective`)."""

    def __init__(self, prepared: Prepared, *, seed: int, judged_by: Sequence[str] = ("valid",)) -> None:
        self._prepared = prepared
        self.criterion: Criterion = prepared.criterion or Criterion()
        size = len(prepared.train) // prepared.group
        self._order = lru_cache(maxsize=4)(lambda epoch: Permutation(size, key=f"seed {seed}/rows/epoch {epoch}"))
        self.evaluations: tuple[Evaluation, ...] = evaluations(prepared, judged_by)
        self.identity: dict[str, Any] = {**prepared.identity, "seed": seed, "rows": size}

    def train_rows(self, share: Share, *, step: int, first_sample: int, global_size: int) -> list[Rows]:
        """This rank's microbatches of the step that begins at sample `first_sample` of the endless order.

        Samples of like length share a microbatch, so that little is padded; which make the step does not change.
        """
        order = sorted(range(first_sample, first_sample + global_size), key=lambda n: (self._length(n), n))
        starts = range(share.dp_rank * share.micro_size, global_size, share.dp_size * share.micro_size)
        return [self._rows(order[start : start + share.micro_size]) for start in starts]

    def _length(self, sample: int) -> int:
        return longest(self._examples(sample))

    def _rows(self, samples: Sequence[int]) -> Rows:
        group, vary = self._prepared.group, self._prepared.vary
        found = [example for n in samples for example in self._examples(n)]
        ids = [n * group + row for n in samples for row in range(group)]
        if vary is not None:
            found = [vary(example, n) for example, n in zip(found, ids, strict=True)]
        rows = pad(found, ids, self._prepared.pad_id)
        return rows if group == 1 else replace(rows, terms=len(samples))

    def _examples(self, sample: int) -> Sequence[Example]:
        epoch, position = divmod(sample, self.identity["rows"])
        return group_of(self._prepared.train, self._order(epoch)(position), self._prepared.group)


class TaskEvaluation:
    """The judge's metrics over all held-out rows (`Evaluation`). Samples of like length share a batch."""

    def __init__(self, name: str, examples: Sequence[Example], prepared: Prepared) -> None:
        self.name, self.output = name, prepared.judge.output
        self._examples, self._judge = examples, prepared.judge
        self._pad_id, self._group = prepared.pad_id, prepared.group

    def batches(self, share: Share, *, num_microbatches: int, max_samples: int | None) -> Iterator[list[Rows]]:
        """This rank's microbatches; the same number on each, filled up with rows without labels, whose id is -1."""
        count = len(self._examples) // self._group
        total = min(count, max_samples or count)
        order = sorted(range(total), key=lambda index: (longest(self._sample(index)), index))
        across = share.micro_size * share.dp_size
        for first in range(0, total, across * num_microbatches):
            starts = range(first + share.dp_rank * share.micro_size, first + across * num_microbatches, across)
            yield [self._rows(order[start : start + share.micro_size], share.micro_size) for start in starts]

    def tally(self, batch: Batch, output: torch.Tensor) -> torch.Tensor:
        return self._judge.tally(batch, output)

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        return self._judge.metrics(sums)

    def _rows(self, indices: Sequence[int], size: int) -> Rows:
        examples = [example for index in indices for example in self._sample(index)]
        ids = [index * self._group + row for index in indices for row in range(self._group)]
        missing = size * self._group - len(examples)
        filler = empty(self._examples[0], self._pad_id)
        return pad([*examples, *[filler] * missing], [*ids, *[-1] * missing], self._pad_id)

    def _sample(self, index: int) -> Sequence[Example]:
        return group_of(self._examples, index, self._group)


def group_of(examples: Sequence[Example], index: int, group: int) -> Sequence[Example]:
    """The rows of the sample at `index`."""
    return examples[index * group : (index + 1) * group]


def longest(examples: Sequence[Example]) -> int:
    """Tokens of the longest row."""
    return max(len(example.input_ids) for example in examples)


def evaluations(prepared: Prepared, names: Sequence[str]) -> tuple[Evaluation, ...]:
    """Those of the task's evaluations that are called one of `names`."""
    return tuple(
        TaskEvaluation(name, examples, prepared) for name, examples in prepared.held_out.items() if name in names
    )


def empty(like: Example, pad_id: int) -> Example:
    """A row of one token and no labels, of the kind of another."""
    one = np.zeros(1, dtype=np.int64)
    return Example(
        one + pad_id,
        np.full(like.labels.shape and 1, IGNORE),
        segments=None if like.segments is None else one,
        documents=None if like.documents is None else one,
        values=like.values,
    )


def pad(examples: Sequence[Example], sample_ids: Sequence[int], pad_id: int) -> Rows:
    """The examples as one microbatch as long as the longest of them."""
    lengths = np.array([len(example.input_ids) for example in examples], dtype=np.int64)

    def filled(arrays: Sequence[np.ndarray | None], fill: int) -> np.ndarray | None:
        if arrays[0] is None:
            return None
        whole = np.full((len(arrays), int(lengths.max())), fill, dtype=np.int64)
        for row, array in zip(whole, arrays, strict=True):
            assert array is not None
            row[: len(array)] = array
        return whole

    input_ids = filled([example.input_ids for example in examples], pad_id)
    by_token = examples[0].labels.ndim > 0
    labels = filled([e.labels for e in examples], IGNORE) if by_token else np.array([int(e.labels) for e in examples])
    assert input_ids is not None and labels is not None
    return Rows(
        input_ids,
        labels,
        np.array(sample_ids, dtype=np.int64),
        lengths,
        segments=filled([example.segments for example in examples], 0),
        documents=filled([example.documents for example in examples], -1),
        values={name: np.array([example.values[name] for example in examples]) for name in examples[0].values},
    )
