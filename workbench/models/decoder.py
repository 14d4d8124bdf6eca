"""A stage of a transformer: some of its layers, with the embedding on the first stage and the head on the last.

Legend: B batch, S tokens of a row, T those of this rank, D hidden, V vocabulary (local, padded), N labels of a head
that judges rows.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from workbench.models.attention import Attention, KeyValueCache, Positions
from workbench.models.batch import Batch, LocalBatch, local_batch
from workbench.models.cross import CrossAttention, RelativeBias
from workbench.models.latent_attention import LatentAttention
from workbench.models.mlp import MLP
from workbench.models.moe import SparseMLP
from workbench.models.noise import add_noise, drop_hidden
from workbench.models.norm import build_norm
from workbench.models.pooling import label_losses, pooled, speaker
from workbench.models.recompute import recomputed
from workbench.models.rope import rope_table
from workbench.models.words import Labelled, word_losses
from workbench.parallel.chunked_loss import Chunking
from workbench.parallel.collectives import gather_copies, sum_over
from workbench.parallel.context import gather_context
from workbench.parallel.dropout import dropout
from workbench.parallel.embedding import (
    ReplicatedEmbedding,
    ReplicatedLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
)
from workbench.parallel.loss import IGNORE
from workbench.parallel.mesh import Mesh
from workbench.parallel.softcap import soft_cap
from workbench.registry import load
from workbench.spec.geometry import ParameterSpec
from workbench.spec.layout import ParallelLayout, virtual_stage
from workbench.spec.model import ModelConfig
from workbench.spec.norm_placement import SUMS
from workbench.spec.schema import block_norms, has_final_norm, predicts_words, stage_specs, tied_head

Memory = tuple[torch.Tensor, LocalBatch]
"""An encoder's output [B, S, D] (this rank's part of it) and the batch that it read."""
Output = Literal["loss", "token_losses", "logits", "pair_logits", "mean_state", "last_state"]


class Block(nn.Module):
    """One transformer layer: x + norm(attention(norm(x))), then the same with the MLP, or both of one x in parallel;
    which of the norms there are, and whether they are of the sums, is the model's `norm_placement`. `entering` hears
    of each batch before the layer computes it, also of one that is computed again."""

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
        self.cross_attn = None
        if model.num_encoder_layers and layer >= model.num_encoder_layers:
            self.cross_attention_layernorm = build_norm(model, mesh, specs, f"{path}.cross_attention_layernorm")
            self.cross_attn = CrossAttention(model, mesh, specs, layer)
        self.norms_sums = model.norm_placement == SUMS
        self.norms = block_norms(model)
        for name in filter(None, self.norms):
            self.add_module(name, build_norm(model, mesh, specs, f"{path}.{name}"))
        self.path = path
        self.dropout = model.hidden_dropout
        self.recompute = False
        self.saving: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.entering: Callable[[LocalBatch], None] | None = None

    def forward(
        self,
        x_BTD: torch.Tensor,
        positions: Positions,
        batch: LocalBatch,
        cache: KeyValueCache | None = None,
        memory: Memory | None = None,
    ) -> torch.Tensor:
        with self.saving():
            return recomputed(self.recompute, self._transform, x_BTD, positions, batch, cache, memory)

    def _transform(
        self,
        x_BTD: torch.Tensor,
        positions: Positions,
        batch: LocalBatch,
        cache: KeyValueCache | None,
        memory: Memory | None,
    ) -> torch.Tensor:
        if self.entering is not None:
            self.entering(batch)
        before_attention, after_attention, before_mlp, after_mlp = (self._norm(name) for name in self.norms)
        normed_BTD = before_attention(x_BTD)
        attended_BTD = self.self_attn(normed_BTD, positions, batch, cache)
        sum_BTD = self._add(x_BTD, attended_BTD, after_attention, batch, "self_attn.output")
        if self.cross_attn is not None:
            assert memory is not None
            read_BTD = self.cross_attn(self.cross_attention_layernorm(sum_BTD), memory[0], batch, memory[1])
            sum_BTD = sum_BTD + drop_hidden(read_BTD, self.dropout, batch, self.path, "cross_attn.output")
        if not self.shared_norm:
            normed_BTD = before_mlp(x_BTD if self.parallel_residual else sum_BTD)
        transformed_BTD = self.mlp(normed_BTD, batch)
        return self._add(sum_BTD, transformed_BTD, after_mlp, batch, "mlp.output")

    def _add(
        self,
        x_BTD: torch.Tensor,
        branch_BTD: torch.Tensor,
        norm: Callable[[torch.Tensor], torch.Tensor],
        batch: LocalBatch,
        site: str,
    ) -> torch.Tensor:
        """The sum of x and what a branch made of it; the norm is of the branch, or of the sum."""
        if self.norms_sums:
            return norm(x_BTD + drop_hidden(branch_BTD, self.dropout, batch, self.path, site))
        return x_BTD + drop_hidden(norm(branch_BTD), self.dropout, batch, self.path, site)

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
        self.compiles_loss = False
        self.label_smoothing = self.embedding_noise = 0.0
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
        if self.has_embedding and model.type_vocab_size:
            self.embed_types = ReplicatedEmbedding(mesh, specs["embed_types.weight"])
        if self.has_embedding and model.embed_norm:
            self.embed_norm = build_norm(model, mesh, specs, "embed_norm")
        if model.position_embedding == "relative":
            for path, causal in (("encoder_bias", False), ("decoder_bias", True)):
                distance = model.relative_attention_max_distance
                table = RelativeBias(mesh, specs[f"{path}.weight"], causal=causal, max_distance=distance)
                self.add_module(path, table)
        indices = layout.layers(model.num_hidden_layers, stage)
        self.layers = nn.ModuleDict({str(i): Block(model, mesh, specs, i) for i in indices})
        if model.num_encoder_layers - 1 in indices:
            self.encoder_norm = build_norm(model, mesh, specs, "encoder_norm")
        if self.has_head:
            self._add_heads(specs)

    def _add_heads(self, specs: dict[str, ParameterSpec]) -> None:
        model, mesh = self.model, self.mesh

        def dense(path: str) -> ReplicatedLinear:
            return ReplicatedLinear(mesh, specs[f"{path}.weight"], specs.get(f"{path}.bias"))

        self.norm = build_norm(model, mesh, specs, "norm") if has_final_norm(model) else nn.Identity()
        if model.pooler:
            self.pooler = dense("pooler")
        if model.num_labels:
            self.score = dense("score")
        if model.next_sentence:
            self.next_sentence = dense("next_sentence")
        if model.head_transform:
            self.head_transform = dense("head_transform")
            self.head_activation = load("workbench.models.activations", model.hidden_act, "ACTIVATION")
            self.head_norm = build_norm(model, mesh, specs, "head_norm")
        if predicts_words(model):
            self.lm_head = VocabParallelHead(mesh, specs.get("lm_head.weight"), specs.get("lm_head.bias"))

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
        ranks. "token_losses": loss of each label [B, S] (or [B]), 0 where ignored. "logits": [B, S, vocab_size]; of a
        head of labels [B, S, N] or [B, N]; of a pooler that no head reads [B, D]; without any the states [B, S, D].
        "pair_logits": [B, 2], whether segments follow each other. "mean_state", "last_state": [B, D], of each row's
        tokens. All but the loss are of whole rows in token order, on every rank; their backward sums gradients over
        context ranks. `hidden_BTD` comes from the previous virtual stage; None on the first.
        """
        assert cache is None or self.mesh.layout.token_multiple == 1, "decoding shares no tokens between ranks"
        if self.model.num_encoder_layers:
            return self._forward_pair(hidden_BTD, batch, output, chunk)
        start = cache.length if cache is not None else 0
        local = local_batch(batch, self.mesh, start=start, causal=self.model.causal)
        if self.is_first(chunk):
            hidden_BTD = self._embed(local, "embed")
        assert hidden_BTD is not None
        ropes = self._ropes(local)
        with self.region():
            for index in self.chunks[chunk]:
                hidden_BTD = self.layers[str(index)](hidden_BTD, ropes[self.model.slides(index)], local, cache)
        if cache is not None:
            cache.length += batch.input_ids.shape[1]
        if not self.is_last(chunk):
            return hidden_BTD
        return self._end(self.norm(hidden_BTD), local, output, batch.input_ids.shape[1])

    def _forward_pair(self, hidden_BTD: torch.Tensor | None, batch: Batch, output: Output, chunk: int) -> torch.Tensor:
        """As `forward`, of an encoder and a decoder. Their tokens travel together, those of the encoder first: a stage
        passes on what it does not compute with."""
        assert batch.decoder_ids is not None
        source = local_batch(replace(batch, labels=None, decoder_ids=None), self.mesh, causal=False)
        target = local_batch(Batch(batch.decoder_ids, batch.labels, dropout=batch.dropout), self.mesh)
        if self.is_first(chunk):
            hidden_BTD = torch.cat((self._embed(source, "encoder.embed"), self._embed(target, "embed")), dim=1)
        assert hidden_BTD is not None
        x_BSD, y_BTD = hidden_BTD.split([len(side.hidden_tokens) for side in (source, target)], dim=1)
        encoder = self.model.num_encoder_layers
        layers = self.chunks[chunk]
        with self.region():
            if layers.start < encoder:
                x_bias = self.encoder_bias(source.tokens.numel(), self.compute_dtype)
            if layers.stop > encoder:
                y_bias = self.decoder_bias(target.tokens.numel(), self.compute_dtype)
            for index in layers:
                layer = self.layers[str(index)]
                if index < encoder:
                    x_BSD = layer(x_BSD, x_bias, source)
                else:
                    y_BTD = layer(y_BTD, y_bias, target, None, (x_BSD, source))
                if index == encoder - 1:
                    x_BSD = self.encoder_norm(x_BSD)
                    x_BSD = drop_hidden(x_BSD, self.model.final_dropout, source, "encoder.final")
        if not self.is_last(chunk):
            return torch.cat((x_BSD, y_BTD), dim=1)
        return self._end(self.norm(y_BTD), target, output, batch.decoder_ids.shape[1])

    def _end(self, x_BTD: torch.Tensor, local: LocalBatch, output: Output, length: int) -> torch.Tensor:
        """What `output` names, for rows of `length` tokens."""
        x_BTD = drop_hidden(x_BTD, self.model.final_dropout, local, "final")
        if output == "pair_logits":
            return self._judge(self.next_sentence, x_BTD, local, None, "logits")
        if output in ("mean_state", "last_state"):
            return pooled(self._all_tokens(x_BTD), local, self.mesh.cp, output)
        if self.model.label_tokens:
            return self._judge_tokens(x_BTD, local, output, length)
        if not (predicts_words(self.model) or self.model.num_labels or self.model.pooler):
            return gather_context(self._all_tokens(x_BTD), self.mesh.cp)[:, :length]
        if not predicts_words(self.model):
            head = self.score if self.model.num_labels else nn.Identity()
            return self._judge(head, x_BTD, local, local.labels, output, self.model.classifier_dropout)
        found = self._predict(x_BTD, local, output)
        if output != "loss":
            return gather_context(found, self.mesh.cp)[:, :length]
        if local.pair_labels is None:
            return found
        return found + local.pair_weight * self._judge(self.next_sentence, x_BTD, local, local.pair_labels, "loss")

    def is_first(self, chunk: int = 0) -> bool:
        """Whether `chunk` of this stage is where the network begins."""
        return self.virtual[chunk] == 0

    def is_last(self, chunk: int = 0) -> bool:
        """Whether `chunk` of this stage is where the network ends."""
        return self.virtual[chunk] == self.num_virtual - 1

    def _embed(self, batch: LocalBatch, site: str) -> torch.Tensor:
        x_BTD = self.embed_tokens(batch.input_ids, self.compute_dtype)
        if self.model.scale_embeddings:
            x_BTD = x_BTD * self.embed_scale
        x_BTD = add_noise(x_BTD, self.embedding_noise, batch, site)
        if self.model.position_embedding == "learned":
            x_BTD = x_BTD + self.embed_positions(batch.hidden_positions, self.compute_dtype)
        if self.model.type_vocab_size:
            segments = torch.zeros_like(batch.hidden_tokens) if batch.hidden_segments is None else batch.hidden_segments
            x_BTD = x_BTD + self.embed_types(segments, self.compute_dtype)
        if self.model.embed_norm:
            x_BTD = self.embed_norm(x_BTD)
        return drop_hidden(x_BTD, self.model.embed_dropout, batch, site)

    @property
    def _smoothing(self) -> float:
        return self.label_smoothing if self.training else 0.0

    def _ropes(self, batch: LocalBatch) -> tuple[Positions, Positions]:
        """The rotations of layers that see all tokens, and of those that slide."""
        if self.model.position_embedding != "rope":
            return None, None
        table = rope_table(self.model, batch.positions, batch.reach, self.compute_dtype)
        if self.model.rope_local_theta is None:
            return table, table
        return table, rope_table(self.model, batch.positions, batch.reach, self.compute_dtype, local=True)

    def _predict(self, x_BTD: torch.Tensor, batch: LocalBatch, output: Output) -> torch.Tensor:
        """Loss, losses or logits of the tokens of this context rank."""
        labelled = None if output == "logits" else Labelled.of(batch, self.lm_head)
        x = x_BTD if labelled is None else labelled.pick(x_BTD)
        if self.model.head_transform:
            x = self.head_norm(self.head_activation(self.head_transform(x)))
        if self.model.logit_scale != 1.0:
            x = x * self.model.logit_scale
        if labelled is None:
            logits_BTV = soft_cap(self.lm_head(x, self._head_weight), self.model.final_logit_softcapping)
            return gather_copies(logits_BTV, self.mesh.tp, dim=-1)[..., : self.model.vocab_size]
        how = Chunking(
            self.mesh.tp,
            self.model.vocab_size,
            self.loss_chunk_tokens,
            self.model.final_logit_softcapping,
            self._smoothing,
            self.compiles_loss,
        )
        sums = output == "loss"
        found = word_losses(x, self.lm_head, self._head_weight, labelled.labels_N, how, sums=sums)
        return found if sums else labelled.spread(found)

    @property
    def _head_weight(self) -> nn.Parameter:
        weight = self.embed_tokens.weight if self.tied else self.lm_head.weight
        assert weight is not None
        return weight

    def _judge(
        self,
        head: nn.Module,
        x_BTD: torch.Tensor,
        batch: LocalBatch,
        labels_B: torch.Tensor | None,
        output: Output,
        probability: float = 0.0,
    ) -> torch.Tensor:
        """What `head` gives, after dropout, for the token of each row that speaks for it: the last one, or the first
        one by way of the pooler. One context rank has it; that one counts."""
        x_BD, is_here_B = speaker(self._all_tokens(x_BTD), batch, first=self.model.pooler)
        if self.model.pooler:
            x_BD = torch.tanh(self.pooler(x_BD))
        if probability and batch.dropout is not None:
            features_D = torch.arange(x_BD.shape[-1], device=x_BD.device)
            x_BD = dropout(x_BD, probability, batch.dropout.rows("classifier"), (features_D,))
        logits_BN = head(x_BD)
        if output == "logits":
            return sum_over(logits_BN.masked_fill(~is_here_B.unsqueeze(-1), 0.0), self.mesh.cp)
        assert labels_B is not None
        losses_B = label_losses(logits_BN, labels_B.masked_fill(~is_here_B, IGNORE), self._smoothing)
        return losses_B.sum() if output == "loss" else sum_over(losses_B, self.mesh.cp)

    def _judge_tokens(self, x_BTD: torch.Tensor, batch: LocalBatch, output: Output, length: int) -> torch.Tensor:
        """What the head gives for every token."""
        x_BTD = drop_hidden(x_BTD, self.model.classifier_dropout, batch, "classifier")
        logits_BTN = self.score(self._all_tokens(x_BTD))
        if output == "logits":
            return gather_context(logits_BTN, self.mesh.cp)[:, :length]
        assert batch.labels is not None
        losses_BT = label_losses(logits_BTN, batch.labels, self._smoothing)
        return losses_BT.sum() if output == "loss" else gather_context(losses_BT, self.mesh.cp)[:, :length]

    def _all_tokens(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """The states of all tokens of this context rank, on which all tensor ranks go on to compute the same."""
        return gather_copies(x_BTD, self.mesh.tp) if self.mesh.layout.sequence_parallel else x_BTD
