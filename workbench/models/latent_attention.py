"""Multi-head latent attention (arXiv:2405.04434, sec. 2.1): keys, values and queries come from small latents.

Every rank computes the latents of its tokens; over tp they are gathered, or their gradients summed, where they enter
the heads, and over cp before they are expanded: never the hidden states, nor the keys and values of all heads.

Legend: B batch, t tokens of this rank between the layers, T tokens of this context rank, S tokens attended to,
D hidden, C width of a latent, H heads (local), d head size.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import nn

from workbench.models.attend import WeightDropout, attend
from workbench.models.attention import KeyValueCache, Positions, last_documents
from workbench.models.batch import LocalBatch
from workbench.models.context import attend_in_context, attend_to_row
from workbench.models.norm import RMSNorm
from workbench.models.recompute import recomputed
from workbench.models.rope import apply_rope
from workbench.models.scoring import Scoring, scoring_of
from workbench.parallel.context import gather_context
from workbench.parallel.linear import ColumnParallelLinear, DuplicatedLinear, RowParallelLinear
from workbench.parallel.mesh import Mesh
from workbench.parallel.sequence import whole_input
from workbench.spec.geometry import ParameterSpec
from workbench.spec.latent import LatentSizes
from workbench.spec.model import ModelConfig

NORM_EPS = 1e-6
"""Of the norms of latents in all models that have them, whatever their norm_eps is."""


class LatentAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v, each token attending to itself and those before it in its document.

    A head's key is a part of its own, without position, and a rotary part that all heads share.
    """

    def __init__(self, model: ModelConfig, mesh: Mesh, specs: dict[str, ParameterSpec], layer: int) -> None:
        super().__init__()
        self.path = path = f"layers.{layer}.self_attn"
        self.down_proj = DuplicatedLinear(mesh, specs[f"{path}.down_proj.weight"], specs.get(f"{path}.down_proj.bias"))
        assert model.latent is not None
        self.sizes = sizes = model.latent
        if sizes.q_lora_rank:
            self.q_a_layernorm = RMSNorm(mesh, specs[f"{path}.q_a_layernorm.weight"], NORM_EPS)
            self.q_b_proj = ColumnParallelLinear(mesh, specs[f"{path}.q_b_proj.weight"], entered=True)
        else:
            self.q_proj = ColumnParallelLinear(mesh, specs[f"{path}.q_proj.weight"])
        self.kv_a_layernorm = RMSNorm(mesh, specs[f"{path}.kv_a_layernorm.weight"], NORM_EPS)
        self.kv_b_proj = ColumnParallelLinear(mesh, specs[f"{path}.kv_b_proj.weight"], entered=True)
        self.o_proj = RowParallelLinear(mesh, specs[f"{path}.o_proj.weight"], specs.get(f"{path}.o_proj.bias"))
        self.mesh, self.layer, self.dropout = mesh, layer, model.attention_dropout
        self.scoring = _scoring(model, sizes, layer)
        self.recompute = False
        self.first_head = model.num_attention_heads // mesh.tp.size * mesh.tp.rank

    def forward(
        self,
        x_BtD: torch.Tensor,
        positions: Positions,
        batch: LocalBatch,
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        assert isinstance(positions, tuple), "latents come with rotary positions"
        sizes = self.sizes
        widths = (sizes.q_lora_rank or 0, sizes.kv_lora_rank, sizes.qk_rope_head_dim)
        q_BtC, kv_BtC, k_rope_Btd = self.down_proj(x_BtD).split(widths, dim=-1)
        if sizes.q_lora_rank:
            q_BtC = self.q_a_layernorm(q_BtC)
        latents_BtC = torch.cat((q_BtC, self.kv_a_layernorm(kv_BtC), k_rope_Btd), dim=-1)
        q_BTC, kv_BTC, k_rope_BTd = whole_input(latents_BtC, self.mesh).split(widths, dim=-1)
        q_BTHd = (self.q_b_proj(q_BTC) if sizes.q_lora_rank else self.q_proj(x_BtD)).unflatten(
            -1, (-1, sizes.qk_head_dim)
        )
        q_nope_BTHd, q_rope_BTHd = q_BTHd.split((sizes.qk_nope_head_dim, sizes.qk_rope_head_dim), dim=-1)
        q_BTHd = torch.cat((q_nope_BTHd, apply_rope(q_rope_BTHd, positions)), dim=-1)
        k_rope_BTd = apply_rope(k_rope_BTd.unsqueeze(2), positions).squeeze(2)
        attended_BTHd = recomputed(self.recompute, self._attend, q_BTHd, kv_BTC, k_rope_BTd, batch, cache)
        return self.o_proj(attended_BTHd.flatten(2))

    def _attend(
        self,
        q_BTHd: torch.Tensor,
        kv_BTC: torch.Tensor,
        k_rope_BTd: torch.Tensor,
        batch: LocalBatch,
        cache: KeyValueCache | None,
    ) -> torch.Tensor:
        """What each head sees, [B, T, H, d]. Communicates over cp."""
        if cache is not None:
            kv_BTC, k_rope_BTd = cache.extend(self.layer, kv_BTC, k_rope_BTd, self.scoring.window)
            return attend(
                q_BTHd, *self._expand(kv_BTC, k_rope_BTd), last_documents(batch, kv_BTC), scoring=self.scoring
            )
        dropped = None
        if self.dropout and batch.dropout is not None:
            dropped = WeightDropout(self.dropout, batch.dropout.rows(self.path), self.first_head)
        if self.mesh.layout.context == "ring":
            k_BTHd, v_BTHd = self._expand(kv_BTC, k_rope_BTd)
            return attend_in_context(q_BTHd, k_BTHd, v_BTHd, batch.documents, dropped, self.mesh, self.scoring)
        row_BSC = gather_context(torch.cat((kv_BTC, k_rope_BTd), dim=-1), self.mesh.cp)
        kv_BSC, k_rope_BSd = row_BSC.split((kv_BTC.shape[-1], k_rope_BTd.shape[-1]), dim=-1)
        k_BSHd, v_BSHd = self._expand(kv_BSC, k_rope_BSd)
        return attend_to_row(q_BTHd, k_BSHd, v_BSHd, batch.documents, dropped, self.mesh.cp, self.scoring)

    def _expand(self, kv_BSC: torch.Tensor, k_rope_BSd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of this rank's heads, each [B, S, H, d]."""
        sizes = (self.sizes.qk_nope_head_dim, self.sizes.v_head_dim)
        k_nope_BSHd, v_BSHd = self.kv_b_proj(kv_BSC).unflatten(-1, (-1, sum(sizes))).split(sizes, dim=-1)
        shared_BSHd = k_rope_BSd.unsqueeze(2).expand(-1, -1, k_nope_BSHd.shape[2], -1)
        return torch.cat((k_nope_BSHd, shared_BSHd), dim=-1), v_BSHd


def _scoring(model: ModelConfig, sizes: LatentSizes, layer: int) -> Scoring:
    """How a layer scores: where rotary positions are stretched, scores grow with the factor."""
    scoring, stretch = scoring_of(model, layer), model.rope_scaling
    if stretch is None or stretch.factor <= 1 or not sizes.mscale_all_dim:
        return scoring
    growth = 0.1 * sizes.mscale_all_dim * math.log(stretch.factor) + 1
    return replace(scoring, scale=scoring.scale_of(sizes.qk_head_dim) * growth**2)
