"""Microbatches of one data-parallel rank, as a pure function of the step: there is no cursor to save."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from pretrain.data.sampler import Ids, Sampler
from workbench.errors import DataError


@dataclass(frozen=True)
class Microbatch:
    """`input_ids` [B, T], `labels` [B, T] (already shifted, IGNORE = -100) and `sample_ids` [B]; all int64.

    `documents` [B, T] numbers those of each row that do not see each other; None where rows are one stream. lengths,
    pair_labels [B], segments [B, T] and decoder_ids [B, U]: as in a sample, None where it has none.
    """

    input_ids: Ids
    labels: Ids
    sample_ids: Ids
    documents: Ids | None = None
    lengths: Ids | None = None
    segments: Ids | None = None
    pair_labels: Ids | None = None
    decoder_ids: Ids | None = None


class Loader:
    """Endless batches of one sampler. `vocab_size` (of the model), if given, bounds the ids that may come out."""

    def __init__(self, sampler: Sampler, *, vocab_size: int | None = None) -> None:
        self.sampler, self.seq_len = sampler, sampler.seq_len
        self._vocab_size = vocab_size

    def batch(
        self,
        step: int,
        *,
        global_size: int,
        micro_size: int,
        dp_rank: int,
        dp_size: int,
        first_sample: int | None = None,
    ) -> list[Microbatch]:
        """The rank's microbatches of `step`, which begins at sample step * global_size unless `first_sample` says so.

        Row b of microbatch m is global sample first + m * (dp_size * micro_size) + dp_rank * micro_size + b: the set of
        samples of a step does not depend on micro_size or dp_size.
        """
        across = dp_size * micro_size
        assert global_size % across == 0, (global_size, dp_size, micro_size)
        first = step * global_size if first_sample is None else first_sample
        starts = range(first + dp_rank * micro_size, first + global_size, across)
        return [self.rows(np.arange(start, start + micro_size)) for start in starts]

    def rows(self, sample_ids: Ids) -> Microbatch:
        """The microbatch of these global samples."""
        samples = [self.sampler.sample(int(index)) for index in sample_ids]

        def stacked(values: Iterable[Ids | int | None]) -> Ids | None:
            found = [value for value in values if value is not None]
            return np.stack(found).astype(np.int64) if found else None

        input_ids = np.stack([sample.input_ids for sample in samples])
        labels = np.stack([sample.labels for sample in samples])
        self._check(input_ids, labels)
        lengths = stacked(sample.length for sample in samples)
        return Microbatch(
            input_ids,
            labels,
            sample_ids.astype(np.int64),
            documents=stacked(sample.documents for sample in samples),
            lengths=None if lengths is None or (lengths == self.seq_len).all() else lengths,
            segments=stacked(sample.segments for sample in samples),
            pair_labels=stacked(sample.pair_label for sample in samples),
            decoder_ids=stacked(sample.decoder_ids for sample in samples),
        )

    def _check(self, input_ids: Ids, labels: Ids) -> None:
        # A vocabulary-parallel embedding silently gives zeros for an id that no rank holds.
        if self._vocab_size is None:
            return
        largest = max(int(input_ids.max()), int(labels.max()))
        if largest >= self._vocab_size:
            raise DataError(
                f"the data holds token id {largest}, but the model's vocab_size is {self._vocab_size}; "
                "build the data with the model's tokenizer, or raise model.vocab_size"
            )


class EvaluationLoader(Loader):
    """Every token of the evaluation data once, in a fixed order; `num_samples` sequences."""

    def __init__(
        self,
        sampler: Sampler,
        *,
        num_samples: int,
        vocab_size: int | None = None,
        tokens_per_byte: float | None = None,
    ) -> None:
        super().__init__(sampler, vocab_size=vocab_size)
        self.num_samples = num_samples
        self.tokens_per_byte = tokens_per_byte

    def batches(
        self, *, micro_size: int, dp_rank: int, dp_size: int, num_microbatches: int = 1, max_samples: int | None = None
    ) -> Iterator[list[Microbatch]]:
        """The rank's microbatches, `num_microbatches` at a time, over the first `max_samples` samples (all of them).

        Each rank gets equally many; where the samples run out, rows hold ignored labels only.
        """
        total = self.num_samples if max_samples is None else min(max_samples, self.num_samples)
        across = micro_size * dp_size
        for first in range(0, total, across * num_microbatches):
            starts = range(first + dp_rank * micro_size, first + across * num_microbatches, across)
            ids = [np.arange(start, start + micro_size) for start in starts]
            # Past `total` is padding even where the data goes on: the score must not depend on how ranks divide it.
            yield [self.rows(np.where(row < total, row, self.num_samples)) for row in ids]
