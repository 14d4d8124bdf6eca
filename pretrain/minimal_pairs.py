"""Minimal pairs as an evaluation: of two texts, does the model find the right one more likely?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from pretrain.objective import Rows, Share
from workbench.models.batch import Batch
from workbench.models.decoder import Output
from workbench.parallel.loss import IGNORE
from workbench.tokenizer import Tokenizer


class MinimalPairs:
    """The share of pairs of which the good text has the lower mean loss a token, each text read after an end-of-text.

    The two texts of a pair are neighbouring rows, so a microbatch must have an even number of them.
    """

    name = "pairs"
    output: Output = "token_losses"

    def __init__(self, pairs: Sequence[tuple[str, str]], tokenizer: Tokenizer) -> None:
        assert tokenizer.eos_id is not None, "the tokenizer has no end-of-text"
        self._start = tokenizer.eos_id
        self._texts = tokenizer.encode_batch([text for pair in pairs for text in pair])

    def batches(self, share: Share, *, num_microbatches: int, max_samples: int | None) -> Iterator[list[Rows]]:
        assert share.micro_size % 2 == 0, f"micro_size={share.micro_size} would cut a pair"
        total = len(self._texts) if max_samples is None else min(max_samples, len(self._texts))
        across = share.micro_size * share.dp_size
        for first in range(0, total, across * num_microbatches):
            starts = [first + m * across + share.dp_rank * share.micro_size for m in range(num_microbatches)]
            yield [self._rows(range(start, start + share.micro_size), total) for start in starts]

    def tally(self, batch: Batch, output: torch.Tensor) -> torch.Tensor:
        assert batch.labels is not None
        counts = (batch.labels != IGNORE).sum(dim=1)
        means = output.sum(dim=1) / counts.clamp(min=1)
        present = counts[0::2] > 0
        right = present & (means[0::2] < means[1::2])
        return torch.stack([right.sum(), present.sum()]).double()

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        accuracy = sums[0] / max(sums[1], 1.0)
        error = (accuracy * (1 - accuracy) / max(sums[1], 1.0)) ** 0.5
        return {"accuracy": accuracy, "standard_error": error, "pairs": sums[1]}

    def _rows(self, indices: range, total: int) -> Rows:
        longest = max((len(text) for text in self._texts[indices.start : min(indices.stop, total)]), default=1)
        inputs = np.full((len(indices), longest), self._start, dtype=np.int64)
        labels = np.full_like(inputs, IGNORE)
        for row, index in enumerate(indices):
            if index < total:
                text = self._texts[index]
                inputs[row, 1 : len(text)] = text[:-1]
                labels[row, : len(text)] = text
        return Rows(inputs, labels, np.arange(indices.start, indices.stop, dtype=np.int64))
