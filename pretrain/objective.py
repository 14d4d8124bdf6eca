"""What a training run is for: which rows it learns from, and how it is judged."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np
import torch

from pretrain.criterion import Criterion
from pretrain.data.config import OpenedData
from pretrain.data.loader import EvaluationLoader, Microbatch
from workbench.models.batch import Batch
from workbench.models.decoder import Output
from workbench.parallel.dropout import DropoutKey
from workbench.parallel.loss import IGNORE

FEW: Final = 0.9
"""Of all tokens: with fewer labels, losses are made of the labelled ones alone."""


@dataclass(frozen=True)
class Rows:
    """One microbatch as arrays of int64: input_ids [B, T]; labels [B, T] already shifted, or [B] for a sequence head;
    sample_ids [B], global; lengths [B] where rows are padded; documents [B, T] where rows are several that do not see
    each other; segments [B, T], kinds of segments; pair_labels [B], 1 where the second segment does not follow the
    first; decoder_ids [B, U], what a decoder reads, whose labels [B, U] then are. values: float64 [B] or [B, N], what a
    criterion wants to know of each row, by name; terms: what the loss is a mean of, where it is not one of labels."""

    input_ids: np.ndarray
    labels: np.ndarray
    sample_ids: np.ndarray
    lengths: np.ndarray | None = None
    documents: np.ndarray | None = None
    segments: np.ndarray | None = None
    pair_labels: np.ndarray | None = None
    decoder_ids: np.ndarray | None = None
    values: Mapping[str, np.ndarray] = field(default_factory=dict)
    terms: int | None = None

    @property
    def num_pairs(self) -> int:
        """Labels of pairs that count."""
        return 0 if self.pair_labels is None else int(np.count_nonzero(self.pair_labels != IGNORE))

    @property
    def num_labels(self) -> int:
        """Labels that count, or what counts in their place."""
        return int(np.count_nonzero(self.labels != IGNORE)) if self.terms is None else self.terms

    @property
    def has_few_labels(self) -> bool:
        """Whether so many tokens have no label that a head should not see them. On a GPU to find the others means to
        wait for them."""
        return self.labels.ndim == 2 and int(np.count_nonzero(self.labels != IGNORE)) < FEW * self.labels.size

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return self.input_ids.size if self.lengths is None else int(self.lengths.sum())


@dataclass(frozen=True, slots=True)
class Share:
    """Which part of a batch a data-parallel rank takes, in microbatches of how many rows."""

    micro_size: int
    dp_rank: int
    dp_size: int


class Evaluation(Protocol):
    """A score over held-out rows. What microbatches add is put together over all ranks, then turned into metrics."""

    @property
    def name(self) -> str:
        """What its metrics are called after: `valid`."""
        ...

    @property
    def output(self) -> Output:
        """What the last stage computes for it."""
        ...

    def batches(self, share: Share, *, num_microbatches: int, max_samples: int | None) -> Iterator[list[Rows]]:
        """This rank's microbatches, `num_microbatches` at a time; equally many on every rank, padded with IGNORE."""
        ...

    def tally(self, batch: Batch, output: torch.Tensor) -> torch.Tensor:
        """What a microbatch adds to the sums, a float64 vector of fixed length on the output's device; or a matrix, of
        which every row is kept."""
        ...

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        """Metrics from the sums over everything, or from all rows, one after the other in any order."""
        ...


class Objective(Protocol):
    """What the engine needs to know of a task."""

    @property
    def evaluations(self) -> Sequence[Evaluation]: ...

    @property
    def criterion(self) -> Criterion: ...

    @property
    def identity(self) -> dict[str, Any]:
        """JSON values that decide the order of samples; a resumed run must have the same."""
        ...

    def train_rows(self, share: Share, *, step: int, first_sample: int, global_size: int) -> list[Rows]:
        """This rank's microbatches of the step that begins at global sample `first_sample`; a pure function."""
        ...


