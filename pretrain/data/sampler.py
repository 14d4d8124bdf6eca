"""Which tokens the n-th sample of a run is: a function of the files, the sequence length and the seed, of nothing else.

Not of the ranks, the batch size or the number of steps, and without state: any n costs the same, so resuming at sample
n is to ask for sample n.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pretrain.data.blend import Blend
from pretrain.data.indexed import IndexedTokens
from pretrain.data.permutation import Permutation
from workbench.errors import DataError

IGNORE = -100

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sample:
    """One sequence: `input_ids` [T] and `labels` [T], already shifted; IGNORE where there is nothing to predict.

    `documents` [T] numbers the documents that tokens belong to; None where they are one stream. length: tokens before
    the padding; None where there is none. segments [T]: the kind of segment of each token. pair_label: whether the
    second segment does not follow the first. decoder_ids [U]: what a decoder reads, whose `labels` [U] then are.
    """

    input_ids: Ids
    labels: Ids
    documents: Ids | None = None
    length: int | None = None
    segments: Ids | None = None
    pair_label: int | None = None
    decoder_ids: Ids | None = None


class Sampler(Protocol):
    """Sample n, for any n >= 0."""

    seq_len: int

    def sample(self, index: int) -> Sample: ...


class TokenStream:
    """A run of whole documents of one token file, as consecutive windows that overlap by the one token they share.

    Window w holds tokens [w * seq_len, (w + 1) * seq_len]: each token is predicted exactly once in an epoch. With
    `mask_documents`, samples tell the documents of their tokens, and no document's first token is to be predicted.
    """

    def __init__(self, tokens: IndexedTokens, *, documents: range | None = None, mask_documents: bool = False) -> None:
        documents = range(len(tokens)) if documents is None else documents
        self.tokens, self.num_documents, self.mask_documents = tokens, len(documents), mask_documents
        self._start = tokens.document_start(documents.start)
        self.num_tokens = tokens.document_start(documents.stop) - self._start

    def read(self, start: int, stop: int) -> Ids:
        """Tokens [start, stop) of this stream as int64."""
        assert 0 <= start <= stop <= self.num_tokens, (start, stop, self.num_tokens)
        return self.tokens.read(self._start + start, self._start + stop).astype(np.int64)

    def sample(self, start: int, stop: int) -> Sample:
        """Tokens [start, stop - 1) of this stream, each labelled with the one after it."""
        ids = self.read(start, stop)
        if not self.mask_documents:
            return Sample(ids[:-1], ids[1:])
        documents = self._documents(self._start + start, self._start + stop)
        labels = np.where(documents[1:] == documents[:-1], ids[1:], IGNORE)
        return Sample(ids[:-1], labels, documents[:-1])

    def _documents(self, start: int, stop: int) -> Ids:
        """The number, in its file, of the document of each token [start, stop)."""
        numbers = range(len(self.tokens))
        first, last = (bisect_right(numbers, at, key=self.tokens.document_start) - 1 for at in (start, stop - 1))
        ends = np.array([self.tokens.document_start(number + 1) for number in range(first, last)], dtype=np.int64)
        return first + np.searchsorted(ends, np.arange(start, stop), side="right")


class ShuffledSampler:
    """Endless epochs over the full windows of one stream, each epoch in its own pseudo-random order."""

    def __init__(self, stream: TokenStream, *, seq_len: int, key: str) -> None:
        self.stream, self.seq_len = stream, seq_len
        self.num_windows = (stream.num_tokens - 1) // seq_len
        if self.num_windows < 1:
            raise DataError(
                f"{stream.tokens.prefix}: {stream.num_tokens} tokens to train on, but one sample of seq_len={seq_len} "
                f"needs {seq_len + 1}; shorten batch.seq_len or add data"
            )
        self._order = lru_cache(maxsize=4)(lambda epoch: Permutation(self.num_windows, key=f"{key}/epoch {epoch}"))

    def window(self, index: int) -> int:
        """The window that sample `index` shows."""
        epoch, position = divmod(index, self.num_windows)
        return self._order(epoch)(position)

    def sample(self, index: int) -> Sample:
        """The sequence at position `index` of the endless order."""
        start = self.window(index) * self.seq_len
        return self.stream.sample(start, start + self.seq_len + 1)


class BlendedSampler:
    """Several samplers in exact proportions of their weights; each keeps its own epochs."""

    def __init__(self, samplers: Sequence[Sampler], *, weights: Sequence[float]) -> None:
        assert samplers and len(samplers) == len(weights), (len(samplers), len(weights))
        self.samplers, self.seq_len = tuple(samplers), samplers[0].seq_len
        self._blend = Blend(weights)

    def sample(self, index: int) -> Sample:
        """The sequence at position `index` of the blend."""
        source, position = self._blend(index)
        return self.samplers[source].sample(position)


class SequentialSampler:
    """Every token of the streams once, in file order; the last window of a stream is padded with ignored labels.

    Samples past the end (`index >= num_samples`) are padding alone: ranks that must take the same number of
    microbatches can, and no label is counted twice.
    """

    def __init__(self, streams: Sequence[TokenStream], *, seq_len: int) -> None:
        self.streams, self.seq_len = tuple(streams), seq_len
        self.num_windows = tuple(max(0, -(-(stream.num_tokens - 1) // seq_len)) for stream in self.streams)
        self.num_samples = sum(self.num_windows)
        if not self.num_samples:
            names = ", ".join(str(stream.tokens.prefix) for stream in self.streams)
            raise DataError(f"{names}: fewer than two tokens to evaluate on; there is nothing to predict")

    def sample(self, index: int) -> Sample:
        """The window at position `index` in file order, or padding alone."""
        input_ids = np.zeros(self.seq_len, dtype=np.int64)
        labels = np.full(self.seq_len, IGNORE, dtype=np.int64)
        documents = np.full(self.seq_len, -1, dtype=np.int64)
        for stream, num_windows in zip(self.streams, self.num_windows, strict=True):
            if index < num_windows:
                start = index * self.seq_len
                found = stream.sample(start, min(start + self.seq_len + 1, stream.num_tokens))
                tokens = len(found.input_ids)
                input_ids[:tokens], labels[:tokens] = found.input_ids, found.labels
                if found.documents is not None:
                    documents[:tokens] = found.documents
                break
            index -= num_windows
        return Sample(input_ids, labels, documents if self.streams[0].mask_documents else None)
