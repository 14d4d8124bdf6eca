"""Attention of a row whose tokens are dealt out over the context axis (workbench/parallel/context.py).

Legend: B batch, T tokens of this rank, S tokens of the row, H heads (local), K key/value heads (local), d head size.
"""

from __future__ import annotations

import torch

from workbench.models.attend import WeightDropout, attend
from workbench.models.ring import attend_in_ring
from workbench.models.scoring import PLAIN, Scoring
from workbench.parallel.axis import Axis
from workbench.parallel.context import context_chunks, gather_context
from workbench.parallel.mesh import Mesh


def attend_in_context(
    q_BTHd: torch.Tensor,
    k_BTKd: torch.Tensor,
    v_BTKd: torch.Tensor,
    documents_BS: torch.Tensor | None,
    dropped: WeightDropout | None,
    mesh: Mesh,
    scoring: Scoring = PLAIN,
) -> torch.Tensor:
    """What `attend` gives for the tokens of this rank, [B, T, H, d]. Communicates over cp; the layout says how."""
    if mesh.cp.size == 1:
        return attend(q_BTHd, k_BTKd, v_BTKd, documents_BS, dropped, scoring)
    if mesh.layout.context == "ring":
        assert dropped is None, "the ring has no dropout"
        return attend_in_ring(q_BTHd, k_BTKd, v_BTKd, documents_BS, mesh.cp, scoring)
    kv_BSKd = gather_context(torch.cat((k_BTKd, v_BTKd), dim=-1), mesh.cp)
    k_BSKd, v_BSKd = kv_BSKd.tensor_split((k_BTKd.shape[-1],), dim=-1)
    return attend_to_row(q_BTHd, k_BSKd, v_BSKd, documents_BS, dropped, mesh.cp, scoring)


def attend_to_row(
    q_BTHd: torch.Tensor,
    k_BSKd: torch.Tensor,
    v_BSKd: torch.Tensor,
    documents_BS: torch.Tensor | None,
    dropped: WeightDropout | None,
    axis: Axis,
    scoring: Scoring,
) -> torch.Tensor:
    """What `attend` gives for the tokens of this rank, with the keys and values of the whole row. No communication."""
    numbers = context_chunks(axis.size, axis.rank)
    found = []
    for number, q_chunk in zip(numbers, q_BTHd.chunk(len(numbers), dim=1), strict=True):
        first = number * q_chunk.shape[1]
        stop = first + q_chunk.shape[1] if scoring.causal else k_BSKd.shape[1]
        documents = None if documents_BS is None else documents_BS[:, :stop]
        found.append(attend(q_chunk, k_BSKd[:, :stop], v_BSKd[:, :stop], documents, dropped, scoring, first))
    return torch.cat(found, dim=1)
