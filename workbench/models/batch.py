"""One microbatch as the stages of a pipeline see it, and the part of it that one rank computes.

Legend: B batch (samples), S tokens of a row, T those of this context rank, t those of them that this rank has between
the layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F

from workbench.parallel.context import context_tokens
from workbench.parallel.dropout import DropoutKey
from workbench.parallel.loss import IGNORE
from workbench.parallel.mesh import Mesh
from workbench.spec.layout import ParallelLayout


@dataclass(frozen=True)
class Batch:
    """Token ids and what is to be predicted, right-padded; whole rows on every rank.

    input_ids: [B, S] int64. labels: [B, S] int64, the token that follows each position, IGNORE where nothing is
    predicted; [B] class numbers for a sequence head; None where only logits are wanted. lengths: [B], real tokens of
    each row, None when all rows are full. dropout: what the dropout masks depend on; None switches dropout off.
    positions: [B, S], the place of each token in its sequence; None for 0 to S-1. documents: [B, S], the number of the
    document that each token belongs to, which it does not look beyond; None when a row is one document. segments:
    [B, S], the kind of segment of each token; None when all are of kind 0. pair_labels: [B], 0 where the second segment
    follows the first and 1 where it does not, IGNORE for no pair; their loss counts `pair_weight` times. decoder_ids:
    [B, U], what a decoder reads of an encoder's `input_ids`; labels are then [B, U], and lengths those of input_ids.
    loss_scale: by what the gradient of the summed loss will be multiplied; None where no backward follows. values: [B]
    or [B, N] each, what a criterion or judge wants to know of each row, by name; terms: of how many terms the summed
    loss is made, where they are not labels. few_labels: losses are then made of the labelled tokens alone, which costs
    to find them and spares a head the others.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    dropout: DropoutKey | None = None
    positions: torch.Tensor | None = None
    documents: torch.Tensor | None = None
    segments: torch.Tensor | None = None
    pair_labels: torch.Tensor | None = None
    pair_weight: float = 1.0
    decoder_ids: torch.Tensor | None = None
    loss_scale: torch.Tensor | None = None
    values: Mapping[str, torch.Tensor] = field(default_factory=dict)
    terms: int | None = None
    few_labels: bool = False

    def rows(self, which: slice) -> Batch:
        """Some of the rows."""

        def some(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor[which]

        return replace(
            self,
            input_ids=self.input_ids[which],
            labels=some(self.labels),
            lengths=some(self.lengths),
            dropout=self.dropout and replace(self.dropout, sample_ids=self.dropout.sample_ids[which]),
            positions=some(self.positions),
            documents=some(self.documents),
            segments=some(self.segments),
            pair_labels=some(self.pair_labels),
            decoder_ids=some(self.decoder_ids),
            values={name: values[which] for name, values in self.values.items()},
        )


@dataclass(frozen=True)
class LocalBatch:
    """What one rank computes of a batch, whose rows are padded to what its ranks can share.

    input_ids: [B, T]. labels: [B, T], or [B]. lengths: [B]. dropout: as in the batch. positions: [T] or [B, T].
    documents: [B, S], of whole rows. tokens: [T], the index in its row of each token. hidden_tokens, hidden_positions,
    hidden_segments: [t], [t] or [B, t] and [B, t], the same of the tokens whose hidden states this rank has (fewer
    under sequence parallelism). pair_labels, pair_weight, loss_scale, few_labels: as in the batch. num_labels: labels
    of the whole batch that count, or its `terms`; 0 without labels. reach: [] or [B], the length of the longest
    sequence in each row, which is the same on all ranks.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor | None
    lengths: torch.Tensor
    dropout: DropoutKey | None
    positions: torch.Tensor
    documents: torch.Tensor | None
    tokens: torch.Tensor
    hidden_tokens: torch.Tensor
    hidden_positions: torch.Tensor
    hidden_segments: torch.Tensor | None
    pair_labels: torch.Tensor | None
    pair_weight: float
    loss_scale: torch.Tensor | None
    num_labels: torch.Tensor | int
    reach: torch.Tensor
    few_labels: bool


def local_batch(batch: Batch, mesh: Mesh, *, start: int = 0, causal: bool = True) -> LocalBatch:
    """This rank's part of `batch`, of rows of which `start` tokens came before. No communication.

    Where attention is not causal, padding is a document of its own: no token sees it, and it sees itself alone.
    """
    rows, length = batch.input_ids.shape
    device, layout = batch.input_ids.device, mesh.layout
    padded = padded_length(length, layout)

    def share(whole: torch.Tensor | None, fill: int) -> torch.Tensor | None:
        if whole is None or whole.dim() < 2 or (padded == length and layout.cp == 1):
            return whole
        return F.pad(whole, (0, padded - length), value=fill).index_select(1, tokens)

    def hidden(whole: torch.Tensor) -> torch.Tensor:
        return whole.chunk(mesh.tp.size, dim=-1)[mesh.tp.rank] if layout.sequence_parallel else whole

    tokens = context_tokens(padded, mesh.cp.size, mesh.cp.rank, device)
    input_ids, positions = share(batch.input_ids, 0), share(batch.positions, 0)
    assert input_ids is not None
    if positions is None:
        # Those of padding are of no account, but must be positions that the model has.
        positions = start + (tokens if padded == length else tokens.clamp(max=length - 1))
    documents, segments = batch.documents, share(batch.segments, 0)
    if not causal and documents is None and (batch.lengths is not None or padded > length):
        documents = torch.zeros_like(batch.input_ids)
    if not causal and documents is not None and batch.lengths is not None:
        documents = documents.masked_fill(torch.arange(length, device=device) >= batch.lengths.unsqueeze(-1), -1)
    return LocalBatch(
        input_ids=input_ids,
        labels=share(batch.labels, IGNORE),
        lengths=batch.lengths if batch.lengths is not None else torch.full((rows,), length, device=device),
        dropout=batch.dropout,
        positions=positions,
        documents=None if documents is None else F.pad(documents, (0, padded - length), value=-1),
        tokens=tokens,
        hidden_tokens=hidden(tokens),
        hidden_positions=hidden(positions),
        hidden_segments=None if segments is None else hidden(segments),
        pair_labels=batch.pair_labels,
        pair_weight=batch.pair_weight,
        loss_scale=batch.loss_scale,
        num_labels=_num_labels(batch),
        reach=_reach(batch, start),
        few_labels=batch.few_labels,
    )


def _num_labels(batch: Batch) -> torch.Tensor | int:
    if batch.terms is not None:
        return batch.terms
    return 0 if batch.labels is None else (batch.labels != IGNORE).sum()


def _reach(batch: Batch, start: int) -> torch.Tensor:
    if batch.positions is not None:
        return batch.positions.amax(dim=-1) + 1
    if batch.lengths is not None:
        return batch.lengths + start
    return torch.full((), start + batch.input_ids.shape[1], device=batch.input_ids.device)


def padded_length(length: int, layout: ParallelLayout) -> int:
    """The tokens of a row when it is padded to what the ranks of `layout` can share."""
    return -(-length // layout.token_multiple) * layout.token_multiple


def hidden_shape(batch: Batch, layout: ParallelLayout, hidden_size: int) -> tuple[int, int, int]:
    """[B, t, D] of the hidden states that one rank hands on to the next stage: those of an encoder's tokens, then those
    of a decoder's."""
    sharers = layout.cp * (layout.tp if layout.sequence_parallel else 1)
    sides = [ids for ids in (batch.input_ids, batch.decoder_ids) if ids is not None]
    tokens = sum(padded_length(ids.shape[1], layout) // sharers for ids in sides)
    return len(batch.input_ids), tokens, hidden_size
