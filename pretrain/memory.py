"""What a run will need on each rank, estimated from its configuration before any process starts. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pretrain.config import EngineConfig, OptimTable
from pretrain.simulate import peak_in_flight, simulate_step
from workbench.spec.execution import Recompute
from workbench.spec.geometry import ParameterSpec, Place
from workbench.spec.latent import LatentSizes
from workbench.spec.layout import ParallelLayout
from workbench.spec.model import ModelConfig
from workbench.spec.schema import block_norms, predicts_words, stage_specs

MASTER_BYTES = GRADIENT_BYTES = 4
FORMAT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
IN_BLOCKS, IN_ONE, UNDER_MASKS = 1024, 127, 256
"""The longest rows of which a CPU keeps the scores of causal attention; that it takes for one block; and of which it
keeps scores under every mask (workbench/models/blockwise.py and attend.py)."""
BLOCKS = 4
"""Blocks of queries of longer rows than those of one block."""


@dataclass(frozen=True)
class StageMemory:
    """The peak of one rank of a pipeline stage, in bytes, without what torch itself needs.

    `num_parameters` counts what the rank holds when nothing is sharded over data parallelism, padding included.
    parameters, optimizer: at rest, between steps. gradients: what accumulates over a step. working: parameters gathered
    or cast for computing, and buffers. host: moments that lie in the host's memory while the rest is on a GPU.
    """

    stage: int
    num_parameters: int
    parameters: int
    working: int
    gradients: int
    optimizer: int
    activations: int
    host: int

    @property
    def total(self) -> int:
        """On the device."""
        return self.parameters + self.working + self.gradients + self.optimizer + self.activations


def estimate_memory(
    model: ModelConfig, layout: ParallelLayout, config: EngineConfig, *, on_cpu: bool = True
) -> tuple[StageMemory, ...]:
    """One estimate a stage. Parameters, gradients and moments are counted; activations follow from what each layer
    keeps for its backward, times what the schedule keeps in flight. What waits in the host's memory
    (`recompute.offload`) is not counted."""
    played = simulate_step(config, layout)
    # In stages: a chunk is a part of one, and of chunks that differ the average is good enough.
    in_flight = [chunks / layout.vpp for chunks in played.peak_in_flight]
    ends = [span.action for span in played.spans if span.stage == layout.last_stage]
    scored = peak_in_flight(action for action in ends if action.chunk == layout.vpp - 1)
    found = []
    for stage in range(layout.pp):
        specs = tuple(stage_specs(model, layout, stage))
        local, kept = _elements(specs, layout), _elements(specs, layout, shared=True)
        moments = _moment_bytes(specs, layout, config.optim)
        offloads = config.optim.offload and not on_cpu
        layers = len(layout.layers(model.num_hidden_layers, stage)) * in_flight[stage]
        activations, of_one = _layers_activations(model, layout, config, layers, on_cpu=on_cpu)
        logits = _logits_bytes(model, layout, config, scored) if stage == layout.last_stage else 0
        found.append(
            StageMemory(
                stage=stage,
                num_parameters=local,
                parameters=kept * MASTER_BYTES,
                working=_working_bytes(specs, layout, config, in_flight[stage]),
                gradients=(local if layout.shard in ("none", "zero1") else kept) * GRADIENT_BYTES,
                optimizer=0 if offloads else moments,
                activations=activations + max(of_one, logits),
                host=moments if offloads else 0,
            )
        )
    return tuple(found)


def _elements(specs: Iterable[ParameterSpec], layout: ParallelLayout, *, shared: bool = False) -> int:
    """Elements of parameters on a rank, or on the first of those that share their rows; the last may hold fewer."""
    found = 0
    for spec in specs:
        sharers = layout.expert_shard_degree if spec.dealt > 1 else layout.shard_degree
        rows, *columns = spec.local_shape(layout.tp)
        found += -(-rows // (sharers if shared else 1)) * math.prod(columns)
    return found


def _groups(specs: Sequence[ParameterSpec], layout: ParallelLayout) -> tuple[list[int], int]:
    """Elements of each layer, which are gathered and reduced together, and of all the rest of a stage."""
    layers: dict[Place, int] = {}
    for spec in specs:
        if isinstance(place := spec.places[0], int):
            layers[place] = layers.get(place, 0) + _elements([spec], layout)
    return list(layers.values()), _elements([spec for spec in specs if not isinstance(spec.places[0], int)], layout)


def _working_bytes(
    specs: Sequence[ParameterSpec], layout: ParallelLayout, config: EngineConfig, in_flight: float
) -> int:
    """Whole parameters that a step computes with besides those at rest, and buffers in which gradients are summed."""
    whole, compute = _elements(specs, layout), FORMAT_BYTES[config.precision.compute]
    layers, rest = _groups(specs, layout)
    if layout.replicas == 1:
        # A layer casts its weights and keeps the copy until the backward of the microbatch is done; one that is
        # computed again only as long as the rest of it.
        copies = in_flight / (max(len(layers), 1) if config.recompute.mode == "full" else 1)
        return math.ceil(whole * compute * copies) if compute < MASTER_BYTES else 0
    # Under zero3 a layer is gathered while its neighbour is still computed with.
    gathered = rest + sum(sorted(layers)[-2:]) if layout.shard == "zero3" else whole
    return gathered * compute + max(*layers, rest) * GRADIENT_BYTES


def _moment_bytes(specs: Sequence[ParameterSpec], layout: ParallelLayout, optim: OptimTable) -> int:
    """One moment for a matrix under Muon, two for everything else."""
    matrices = [spec for spec in specs if optim.name == "muon" and spec.role == "matrix"]
    two, one = _elements(specs, layout, shared=True), _elements(matrices, layout, shared=True)
    return (2 * two - one) * FORMAT_BYTES[optim.moments]


def _layers_activations(
    model: ModelConfig, layout: ParallelLayout, config: EngineConfig, num_layers: float, *, on_cpu: bool
) -> tuple[int, int]:
    """Bytes that `num_layers` layers keep, those in flight counted apiece, and what backward of one needs besides."""

    def layer(mode: Recompute) -> int:
        elements = _layer_activations(model, layout, config, on_cpu=on_cpu, recompute=mode)
        return elements * FORMAT_BYTES[config.precision.compute]

    working = layer("none") * 5 // 4  # all of one layer, and gradients of a part of it
    if config.recompute.offload:
        return 0, working
    mode = config.recompute.mode
    return math.ceil(num_layers * layer(mode)), 0 if mode == "none" else working


def _layer_activations(
    model: ModelConfig, layout: ParallelLayout, config: EngineConfig, *, on_cpu: bool, recompute: Recompute
) -> int:
    """Elements that a layer keeps for the backward of one microbatch, those of its rank's tokens: its input alone, if
    it is computed again whole.

    Whole on every tensor rank, or cut by tokens under sequence parallelism: inputs and outputs of the norms, and of
    an RMSNorm the value before its weight and the input in fp32, which counts twice in bf16. Cut over tp: query, key
    and value, query and key after their norms and after the rotation, the output of attention, and of the MLP up,
    (gate,) activation and product. Under context parallelism also keys and values of the whole row, for each query
    head, or in a ring the output of attention once more in fp32. Selective recompute keeps neither these, nor scores,
    nor the activation of a gated MLP.
    """
    batch, shares = config.batch, layout.tp if layout.sequence_parallel else 1
    tokens = batch.micro_size * batch.seq_len // layout.cp
    if recompute == "full":
        return tokens * model.hidden_size // shares
    norm = _norm_copies(model, config)
    whole = len(list(filter(None, block_norms(model)))) * norm * model.hidden_size
    inner = 2 if not model.gated_mlp else 3 if recompute == "selective" else 4
    if model.latent is not None:
        own, gathered, attention = _latent_activations(model, model.latent, layout, config, on_cpu, recompute)
        whole, extra = whole + own, gathered * tokens
    else:
        attention, extra = _attention_activations(model, layout, config, on_cpu, recompute), 0
    cut = attention + inner * _mean_width(model)
    experts = _expert_activations(model, layout, tokens, inner=inner)
    return tokens * (whole // shares + cut // layout.tp) + extra + experts


def _norm_copies(model: ModelConfig, config: EngineConfig) -> int:
    """How often a norm keeps its input, in one form or another; fp32 counts twice in bf16."""
    return 2 if model.norm == "layernorm" else 3 if config.precision.compute == "fp32" else 4


def _attention_activations(
    model: ModelConfig, layout: ParallelLayout, config: EngineConfig, on_cpu: bool, recompute: Recompute
) -> int:
    """Elements a token that attention keeps of all heads."""
    heads = model.num_attention_heads * model.head_dim
    kv_heads = max(model.num_key_value_heads, layout.tp) * model.head_dim
    attention = 2 * heads + 2 * kv_heads
    if model.position_embedding == "rope":
        attention += heads + kv_heads
    if model.qk_norm != "none":
        attention += _norm_copies(model, config) * (heads + kv_heads)
    if recompute == "none":
        attention += _core_activations(model, layout, config.batch.seq_len, on_cpu=on_cpu)
    return attention


def _mean_width(model: ModelConfig) -> int:
    """The width of a layer's MLP, or of the expert that all its tokens share; the mean of all layers."""
    shared = 0 if model.moe is None else model.moe.shared_expert_intermediate_size
    layers = range(model.num_hidden_layers)
    return sum(shared if model.has_experts(layer) else model.intermediate_size for layer in layers) // len(layers)


