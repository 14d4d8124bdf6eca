"""Tiny models, data and configurations for the engine's tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pretrain.engine import Criterion, EngineConfig, Evaluation, Rows, Share, Subject
from pretrain.objective import NextTokenLoss
from workbench.models.build import initialise
from workbench.models.decoder import Output
from workbench.parallel.mesh import Mesh
from workbench.spec.layout import ParallelLayout
from workbench.spec.model import ModelConfig

VOCAB = 53  # no multiple of any degree: padding is in play everywhere


def tiny_model(**changes: Any) -> ModelConfig:
    """A model with every hazard: grouped heads, tied embeddings, odd vocabulary."""
    values = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "tie_word_embeddings": True,
    }
    return ModelConfig.model_validate({**values, **changes})


def tiny_config(folder: str, **tables: dict[str, Any]) -> EngineConfig:
    """An engine configuration of six small steps."""
    values: dict[str, dict[str, Any]] = {
        "batch": {"global_size": 8, "micro_size": 2, "seq_len": 12},
        "optim": {"lr": 1e-2, "warmup": 2},
        "log": {"every": 1},
        "run": {"dir": folder, "steps": 6, "seed": 5},
    }
    for name, table in tables.items():
        values[name] = {**values.get(name, {}), **table}
    return EngineConfig.model_validate(values)


def tiny_subject(model: ModelConfig, seed: int = 5) -> Subject:
    """The model with its initial weights."""
    return Subject(model, fill=lambda parameters: initialise(parameters, model, seed=seed))


def mesh_of(layout: ParallelLayout) -> Mesh:
    return Mesh.create(layout, torch.device("cpu"))


def sample(index: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels of one sample, from its index alone; some labels are ignored, unevenly."""
    random = np.random.default_rng(index)
    text = random.integers(0, VOCAB, tokens + 1)
    labels = text[1:].copy()
    labels[: index % 5] = -100
    return text[:-1], labels


class Noise:
    """An objective over random tokens, that remembers which samples it was asked for."""

    criterion = Criterion()

    def __init__(
        self,
        *,
        tokens: int = 12,
        held_out: int = 0,
        documents: bool = False,
        classes: int = 0,
        answers: bool = False,
        pairs: bool = False,
    ) -> None:
        self._tokens, self._documents, self._classes = tokens, documents, classes
        self._answers, self._pairs = answers, pairs
        self.asked: list[int] = []
        self.evaluations: tuple[Evaluation, ...] = (HeldOut(held_out, tokens),) if held_out else ()
        self.identity = {"kind": "noise"}

    def train_rows(self, share: Share, *, step: int, first_sample: int, global_size: int) -> list[Rows]:
        across = share.micro_size * share.dp_size
        starts = range(first_sample + share.dp_rank * share.micro_size, first_sample + global_size, across)
        found = [np.arange(start, start + share.micro_size) for start in starts]
        self.asked += [int(index) for ids in found for index in ids]
        rows = [rows_of(ids, self._tokens, documents=self._documents, classes=self._classes) for ids in found]
        if self._pairs:
            rows = [paired(one) for one in rows]
        return [answered(one) for one in rows] if self._answers else rows


class HeldOut:
    """The mean loss of a few samples that are not trained on."""

    name = "valid"
    output: Output = "loss"
    tally = NextTokenLoss.tally

    def __init__(self, count: int, tokens: int) -> None:
        self._count, self._tokens = count, tokens

    def batches(self, share: Share, *, num_microbatches: int, max_samples: int | None) -> Iterator[list[Rows]]:
        across = share.micro_size * share.dp_size
        for first in range(0, min(self._count, max_samples or self._count), across * num_microbatches):
            found = []
            for m in range(num_microbatches):
                start = first + m * across + share.dp_rank * share.micro_size
                rows = rows_of(np.arange(start, start + share.micro_size) + 10_000, self._tokens)
                rows.labels[rows.sample_ids - 10_000 >= self._count] = -100
                found.append(rows)
            yield found

    def metrics(self, sums: list[float]) -> dict[str, float]:
        return {"loss": sums[0] / sums[1], "labels": sums[1]}


def rows_of(ids: np.ndarray, tokens: int, *, documents: bool = False, classes: int = 0) -> Rows:
    """The microbatch of these samples, each cut into documents at places of its own if asked for; with `classes`,
    each has one label and ends at a place of its own."""
    samples = [sample(int(index), tokens) for index in ids]
    starts = [np.random.default_rng(int(index)).random(tokens) < 0.2 for index in ids]
    numbers = np.stack(starts).cumsum(axis=1) if documents else None
    return Rows(
        np.stack([s[0] for s in samples]),
        ids % classes if classes else np.stack([s[1] for s in samples]),
        ids.astype(np.int64),
        lengths=tokens - ids % tokens if classes else None,
        documents=numbers,
    )


def answered(rows: Rows) -> Rows:
    """The same rows for an encoder, with the last of their labels for a decoder, which reads them backwards."""
    return replace(rows, decoder_ids=rows.input_ids[:, ::-2].copy(), labels=rows.labels[:, rows.labels.shape[1] // 2 :])


def paired(rows: Rows) -> Rows:
    """The same rows as two segments each, of which some do not follow each other; they end at places of their own."""
    tokens = rows.input_ids.shape[1]
    lengths = tokens - rows.sample_ids % (tokens // 2)
    segments = np.broadcast_to(np.arange(tokens) >= 5, rows.input_ids.shape).astype(np.int64)
    if rows.labels.ndim == 1:
        return replace(rows, lengths=lengths, segments=segments)
    labels = np.where(np.arange(tokens) < lengths[:, None], rows.labels, -100)
    pairs = np.where(rows.sample_ids % 3 == 2, -100, rows.sample_ids % 2)
    return replace(rows, lengths=lengths, segments=segments, labels=labels, pair_labels=pairs)
