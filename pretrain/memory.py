"""What a run will need on each rank, estimated from its configuration before any process starts. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pretrain.config import EngineConfig
from pretrain.simulate import peak_in_flight, simulate_step
from workbench.spec.execution import Recompute
from workbench.spec.layout import ParallelLayout
from workbench.spec.model import ModelConfig
from workbench.spec.schema import stage_specs

MASTER_BYTES = GRADIENT_BYTES = 4
MOMENT_BYTES = 8
COMPUTE_BYTES = {"fp32": 4, "bf16": 2}
SCORED_TOKENS = range(128, 1024 + 1)
"""Sequence lengths at which a CPU keeps the scores of attention (workbench/models/blockwise.py)."""


@dataclass(frozen=True)
class StageMemory:
    """The peak of one rank of a pipeline stage, in bytes, without what torch itself needs.

    `num_parameters` counts what the rank holds when nothing is sharded over data parallelism, padding included.
    """

    stage: int
    num_parameters: int
    parameters: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations


def estimate_memory(
    model: ModelConfig, layout: ParallelLayout, config: EngineConfig, *, on_cpu: bool = True
) -> tuple[StageMemory, ...]:
    """One estimate a stage. Parameters, gradients and moments are counted; activations follow from what each layer
    keeps for its backward, times what the schedule keeps in flight. What waits in the host's memory
    (`recompute.offload`) is not counted."""
    compute = COMPUTE_BYTES[config.precision.compute]
    played = simulate_step(config, layout)
    # In stages: a chunk is a part of one, and of chunks that differ the average is good enough.
    in_flight = [chunks / layout.vpp for chunks in played.peak_in_flight]
    ends = [span.action for span in played.spans if span.stage == layout.last_stage]
    scored = peak_in_flight(action for action in ends if action.chunk == layout.vpp - 1)
    found = []
    for stage in range(layout.pp):
        local = sum(math.prod(spec.local_shape(layout.tp)) for spec in stage_specs(model, layout, stage))
        kept = -(-local // layout.shard_degree)
        # A layer casts its weights to bf16 and keeps the copy until the backward of the microbatch is done.
        copies = 0
        if compute != MASTER_BYTES:
            copies = math.ceil(local * compute * (1 if layout.replicas > 1 else in_flight[stage]))
        if layout.shard in ("zero1", "zero2"):
            copies = local * compute
        num_layers = len(layout.layers(model.num_hidden_layers, stage))
        if config.recompute.mode == "full":
            copies //= max(num_layers, 1)  # those of a layer that is computed again go with the rest of it
        kept_of_layers, working = _layers_activations(
            model, layout, config, num_layers * in_flight[stage], on_cpu=on_cpu
        )
        logits = _logits_bytes(model, layout, config, scored) if stage == layout.last_stage else 0
        found.append(
            StageMemory(
                stage=stage,
                num_parameters=local,
                parameters=kept * MASTER_BYTES + copies,
                gradients=kept * GRADIENT_BYTES,
                optimizer=kept * MOMENT_BYTES,
                activations=math.ceil(kept_of_layers) + max(working, logits),
            )
        )
    return tuple(found)


def _layers_activations(
    model: ModelConfig, layout: ParallelLayout, config: EngineConfig, num_layers: float, *, on_cpu: bool
) -> tuple[float, int]:
    """Bytes that `num_layers` layers keep, those in flight counted apiece, and what backward of one needs besides."""

    def layer(mode: Recompute) -> int:
        elements = _layer_activations(model, layout, config, on_cpu=on_cpu, recompute=mode)
        return elements * COMPUTE_BYTES[config.precision.compute]

    working = layer("none") * 5 // 4  # all of one layer, and gradients of a part of it
    if config.recompute.offload:
        return 0, working
    mode = config.recompute.mode
    return num_layers * layer(mode), 0 if mode == "none" else working


def _layer_activations(
    model: ModelConfig, layout: ParallelLayout, config: EngineConfig, *, on_cpu: bool, recompute: Recompute
) -> int:
    """Elements that a layer keeps for the backward of one microbatch, those of its rank's tokens: its input alone, if
    it is computed again whole.

    Whole on every tensor rank, or cut by tokens under sequence parallelism: inputs and outputs of the two norms, and of
    an RMSNorm the value before its weight and the input in fp32, which counts twice in bf16. Cut over tp: query, key
    and value, query and key after the rotation, the output of attention, and of the MLP up, (gate,) activation and
    product. Under context parallelism also keys and values of the whole row, for each query head, or in a ring the
    output of attention once more in fp32. Selective recompute keeps neither these, nor scores, nor the activation of a
    gated MLP.
    """
    batch, shares = config.batch, layout.tp if layout.sequence_parallel else 1
    tokens = batch.micro_size * batch.seq_len // layout.cp
    if recompute == "full":
        return tokens * model.hidden_size // shares
    heads = model.num_attention_heads * model.head_dim
    kv_heads = max(model.num_key_value_heads, layout.tp) * model.head_dim
    norm = 2 if model.norm == "layernorm" else 3 if config.precision.compute == "fp32" else 4
    whole = 2 * norm * model.hidden_size
    gated = 3 if recompute == "selective" else 4
    mlp = (gated if model.gated_mlp else 2) * model.intermediate_size
    attention = 2 * heads + 2 * kv_heads
    if model.position_embedding == "rope":
        attention += heads + kv_heads
    if recompute == "none" and layout.cp > 1:
        attention += 2 * heads * (layout.cp if layout.context == "all_gather" else 1)
    elif recompute == "none" and on_cpu and batch.seq_len in SCORED_TOKENS:
        # Four blocks of queries, each with its scores and its own copy of the keys and values that it sees:
        # 1/4 + 2/4 + 3/4 + 1 of them, which is 5/8 of all scores and 5/2 times the keys and values.
        attention += heads + 5 * kv_heads + model.num_attention_heads * batch.seq_len * 5 // 8
    cut = attention + mlp
    return tokens * (whole // shares + cut // layout.tp)


def _logits_bytes(model: ModelConfig, layout: ParallelLayout, config: EngineConfig, scored: int) -> int:
    """The logits of one microbatch, their softmax and their gradient; the softmax, or the gradient that waits for the
    weight's, of the other ones of `scored` that are held at once. A sequence head has next to none.

    In chunks they are few, but the gradient of the head's weight is kept with each of `scored`.
    """
    if model.num_labels:
        return 0
    rows = -(-model.vocab_size // layout.tp)
    tokens = config.batch.micro_size * config.batch.seq_len // layout.cp
    compute, chunk = COMPUTE_BYTES[config.precision.compute], config.kernels.loss_chunk_tokens
    if not chunk:
        return tokens * rows * (compute + (scored + 1) * MASTER_BYTES)
    logits = min(chunk, tokens) * rows * (compute + 2 * MASTER_BYTES)
    return logits + rows * model.hidden_size * MASTER_BYTES * scored
