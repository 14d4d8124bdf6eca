"""Attention of a row whose tokens are dealt out over the context axis (workbench/parallel/context.py).

Legend: B batch, T tokens of this rank, S tokens of the row, H heads (local), K key/value heads (local), d head size.
"""

from __future__ import annotations

import torch

from workbench.models.attend import WeightDropout, attend
from workbench.models.ring import attend_in_ring
from workbench.parallel.context import context_chunks, gather_context
from workbench.parallel.mesh import Mesh


def attend_in_context(
    q_BTHd: torch.Tensor,
    k_BTKd: torch.Tensor,
    v_BTKd: torch.Tensor,
    documents_BS: torch.Tensor | None,
    dropped: WeightDropout | None,
    mesh: Mesh,
    *,
    causal: bool = True,
) -> torch.Tensor:
    """What `attend` gives for the tokens of this rank, [B, T, H, d]. Communicates over cp; the layout says how."""
    if mesh.cp.size == 1:
        return attend(q_BTHd, k_BTKd, v_BTKd, documents_BS, dropped, causal=causal)
    if mesh.layout.context == "ring":
        assert dropped is None, "the ring has no dropout"
        return attend_in_ring(q_BTHd, k_BTKd, v_BTKd, documents_BS, mesh.cp, causal=causal)
    k_BSKd, v_BSKd = gather_context(torch.cat((k_BTKd, v_BTKd), dim=-1), mesh.cp).chunk(2, dim=-1)
    found = []
    for number, q_chunk in zip(context_chunks(mesh.cp.size, mesh.cp.rank), q_BTHd.chunk(2, dim=1), strict=True):
        first = number * q_chunk.shape[1]
        stop = first + q_chunk.shape[1] if causal else k_BSKd.shape[1]
        documents = None if documents_BS is None else documents_BS[:, :stop]
        found.append(attend(q_chunk, k_BSKd[:, :stop], v_BSKd[:, :stop], documents, dropped, first, causal=causal))
    return torch.cat(found, dim=1)
