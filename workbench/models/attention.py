"""Self-attention with grouped key/value heads, its heads cut over the tensor axis.

Legend: B batch, T tokens (of this context rank), S tokens attended to, D hidden, H heads (local), K key/value heads
(local), d head size.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import nn

from workbench.errors import LayoutError
from workbench.models.attend import WeightDropout, attend
from workbench.models.batch import LocalBatch
from workbench.models.context import attend_in_context
from workbench.models.cross import attend_scored
from workbench.models.norm import build_norm
from workbench.models.recompute import recomputed
from workbench.models.rope import apply_rope
from workbench.models.scoring import scoring_of, visible
from workbench.parallel.backends import Attend
from workbench.parallel.linear import ColumnParallelLinear, RowParallelLinear
from workbench.parallel.mesh import Mesh
from workbench.spec.geometry import ParameterSpec
from workbench.spec.model import ModelConfig

Positions: TypeAlias = tuple[torch.Tensor, torch.Tensor] | torch.Tensor | None
"""How attention knows places: tables of a rotation, a bias of scores [H, T, T], or not at all."""


class KeyValueCache:
    """Keys and values of the tokens seen so far, one entry a layer, for decoding."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.length = 0

    def extend(
        self, layer: int, k_BTKd: torch.Tensor, v_BTKd: torch.Tensor, window: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of `layer` that are still needed, [B, S, K, d], the new ones last; of a window, what its
        next query may see is kept."""
        if layer in self._entries:
            old_k, old_v = self._entries[layer]
            k_BTKd, v_BTKd = torch.cat((old_k, k_BTKd), dim=1), torch.cat((old_v, v_BTKd), dim=1)
        kept = slice(None) if window is None else slice(max(0, k_BTKd.shape[1] - window + 1), None)
        self._entries[layer] = (k_BTKd[:, kept], v_BTKd[:, kept])
        return k_BTKd, v_BTKd

    def cut_back(self, length: int) -> bool:
        """Whether it could forget the tokens from `length` on: not where a window has dropped what the next query would
        then see."""
        if length < self.length and any(keys.shape[1] < self.length for keys, _ in self._entries.values()):
            return False
        for layer, entry in self._entries.items():
            keys, values = (part[:, : part.shape[1] - (self.length - length)] for part in entry)
            self._entries[layer] = (keys, values)
        self.length = length
        return True

    def keep(self, rows: list[int]) -> None:
        """Forgets all but these rows of the batch."""
        self._entries = {layer: (keys[rows], values[rows]) for layer, (keys, values) in self._entries.items()}


def last_documents(batch: LocalBatch, keys_BS: torch.Tensor) -> torch.Tensor | None:
    """The documents of as many tokens of each row, from its end, as there are keys."""
    return None if batch.documents is None else batch.documents[:, -keys_BS.shape[1] :]


class Attention(nn.Module):
    """softmax(scores) v, each token attending to those of its document that it may see (scoring.py)."""

    def __init__(self, model: ModelConfig, mesh: Mesh, specs: dict[str, ParameterSpec], layer: int) -> None:
        super().__init__()
        self.path = path = f"layers.{layer}.self_attn"
        self.qkv_proj = ColumnParallelLinear(mesh, specs[f"{path}.qkv_proj.weight"], specs.get(f"{path}.qkv_proj.bias"))
        self.o_proj = RowParallelLinear(mesh, specs[f"{path}.o_proj.weight"], specs.get(f"{path}.o_proj.bias"))
        self.qk_norm = model.qk_norm
        if self.qk_norm != "none":
            self.q_norm, self.k_norm = (build_norm(model, mesh, specs, f"{path}.{name}_norm") for name in "qk")
        self.mesh = mesh
        self.head_dim = model.head_dim
        self.scoring = scoring_of(model, layer)
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
        positions: Positions,
        batch: LocalBatch,
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        q_size, k_size, v_size = self.qkv_proj.output_sizes
        qk, v = self.qkv_proj(x_BTD).split((q_size + k_size, v_size), dim=-1)
        if self.qk_norm != "none":
            q, k = qk.split((q_size, k_size), dim=-1)
            qk = torch.cat((self._norm_heads(self.q_norm, q), self._norm_heads(self.k_norm, k)), dim=-1)
        qk, v_BTKd = (part.unflatten(-1, (-1, self.head_dim)) for part in (qk, v))
        if isinstance(positions, tuple):
            qk = apply_rope(qk, positions)
        bias = positions if isinstance(positions, torch.Tensor) else None
        q_BTHd, k_BTKd = qk.split((q_size // self.head_dim, k_size // self.head_dim), dim=2)
        attended_BTHd = recomputed(self.recompute, self._attend, q_BTHd, k_BTKd, v_BTKd, bias, batch, cache)
        return self.o_proj(attended_BTHd.flatten(2))

    def _norm_heads(self, norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """[B, T, H * d], each head normed alone or all as one."""
        if self.qk_norm == "full":
            return norm(x)
        return norm(x.unflatten(-1, (-1, self.head_dim))).flatten(-2)

    def _attend(
        self,
        q_BTHd: torch.Tensor,
        k_BTKd: torch.Tensor,
        v_BTKd: torch.Tensor,
        bias_HTT: torch.Tensor | None,
        batch: LocalBatch,
        cache: KeyValueCache | None,
    ) -> torch.Tensor:
        """What each head sees, [B, T, H, d]."""
        if cache is not None:
            k_BTKd, v_BTKd = cache.extend(self.layer, k_BTKd, v_BTKd, self.scoring.window)
            return attend(q_BTHd, k_BTKd, v_BTKd, last_documents(batch, k_BTKd), scoring=self.scoring)
        if self.core is not None:
            if batch.documents is not None:
                raise LayoutError(
                    "kernels.backend='te' attends to all earlier tokens of a row, but here rows hold documents that do "
                    "not see each other; set kernels.backend = 'torch'"
                )
            return self.core(q_BTHd, k_BTKd, v_BTKd)
        dropped = None
        if self.dropout and batch.dropout is not None:
            dropped = WeightDropout(self.dropout, batch.dropout.rows(self.path), self.first_head)
        if bias_HTT is not None:
            tokens, documents = q_BTHd.shape[1], batch.documents
            mask = None
            if self.scoring.causal or documents is not None:
                mask = visible(0, tokens, 0, tokens, documents, q_BTHd.device, self.scoring)
            return attend_scored(q_BTHd, k_BTKd, v_BTKd, mask, bias_HTT, self.scoring, dropped)
        return attend_in_context(q_BTHd, k_BTKd, v_BTKd, batch.documents, dropped, self.mesh, self.scoring)