def to_batch(
    rows: Rows, device: torch.device, *, seed: int | None = None, step: int = 0, pair_weight: float = 0.0
) -> Batch:
    """The rows as tensors on `device`; with a seed, dropout is on. Positions begin anew with each document.

    pair_weight: labels of pairs count this many times in the loss.
    """

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    def optional(array: np.ndarray | None) -> torch.Tensor | None:
        return None if array is None else tensor(array)

    return Batch(
        input_ids=tensor(rows.input_ids),
        labels=tensor(rows.labels),
        lengths=optional(rows.lengths),
        dropout=None if seed is None else DropoutKey(seed, step, tensor(rows.sample_ids)),
        positions=None if rows.documents is None else tensor(document_positions(rows.documents)),
        documents=optional(rows.documents),
        segments=optional(rows.segments),
        pair_labels=optional(rows.pair_labels),
        pair_weight=pair_weight,
        decoder_ids=optional(rows.decoder_ids),
        values={name: tensor(values) for name, values in rows.values.items()},
        terms=rows.terms,
        few_labels=rows.has_few_labels,
    )


def document_positions(documents_BT: np.ndarray) -> np.ndarray:
    """The place of each token in its document [B, T], counted from where the row shows it first."""
    index_T = np.arange(documents_BT.shape[1])
    begins_BT = np.diff(documents_BT, axis=1, prepend=documents_BT[:, :1]) != 0
    return index_T - np.maximum.accumulate(np.where(begins_BT, index_T, 0), axis=1)


class NextToken:
    """Prediction of tokens over token files: the next one, or those that their rows hide."""

    criterion = Criterion()

    def __init__(self, data: OpenedData, *, seed: int) -> None:
        self._data, self._seed = data, seed
        self.evaluations: tuple[Evaluation, ...] = () if data.valid is None else (NextTokenLoss(data.valid),)
        if data.valid is not None and data.next_sentence:
            self.evaluations += (PairAccuracy(data.valid),)

    @property
    def identity(self) -> dict[str, Any]:
        masked = {"mask_documents": True} if self._data.mask_documents else {}
        kind = "next_token" if self._data.objective == "causal" else self._data.objective
        pairs = {"next_sentence": True} if self._data.next_sentence else {}
        return {"kind": kind, "seed": self._seed, "tokens": self._data.train_tokens, **masked, **pairs}

    def train_rows(self, share: Share, *, step: int, first_sample: int, global_size: int) -> list[Rows]:
        found = self._data.train.batch(
            step,
            global_size=global_size,
            micro_size=share.micro_size,
            dp_rank=share.dp_rank,
            dp_size=share.dp_size,
            first_sample=first_sample,
        )
        return [_rows(microbatch) for microbatch in found]


class NextTokenLoss:
    """Mean loss of held-out tokens; bits per byte where the data says how many bytes a token stands for."""

    name = "valid"
    output: Output = "loss"

    def __init__(self, loader: EvaluationLoader) -> None:
        self._loader = loader

    def batches(self, share: Share, *, num_microbatches: int, max_samples: int | None) -> Iterator[list[Rows]]:
        for microbatches in self._loader.batches(
            micro_size=share.micro_size,
            dp_rank=share.dp_rank,
            dp_size=share.dp_size,
            num_microbatches=num_microbatches,
            max_samples=max_samples,
        ):
            yield [_rows(microbatch) for microbatch in microbatches]

    def tally(self, batch: Batch, output: torch.Tensor) -> torch.Tensor:
        assert batch.labels is not None
        return torch.stack([output.double(), (batch.labels != IGNORE).sum().double()])

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        loss = sums[0] / max(sums[1], 1.0)
        found = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": sums[1]}
        if self._loader.tokens_per_byte is not None:
            found["bits_per_byte"] = loss / math.log(2) * self._loader.tokens_per_byte
        return found


class PairAccuracy:
    """How often the model is right about whether the second segment follows the first."""

    name = "next_sentence"
    output: Output = "pair_logits"

    def __init__(self, loader: EvaluationLoader) -> None:
        self.batches = NextTokenLoss(loader).batches

    def tally(self, batch: Batch, output: torch.Tensor) -> torch.Tensor:
        assert batch.pair_labels is not None
        right = output.argmax(dim=-1) == batch.pair_labels
        return torch.stack([right.sum().double(), (batch.pair_labels != IGNORE).sum().double()])

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        return {"accuracy": sums[0] / max(sums[1], 1.0), "pairs": sums[1]}


def _rows(microbatch: Microbatch) -> Rows:
    return Rows(
        microbatch.input_ids,
        microbatch.labels,
        microbatch.sample_ids,
        lengths=microbatch.lengths,
        documents=microbatch.documents,
        segments=microbatch.segments,
        pair_labels=microbatch.pair_labels,
        decoder_ids=microbatch.decoder_ids,
    )
