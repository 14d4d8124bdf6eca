"""What a run will need on each rank, estimated from its configuration before any process starts. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pretrain.config import BatchTable, EngineConfig
from pretrain.simulate import peak_in_flight, simulate_step
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
    keeps for its backward, times what the schedule keeps in flight."""
    batch, compute = config.batch, COMPUTE_BYTES[config.precision.compute]
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
        layer = (
            _layer_activations(model, layout, batch, on_cpu=on_cpu)
            * compute
            * len(layout.layers(model.num_hidden_layers, stage))
        )
        logits = _logits_bytes(model, layout, batch, compute, scored) if stage == layout.last_stage else 0
        found.append(
            StageMemory(
                stage=stage,
                num_parameters=local,
                parameters=kept * MASTER_BYTES + copies,
                gradients=kept * GRADIENT_BYTES,
                optimizer=kept * MOMENT_BYTES,
                activations=math.ceil(layer * in_flight[stage]) + logits,
            )
        )
    return tuple(found)


def _layer_activations(model: ModelConfig, layout: ParallelLayout, batch: BatchTable, *, on_cpu: bool) -> int:
    """Elements that a layer keeps for the backward of one microbatch.

    Whole on every rank: inputs and outputs of the two norms, and the residual between. Cut over tp: query, key and
    value, query and key after the rotation, the output of attention, and of the MLP up, (gate,) activation and product.
    """
    heads = model.num_attention_heads * model.head_dim
    kv_heads = max(model.num_key_value_heads, layout.tp) * model.head_dim
    whole = 5 * model.hidden_size
    mlp = (4 if model.gated_mlp else 2) * model.intermediate_size
    attention = 2 * heads + 2 * kv_heads
    if model.position_embedding == "rope":
        attention += heads + kv_heads
    if on_cpu and batch.seq_len in SCORED_TOKENS:
        # Four blocks of queries, each with its scores and its own copy of the keys and values that it sees:
        # 1/4 + 2/4 + 3/4 + 1 of them, which is 5/8 of all scores and 5/2 times the keys and values.
        attention += heads + 5 * kv_heads + model.num_attention_heads * batch.seq_len * 5 // 8
    cut = attention + mlp
    return batch.micro_size * batch.seq_len * (whole + cut // layout.tp)


def _logits_bytes(model: ModelConfig, layout: ParallelLayout, batch: BatchTable, compute: int, scored: int) -> int:
    """The logits of one microbatch, their softmax and their gradient; the softmax, or the gradient that waits for the
    weight's, of the other ones of `scored` that are held at once. A sequence head has next to none."""
    if model.num_labels:
        return 0
    rows = -(-model.vocab_size // layout.tp)
    return batch.micro_size * batch.seq_len * rows * (compute + (scored + 1) * MASTER_BYTES)
