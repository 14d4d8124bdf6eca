"""A stage of a decoder: some of its layers, with the embedding on the first stage and the head on the last.

Legend: B batch, S tokens of a row, T those of this rank, D hidden, V vocabulary (local, padded), N labels of a
sequence head.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from workbench.models.attention import Attention, KeyValueCache
from workbench.models.batch import Batch, LocalBatch, local_batch
from workbench.models.latent_attention import LatentAttention
from workbench.models.mlp import MLP
from workbench.models.moe import SparseMLP
from workbench.models.norm import build_norm
from workbench.models.recompute import recomputed
from workbench.models.rope import rope_table
from workbench.parallel.chunked_loss import Chunking, chunked_loss, chunked_token_losses
from workbench.parallel.collectives import gather_copies
from workbench.parallel.context import gather_context
from workbench.parallel.dropout import dropout
from workbench.parallel.embedding import (
    ReplicatedEmbedding,
    ReplicatedLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
)
from workbench.parallel.loss import IGNORE, accumulation_dtype, vocab_parallel_cross_entropy
from workbench.parallel.mesh import Mesh
from workbench.parallel.sequence import whole_input
from workbench.parallel.softcap import soft_cap
from workbench.spec.geometry import ParameterSpec
from workbench.spec.layout import ParallelLayout, virtual_stage
from workbench.spec.model import ModelConfig
from workbench.spec.schema import block_norms, stage_specs, tied_head

Output = Literal["loss", "token_losses", "logits"]
Rope = tuple[torch.Tensor, torch.Tensor]


class Block(nn.Module):
    """One transformer layer: x + norm(attention(norm(x))), then the same with the MLP, or both of one x in parallel;
    which of the norms there are is the model's `norm_placement`."""

    def __init__(self, model: ModelConfig, mesh: Mesh, specs: dict[str, ParameterSpec], layer: int) -> None:
        super().__init__()
        path = f"layers.{layer}"
        self.self_attn = (LatentAttention if model.latent else Attention)(model, mesh, specs, layer)
        self.parallel_residual, self.shared_norm = model.parallel_residual, model.shared_norm
        self.mlp: MLP | SparseMLP
        if model.has_experts(layer):
            self.mlp = SparseMLP(model, mesh, specs, layer)
        else:
            self.mlp = MLP(model, mesh, specs, f"{path}.mlp")
        self.norms = block_norms(model)
        for name in filter(None, self.norms):
            self.add_module(name, build_norm(model, mesh, specs, f"{path}.{name}"))
        self.path = path
        self.dropout = model.hidden_dropout
        self.recompute = False
        self.saving: Callable[[], AbstractContextManager[Any]] = nullcontext

    def forward(
        self,
        x_BTD: torch.Tensor,
        rope: Rope | None,
        batch: LocalBatch,
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        with self.saving():
            return recomputed(self.recompute, self._transform, x_BTD, rope, batch, cache)

    def _transform(
        self,
        x_BTD: torch.Tensor,
        rope: Rope | None,
        batch: LocalBatch,
        cache: KeyValueCache | None,
    ) -> torch.Tensor:
        before_attention, after_attention, before_mlp, after_mlp = (self._norm(name) for name in self.norms)
        normed_BTD = before_attention(x_BTD)
        attended_BTD = after_attention(self.self_attn(normed_BTD, rope, batch, cache))
        attended_BTD = drop_hidden(attended_BTD, self.dropout, batch, self.path, "self_attn.output")
        if not self.shared_norm:
            normed_BTD = before_mlp(x_BTD if self.parallel_residual else x_BTD + attended_BTD)
        transformed_BTD = self.mlp(normed_BTD, batch) if isinstance(self.mlp, SparseMLP) else self.mlp(normed_BTD)
        transformed_BTD = after_mlp(transformed_BTD)
        x_BTD = x_BTD + attended_BTD
        return x_BTD + drop_hidden(transformed_BTD, self.dropout, batch, self.path, "mlp.output")

    def _norm(self, name: str | None) -> Callable[[torch.Tensor], torch.Tensor]:
        return (lambda x_BTD: x_BTD) if name is None else self.get_submodule(name)


class DecoderStage(nn.Module):
    """The layers of one pipeline stage, addressed by their global index, in one chunk or several.

    compute_dtype: the type of activations; parameters keep their own and are cast where they are used.
    """

    def __init__(
        self, model: ModelConfig, layout: ParallelLayout, mesh: Mesh, *, stage: int, compute_dtype: torch.dtype
    ) -> None:
        super().__init__()
        specs = {spec.path: spec for spec in stage_specs(model, layout, stage)}
        self.model, self.mesh, self.compute_dtype = model, mesh, compute_dtype
        self.loss_chunk_tokens = 0
        self.region: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.virtual = tuple(virtual_stage(layout.placement, layout.pp, stage, chunk) for chunk in range(layout.vpp))
        self.num_virtual = layout.num_virtual
        self.chunks = layout.chunks(model.num_hidden_layers)[stage]
        self.has_embedding, self.has_head = stage == 0, stage == layout.last_stage
        self.tied = tied_head(model)
        # Rounded as an activation is, as in the reference models; not on the meta device, on which stages are built.
        self.embed_scale = float(torch.tensor(model.hidden_size**0.5, dtype=compute_dtype, device="cpu"))
        if self.has_embedding or (self.has_head and self.tied):
            self.embed_tokens = VocabParallelEmbedding(mesh, specs["embed_tokens.weight"])
        if self.has_embedding and model.position_embedding == "learned":
            self.embed_positions = ReplicatedEmbedding(mesh, specs["embed_positions.weight"])
        indices = layout.layers(model.num_hidden_layers, stage)
        self.layers = nn.ModuleDict({str(i): Block(model, mesh, specs, i) for i in indices})
        if self.has_head:
            self.norm = build_norm(model, mesh, specs, "norm")
            if model.num_labels:
                self.score = ReplicatedLinear(mesh, specs["score.weight"])
            elif not self.tied:
                self.lm_head = VocabParallelHead(mesh, specs["lm_head.weight"])

    def forward(
        self,
        hidden_BTD: torch.Tensor | None,
        batch: Batch,
        output: Output = "loss",
        cache: KeyValueCache | None = None,
        *,
        chunk: int = 0,
    ) -> torch.Tensor:
        """Hidden states for the next virtual stage, or on the last one what `output` names.

        "loss": the sum of the losses of this context rank's labels, a scalar in fp32 or wider, equal on all tensor
        ranks. "token_losses": loss of each label [B, S] (or [B]), 0 where ignored. "logits": [B, S, vocab_size], or
        [B, N] of a sequence head. These two are of whole rows in token order, on every rank. `hidden_BTD`
        comes from the previous virtual stage; None on the first.
        """
        assert cache is None or self.mesh.layout.token_multiple == 1, "decoding shares no tokens between ranks"
        local = local_batch(batch, self.mesh, start=cache.length if cache is not None else 0)
        if self.is_first(chunk):
            hidden_BTD = self._embed(local)
        assert hidden_BTD is not None
        ropes = self._ropes(local)
        with self.region():
            for index in self.chunks[chunk]:
                hidden_BTD = self.layers[str(index)](hidden_BTD, ropes[self.model.slides(index)], local, cache)
        if cache is not None:
            cache.length += batch.input_ids.shape[1]
        if not self.is_last(chunk):
            return hidden_BTD
        if self.model.num_labels:
            return self._classify(self.norm(hidden_BTD), local, output)
        found = self._predict(self.norm(hidden_BTD), local, output)
        return found if output == "loss" else gather_context(found, self.mesh.cp)[:, : batch.input_ids.shape[1]]

    def is_first(self, chunk: int = 0) -> bool:
        """Whether `chunk` of this stage is where the network begins."""
        return self.virtual[chunk] == 0

    def is_last(self, chunk: int = 0) -> bool:
        """Whether `chunk` of this stage is where the network ends."""
        return self.virtual[chunk] == self.num_virtual - 1

    def _embed(self, batch: LocalBatch) -> torch.Tensor:
        x_BTD = self.embed_tokens(batch.input_ids, self.compute_dtype)
        if self.model.scale_embeddings:
            x_BTD = x_BTD * self.embed_scale
        if self.model.position_embedding == "learned":
            x_BTD = x_BTD + self.embed_positions(batch.hidden_positions, self.compute_dtype)
        return drop_hidden(x_BTD, self.model.embed_dropout, batch, "embed")

    def _ropes(self, batch: LocalBatch) -> tuple[Rope | None, Rope | None]:
        """The rotations of layers that see all tokens, and of those that slide."""
        if self.model.position_embedding != "rope":
            return None, None
        table = rope_table(self.model, batch.positions, batch.reach, self.compute_dtype)
        if self.model.rope_local_theta is None:
            return table, table
        return table, rope_table(self.model, batch.positions, batch.reach, self.compute_dtype, local=True)

    def _predict(self, x_BTD: torch.Tensor, batch: LocalBatch, output: Output) -> torch.Tensor:
        """Loss, losses or logits of the tokens of this context rank."""
        if output != "logits" and self.loss_chunk_tokens:
            return self._chunked_losses(x_BTD, batch, output)
        logits_BTV = self.embed_tokens.logits(x_BTD) if self.tied else self.lm_head(x_BTD)
        logits_BTV = soft_cap(logits_BTV, self.model.final_logit_softcapping)
        if output == "logits":
            return self.mesh.tp.all_gather(logits_BTV, dim=-1)[..., : self.model.vocab_size]
        assert batch.labels is not None
        losses_N = vocab_parallel_cross_entropy(
            logits_BTV.flatten(0, 1), batch.labels.flatten(), self.mesh.tp, vocab_size=self.model.vocab_size
        )
        return losses_N.sum() if output == "loss" else losses_N.view(batch.labels.shape)

    def _chunked_losses(self, x_BTD: torch.Tensor, batch: LocalBatch, output: Output) -> torch.Tensor:
        assert batch.labels is not None
        x_ND = whole_input(x_BTD, self.mesh).flatten(0, 1)
        weight = self.embed_tokens.weight if self.tied else self.lm_head.weight
        softcap = self.model.final_logit_softcapping
        how = Chunking(self.mesh.tp, self.model.vocab_size, self.loss_chunk_tokens, softcap)
        if output == "loss":
            return chunked_loss(x_ND, weight, batch.labels.flatten(), how)
        return chunked_token_losses(x_ND, weight, batch.labels.flatten(), how).view(batch.labels.shape)

    def _classify(self, x_BTD: torch.Tensor, batch: LocalBatch, output: Output) -> torch.Tensor:
        """What a sequence head gives for the last token of each row, which one context rank has; that one counts."""
        if self.mesh.layout.sequence_parallel:
            x_BTD = gather_copies(x_BTD, self.mesh.tp)
        is_last_BT = batch.tokens == batch.lengths.unsqueeze(-1) - 1
        rows_B = torch.arange(len(is_last_BT), device=x_BTD.device)
        logits_BN = self.score(x_BTD[rows_B, is_last_BT.int().argmax(dim=-1)])
        has_last_B = is_last_BT.any(dim=-1)
        if output == "logits":
            return self.mesh.cp.all_reduce(logits_BN.masked_fill(~has_last_B.unsqueeze(-1), 0.0))
        assert batch.labels is not None
        labels_B = batch.labels.masked_fill(~has_last_B, IGNORE)
        wide_BN = logits_BN.to(accumulation_dtype(logits_BN.dtype))
        losses_B = F.cross_entropy(wide_BN, labels_B, reduction="none", ignore_index=IGNORE)
        return losses_B.sum() if output == "loss" else self.mesh.cp.all_reduce(losses_B)


def drop_hidden(x_BTD: torch.Tensor, probability: float, batch: LocalBatch, *site: str) -> torch.Tensor:
    """Dropout on the hidden states of this rank's tokens; the same elements fall at every layout."""
    if not probability or batch.dropout is None:
        return x_BTD
    coordinates = (batch.hidden_tokens, torch.arange(x_BTD.shape[-1], device=x_BTD.device))
    return dropout(x_BTD, probability, batch.dropout.rows(*site), coordinates)