def _expert_activations(model: ModelConfig, layout: ParallelLayout, tokens: int, *, inner: int) -> int:
    """Elements that experts keep, at even load, the mean of all layers: a row and an output for each expert of a token,
    and what lies between them, `inner` times its width; and the router's logits and scores, in fp32."""
    moe = model.moe
    if moe is None:
        return 0
    own = tokens // (layout.tp if layout.sequence_parallel else 1)
    routed = tokens if layout.expert_tp > 1 else own
    slot = 2 * model.hidden_size + inner * moe.moe_intermediate_size // layout.expert_tp
    layer = routed * moe.num_experts_per_tok * slot + own * 4 * moe.num_experts
    return layer * len(moe.sparse_layers(model.num_hidden_layers)) // model.num_hidden_layers


def _latent_activations(
    model: ModelConfig,
    latent: LatentSizes,
    layout: ParallelLayout,
    config: EngineConfig,
    on_cpu: bool,
    recompute: Recompute,
) -> tuple[int, int, int]:
    """Elements a token that latent attention keeps: of a rank's tokens, of all its context rank's, and cut by heads.

    The first: what leads down and what the norms of latents keep. The second: latents that the heads read. The third:
    query and output of attention, and unless they are computed again key, value and what both come from; with the
    scores or of the whole row as in other attention.
    """
    heads, seq_len = model.num_attention_heads, config.batch.seq_len
    normed = (latent.q_lora_rank or 0) + latent.kv_lora_rank
    down, query, value = normed + latent.qk_rope_head_dim, latent.qk_head_dim, latent.v_head_dim
    own = down + normed * (1 if config.precision.compute == "fp32" else 3)
    if recompute == "selective":
        return own, down, heads * (query + value)
    keys = query + latent.qk_nope_head_dim + value
    if layout.cp == 1 and on_cpu and model.causal and seq_len <= IN_BLOCKS:
        share = _share_scored(model, seq_len)
        copies = int(share * _blocks(seq_len) * (query + value))
        return own, down, heads * (2 * query + value + keys + copies + int(share * seq_len))
    if layout.cp > 1 and layout.context == "ring":
        return own, down, heads * (query + keys + (query + value) + 3 * value)
    outputs = (2 if layout.cp > 1 else 1) * value  # of each chunk, and together
    scores = seq_len if on_cpu and seq_len <= UNDER_MASKS else 0
    return own, down * layout.cp, heads * (query + outputs + keys * layout.cp + scores)


