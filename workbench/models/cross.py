"""Attention of encoders and decoders: with a bias of scores by distance, and of a decoder to an encoder's output.

Legend: B batch, T tokens that look, S tokens that are looked at, D hidden, H heads (local), d head size, R kinds of
distance.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from workbench.models.attend import WeightDropout
from workbench.models.batch import LocalBatch
from workbench.models.recompute import recomputed
from workbench.models.scoring import Scoring, scoring_of
from workbench.parallel.dropout import dropout
from workbench.parallel.linear import ColumnParallelLinear, RowParallelLinear
from workbench.parallel.mesh import Mesh
from workbench.parallel.module import ParallelModule
from workbench.spec.geometry import ParameterSpec
from workbench.spec.model import ModelConfig


class RelativeBias(ParallelModule):
    """What is added to the score of each head for each kind of distance (arXiv:1910.10683, sec. 2.1)."""

    weight: nn.Parameter

    def __init__(self, mesh: Mesh, weight: ParameterSpec, *, causal: bool, max_distance: int) -> None:
        super().__init__(mesh, weight=weight)
        self.causal, self.max_distance = causal, max_distance

    def forward(self, tokens: int, dtype: torch.dtype) -> torch.Tensor:
        """[H, T, T] for a row of `tokens` tokens."""
        places_T = torch.arange(tokens, device=self.weight.device)
        ahead_TT = places_T - places_T.unsqueeze(-1)
        kinds_TT = distance_kinds(ahead_TT, len(self.weight), self.max_distance, causal=self.causal)
        return F.embedding(kinds_TT, self.weight).permute(2, 0, 1).to(dtype)


def distance_kinds(ahead: torch.Tensor, count: int, max_distance: int, *, causal: bool) -> torch.Tensor:
    """The kind, of `count`, of each distance to a token so far ahead: exact when near, in growing steps when farther.

    Half of the kinds are for tokens ahead, unless `causal` (modeling_t5.py, _relative_position_bucket).
    """
    kinds = torch.zeros_like(ahead)
    if not causal:
        count //= 2
        kinds = (ahead > 0) * count
        distance = ahead.abs()
    else:
        distance = (-ahead).clamp(min=0)
    exact = count // 2
    steps = torch.log(distance.float() / exact) / math.log(max_distance / exact) * (count - exact)
    far = (exact + steps.clamp(min=0).long()).clamp(max=count - 1)
    return kinds + torch.where(distance < exact, distance, far)


def attend_scored(
    q_BTHd: torch.Tensor,
    k_BSHd: torch.Tensor,
    v_BSHd: torch.Tensor,
    mask: torch.Tensor | None,
    bias_HTS: torch.Tensor | None,
    scoring: Scoring,
    dropped: WeightDropout | None,
) -> torch.Tensor:
    """softmax(scale q k^T + bias) v, [B, T, H, d], where `mask`, [B or 1, 1, T or 1, S], lets a token look;
    of `scoring` its scale counts alone."""
    q, k, v = (part.transpose(1, 2) for part in (q_BTHd, k_BSHd, v_BSHd))
    scale = scoring.scale_of(q.shape[-1])
    if bias_HTS is not None and mask is not None:
        mask = bias_HTS.unsqueeze(0).masked_fill(~mask, float("-inf"))
    elif bias_HTS is not None:
        mask = bias_HTS.unsqueeze(0)
    if dropped is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)
    scores_BHTS = q @ k.transpose(-1, -2) * scale
    if mask is not None:
        scores_BHTS = scores_BHTS.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores_BHTS + mask
    heads, tokens, seen = scores_BHTS.shape[1:]
    coordinates = tuple(
        torch.arange(first, first + count, device=q.device)
        for first, count in ((dropped.first_head, heads), (0, tokens), (0, seen))
    )
    weights_BHTS = dropout(scores_BHTS.softmax(dim=-1), dropped.probability, dropped.rows_B, coordinates)
    return (weights_BHTS @ v).transpose(1, 2)


class CrossAttention(nn.Module):
    """A decoder's attention to all tokens of an encoder's output but padding, its heads cut over the tensor axis."""

    def __init__(self, model: ModelConfig, mesh: Mesh, specs: dict[str, ParameterSpec], layer: int) -> None:
        super().__init__()
        self.path = path = f"layers.{layer}.cross_attn"
        self.q_proj = ColumnParallelLinear(mesh, specs[f"{path}.q_proj.weight"])
        self.kv_proj = ColumnParallelLinear(mesh, specs[f"{path}.kv_proj.weight"])
        self.o_proj = RowParallelLinear(mesh, specs[f"{path}.o_proj.weight"])
        self.head_dim, self.scoring, self.dropout = model.head_dim, scoring_of(model, layer), model.attention_dropout
        self.recompute = False
        self.first_head = model.num_attention_heads // mesh.tp.size * mesh.tp.rank

    def forward(self, y_BTD: torch.Tensor, x_BSD: torch.Tensor, target: LocalBatch, source: LocalBatch) -> torch.Tensor:
        q_BTHd = self.q_proj(y_BTD).unflatten(-1, (-1, self.head_dim))
        k_BSHd, v_BSHd = self.kv_proj(x_BSD).unflatten(-1, (-1, self.head_dim)).chunk(2, dim=2)
        mask = None if source.documents is None else (source.documents >= 0)[:, None, None]
        dropped = None
        if self.dropout and target.dropout is not None:
            dropped = WeightDropout(self.dropout, target.dropout.rows(self.path), self.first_head)
        arguments = (q_BTHd, k_BSHd, v_BSHd, mask, None, self.scoring, dropped)
        attended = recomputed(self.recompute, attend_scored, *arguments)
        return self.o_proj(attended.flatten(2))
