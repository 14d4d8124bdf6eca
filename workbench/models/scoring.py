"""How attention scores a pair of tokens, and which pairs a query does not look at.

Legend: B batch, T tokens that look, S tokens that are seen, d head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from workbench.registry import load
from workbench.spec.model import ModelConfig

Mask = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Whether tokens [T, 1] may look at tokens [1, S], by their index in the row: [T, S]."""


@dataclass(frozen=True)
class Scoring:
    """scale: what q k^T is multiplied with; 1 / sqrt(d) by default. window: tokens that a query sees, itself the last
    of them; all earlier ones by default. softcap: scores s become softcap * tanh(s / softcap).
    mask: what else a query does not see; all tokens see themselves. causal: whether a query sees no later tokens."""

    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    mask: Mask | None = None
    causal: bool = True

    def scale_of(self, head_dim: int) -> float:
        return 1 / math.sqrt(head_dim) if self.scale is None else self.scale

    def first_seen(self, query: int) -> int:
        """The first token of its row that the query at this token sees, if nothing hides it."""
        return 0 if self.window is None else max(0, query - self.window + 1)


PLAIN = Scoring()


def scoring_of(model: ModelConfig, layer: int) -> Scoring:
    """How a layer of the model scores, by its features."""
    scalar = model.query_pre_attn_scalar
    return Scoring(
        scale=None if scalar is None else 1 / math.sqrt(scalar),
        window=model.window(layer),
        softcap=model.attn_logit_softcapping,
        mask=load("workbench.models.masks", model.attention_mask, "MASK"),
        causal=model.causal and layer >= model.num_encoder_layers,
    )


def visible(
    first: int,
    tokens: int,
    first_seen: int,
    seen: int,
    documents_BS: torch.Tensor | None,
    device: torch.device,
    scoring: Scoring = PLAIN,
) -> torch.Tensor:
    """[T, S], or [B, 1, T, S] with documents: whether each of `tokens` tokens from `first` on may look at each of
    `seen` tokens from `first_seen` on. `documents_BS` are those of whole rows."""
    mask = torch.ones(tokens, seen, dtype=torch.bool, device=device)
    if scoring.causal:
        mask = mask.tril(first - first_seen)
    if scoring.window is not None:
        mask = mask.triu(first - first_seen - scoring.window + 1)
    if scoring.mask is not None:
        queries = torch.arange(first, first + tokens, device=device)[:, None]
        mask = mask & scoring.mask(queries, torch.arange(first_seen, first_seen + seen, device=device)[None])
    if documents_BS is None:
        return mask
    looking_BT1 = documents_BS[:, first : first + tokens, None]
    return (mask & (looking_BT1 == documents_BS[:, None, first_seen : first_seen + seen])).unsqueeze(1)