def _core_activations(model: ModelConfig, layout: ParallelLayout, seq_len: int, *, on_cpu: bool) -> int:
    """Elements that attention itself keeps of a token, over all tensor ranks, besides its inputs and output: of capped
    scores also what the cap gives, and their softmax."""
    heads = model.num_attention_heads * model.head_dim
    if layout.cp > 1 and layout.context == "ring":
        return 2 * heads
    if model.position_embedding == "relative":
        return 3 * model.num_attention_heads * seq_len  # scores with their bias, and what they become
    is_capped = model.attn_logit_softcapping is not None
    if layout.cp == 1 and on_cpu and model.causal and seq_len <= IN_BLOCKS:
        # Blocks of queries, each with its scores and its own copy of the keys and values that it sees.
        kv_heads = max(model.num_key_value_heads, layout.tp) * model.head_dim
        scores = model.num_attention_heads * seq_len * (1 + is_capped)
        return heads + int(_share_scored(model, seq_len) * (2 * _blocks(seq_len) * kv_heads + scores))
    kept = 2 if is_capped else int(on_cpu and seq_len <= UNDER_MASKS)
    scores = kept * model.num_attention_heads * seq_len
    return scores + (2 * heads * layout.cp if layout.cp > 1 else 0)


def _blocks(seq_len: int) -> int:
    return 1 if seq_len <= IN_ONE else BLOCKS


def _share_scored(model: ModelConfig, seq_len: int) -> float:
    """The share of a row's scores that attention in blocks keeps, on average over layers: without windows 5/8 of four
    blocks, as the first of them sees one and the last all."""
    blocks, layers = _blocks(seq_len), range(model.num_hidden_layers)
    length = -(-seq_len // blocks)
    unseen = sum(
        max(0, block * length - (model.window(layer) or seq_len) + 1) // length
        for layer in layers
        for block in range(blocks)
    )
    return (blocks + 1) / (2 * blocks) - unseen / (len(layers) * blocks**2)


def _logits_bytes(model: ModelConfig, layout: ParallelLayout, config: EngineConfig, scored: int) -> int:
    """The logits of one microbatch, their softmax and their gradient; the softmax, or the gradient that waits for the
    weight's, of the other ones of `scored` that are held at once. A sequence head has next to none.

    In chunks they are few, but the gradient of the head's weight is kept with each of `scored`.
    """
    if not predicts_words(model):
        return 0
    rows = -(-model.vocab_size // layout.tp)
    tokens, chunk = config.batch.micro_size * config.batch.seq_len // layout.cp, config.kernels.loss_chunk_tokens
    compute = FORMAT_BYTES[config.precision.compute]
    # What a transform before the head keeps: its product, the activation and what its norm reads, of each of `scored`.
    shares = layout.tp if layout.sequence_parallel else 1
    kept = 3 * tokens * model.hidden_size // shares * compute * scored if model.head_transform else 0
    capped = 0 if model.final_logit_softcapping is None else compute  # what the cap's backward needs
    if not chunk:
        return kept + tokens * rows * (compute + (scored + 1) * (MASTER_BYTES + capped))
    of_chunk = min(chunk, tokens) * rows * (compute + capped + 2 * MASTER_BYTES)
    return kept + of_chunk + rows * model.hidden_size * MASTER_BYTES * scored
