"""What a run will need on each rank, estimated from its configuration before any process starts. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pretrain.config import BatchTable, EngineConfig
from pretrain.schedules import schedule_named
from pretrain.simulate import simulate
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
    keeps for its backward, times the microbatches that the schedule keeps in flight."""
    batch, compute = config.batch, COMPUTE_BYTES[config.precision.compute]
    num_microbatches = max(batch.global_size // (batch.micro_size * layout.dp), 1)
    in_flight = simulate(schedule_named(config.parallel.schedule), layout.pp, num_microbatches).peak_in_flight
    found = []
    for stage in range(layout.pp):
        local = sum(math.prod(spec.local_shape(layout.tp)) for spec in stage_specs(model, layout, stage))
        kept = -(-local // layout.shard_degree)
        # A layer casts its weights to bf16 and keeps the copy until the backward of the microbatch is done.
        copies = 0 if compute == MASTER_BYTES else local * compute * (1 if layout.replicas > 1 else in_flight[stage])
        if layout.shard in ("zero1", "zero2"):
            copies = local * compute
        layer = (
            _layer_activations(model, layout, batch, on_cpu=on_cpu)
            * compute
            * len(layout.layers(model.num_hidden_layers, stage))
        )
        logits = _logits_bytes(model, layout, batch, compute) if stage == layout.last_stage else 0
        found.append(
            StageMemory(
                stage=stage,
                num_parameters=local,
                parameters=kept * MASTER_BYTES + copies,
                gradients=kept * GRADIENT_BYTES,
                optimizer=kept * MOMENT_BYTES,
                activations=layer * in_flight[stage] + logits,
            )
        )
    return tuple(found)


def _layer_activations(model: ModelConfig, layout: ParallelLayout, batch: BatchTable, *, on_cpu: bool) -> int:
    """Elements that a layer keeps for the backward of one microbatch: those of its rank's tokens.

    Whole on every tensor rank, or cut by tokens under sequence parallelism: inputs and outputs of the two norms, and
    the residual between. Cut over tp: query, key and value, query and key after the rotation, the output of attention,
    and of the MLP up, (gate,) activation and product. Under context parallelism also keys and values of the whole row,
    for each query head, or in a ring the output of attention once more in fp32.
    """
    heads = model.num_attention_heads * model.head_dim
    kv_heads = max(model.num_key_value_heads, layout.tp) * model.head_dim
    whole = 5 * model.hidden_size
    mlp = (4 if model.gated_mlp else 2) * model.intermediate_size
    attention = 2 * heads + 2 * kv_heads
    if model.position_embedding == "rope":
        attention += heads + kv_heads
    if layout.cp > 1:
        attention += 2 * heads * (layout.cp if layout.context == "all_gather" else 1)
    elif on_cpu and batch.seq_len in SCORED_TOKENS:
        # Four blocks of queries, each with its scores and its own copy of the keys and values that it sees:
        # 1/4 + 2/4 + 3/4 + 1 of them, which is 5/8 of all scores and 5/2 times the keys and values.
        attention += heads + 5 * kv_heads + model.num_attention_heads * batch.seq_len * 5 // 8
    cut = attention + mlp
    if layout.sequence_parallel:
        whole //= layout.tp
    return batch.micro_size * batch.seq_len // layout.cp * (whole + cut // layout.tp)


def _logits_bytes(model: ModelConfig, layout: ParallelLayout, batch: BatchTable, compute: int) -> int:
    """The logits of one microbatch, their softmax and their gradient; a sequence head has next to none."""
    if model.num_labels:
        return 0
    rows = -(-model.vocab_size // layout.tp)
    return batch.micro_size * batch.seq_len // layout.cp * rows * (compute + 2 * MASTER_BYTES)
