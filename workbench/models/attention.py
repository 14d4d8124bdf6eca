"""Causal self-attention with grouped key/value heads, its heads cut over the tensor axis.

Legend: B batch, T tokens, S tokens attended to, D hidden, H heads (local), K key/value heads (local), d head size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from workbench.models.batch import Batch
from workbench.models.blockwise import attend_blockwise, suits
from workbench.models.recompute import recomputed
from workbench.models.rope import apply_rope
from workbench.parallel.backends import Attend
from workbench.parallel.dropout import dropout
from workbench.parallel.linear import ColumnParallelLinear, RowParallelLinear
from workbench.parallel.mesh import Mesh
from workbench.spec.geometry import ParameterSpec
from workbench.spec.model import ModelConfig


class KeyValueCache:
    """Keys and values of the tokens seen so far, one entry a layer, for decoding."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.length = 0

    def extend(self, layer: int, k_BKTd: torch.Tensor, v_BKTd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values of `layer`, [B, K, S, d], the new ones last."""
        if layer in self._entries:
            old_k, old_v = self._entries[layer]
            k_BKTd, v_BKTd = torch.cat((old_k, k_BKTd), dim=2), torch.cat((old_v, v_BKTd), dim=2)
        self._entries[layer] = (k_BKTd, v_BKTd)
        return k_BKTd, v_BKTd


class Attention(nn.Module):
    """softmax(q k^T / sqrt(d)) v, each token attending to itself and those before it."""

    def __init__(self, model: ModelConfig, mesh: Mesh, specs: dict[str, ParameterSpec], layer: int) -> None:
        super().__init__()
        self.path = path = f"layers.{layer}.self_attn"
        self.qkv_proj = ColumnParallelLinear(mesh, specs[f"{path}.qkv_proj.weight"], specs.get(f"{path}.qkv_proj.bias"))
        self.o_proj = RowParallelLinear(mesh, specs[f"{path}.o_proj.weight"], specs.get(f"{path}.o_proj.bias"))
        self.head_dim = model.head_dim
        self.layer = layer
        self.dropout = model.attention_dropout
        self.recompute = False
        self.core: Attend | None = None
        self.first_head = model.num_attention_heads // mesh.tp.size * mesh.tp.rank

    @property
    def local_heads(self) -> tuple[int, int]:
        """Query heads and key/value heads on this rank."""
        q_size, k_size, _ = self.qkv_proj.output_sizes
        return q_size // self.head_dim, k_size // self.head_dim

    def forward(
        self,
        x_BTD: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor] | None,
        batch: Batch,
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        q_size, k_size, v_size = self.qkv_proj.output_sizes
        qk, v = self.qkv_proj(x_BTD).split((q_size + k_size, v_size), dim=-1)
        qk, v_BTKd = (part.unflatten(-1, (-1, self.head_dim)) for part in (qk, v))
        if rope is not None:
            qk = apply_rope(qk, rope)
        q_BTHd, k_BTKd = qk.split((q_size // self.head_dim, k_size // self.head_dim), dim=2)
        attended_BTHd = recomputed(self.recompute, self._attend, q_BTHd, k_BTKd, v_BTKd, batch, cache)
        return self.o_proj(attended_BTHd.flatten(2))

    def _attend(
        self,
        q_BTHd: torch.Tensor,
        k_BTKd: torch.Tensor,
        v_BTKd: torch.Tensor,
        batch: Batch,
        cache: KeyValueCache | None,
    ) -> torch.Tensor:
        """What each head sees, [B, T, H, d]."""
        if self.core is not None and cache is None:
            assert batch.documents is None, "this executor attends to all earlier tokens of a row"
            return self.core(q_BTHd, k_BTKd, v_BTKd)
        drops = bool(self.dropout) and batch.dropout is not None
        if cache is None and not drops and suits(q_BTHd):
            return attend_blockwise(q_BTHd, k_BTKd, v_BTKd)
        q_BHTd, k_BKSd, v_BKSd = (part.transpose(1, 2) for part in (q_BTHd, k_BTKd, v_BTKd))
        if cache is not None:
            k_BKSd, v_BKSd = cache.extend(self.layer, k_BKSd, v_BKSd)
        groups = q_BHTd.shape[1] // k_BKSd.shape[1]
        k_BHSd, v_BHSd = (_repeat_heads(part, groups) for part in (k_BKSd, v_BKSd))
        if drops:
            return self._attend_with_dropout(q_BHTd, k_BHSd, v_BHSd, batch).transpose(1, 2)
        return _attend(q_BHTd, k_BHSd, v_BHSd).transpose(1, 2)

    def _attend_with_dropout(
        self, q_BHTd: torch.Tensor, k_BHSd: torch.Tensor, v_BHSd: torch.Tensor, batch: Batch
    ) -> torch.Tensor:
        assert batch.dropout is not None
        scores_BHTS = q_BHTd @ k_BHSd.transpose(-1, -2) / math.sqrt(self.head_dim)
        scores_BHTS = scores_BHTS.masked_fill(~_causal_mask(q_BHTd, k_BHSd), float("-inf"))
        weights_BHTS = scores_BHTS.softmax(dim=-1)
        _, heads, tokens, attended = weights_BHTS.shape
        device = q_BHTd.device
        coordinates = (
            torch.arange(self.first_head, self.first_head + heads, device=device),
            torch.arange(tokens, device=device),
            torch.arange(attended, device=device),
        )
        rows = batch.dropout.rows(self.path)
        return dropout(weights_BHTS, self.dropout, rows, coordinates) @ v_BHSd


def _attend(q_BHTd: torch.Tensor, k_BHSd: torch.Tensor, v_BHSd: torch.Tensor) -> torch.Tensor:
    tokens, attended = q_BHTd.shape[2], k_BHSd.shape[2]
    if tokens == attended:
        return F.scaled_dot_product_attention(q_BHTd, k_BHSd, v_BHSd, is_causal=True)
    mask = None if tokens == 1 else _causal_mask(q_BHTd, k_BHSd)
    return F.scaled_dot_product_attention(q_BHTd, k_BHSd, v_BHSd, attn_mask=mask)


def _causal_mask(q_BHTd: torch.Tensor, k_BHSd: torch.Tensor) -> torch.Tensor:
    """[T, S], true where a token may look; the last token may look at all."""
    tokens, attended = q_BHTd.shape[2], k_BHSd.shape[2]
    return torch.ones(tokens, attended, dtype=torch.bool, device=q_BHTd.device).tril(attended - tokens)


def _repeat_heads(x_BKSd: torch.Tensor, groups: int) -> torch.Tensor:
    """Each key/value head repeated for the `groups` query heads that share it."""
    return x_BKSd if groups == 1 else x_BKSd.repeat_interleave(groups, dim=1)
