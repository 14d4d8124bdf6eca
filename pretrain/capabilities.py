"""Which settings go together: a rule for each combination that does not run, with its reason and the way out.

The check of a configuration, before any process starts, and docs/capabilities.md read this one table. No torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from workbench.spec.execution import execution_faults
from workbench.spec.layout import ParallelLayout
from workbench.spec.model import ModelConfig

if TYPE_CHECKING:
    from pretrain.config import EngineConfig


@dataclass(frozen=True, slots=True)
class Rule:
    """`about` names the settings that it judges; `faults` says why they do not run, or nothing."""

    about: str
    faults: Callable[[EngineConfig, ModelConfig, ParallelLayout], list[str]]


def faults(config: EngineConfig, model: ModelConfig, layout: ParallelLayout) -> list[str]:
    """Every reason why the run cannot be computed as configured."""
    return [fault for rule in RULES for fault in rule.faults(config, model, layout)]


def device_faults(config: EngineConfig, device: str) -> list[str]:
    """Why the run cannot be computed on a device ("cpu", "cuda"), if it cannot."""
    if config.recompute.offload and device == "cpu":
        return [
            "recompute.offload=true moves activations from a GPU's memory to the host's, but this run is on a CPU, "
            "where they are already; set offload = false"
        ]
    return []


def te_faults(config: EngineConfig, model: ModelConfig, layout: ParallelLayout) -> list[str]:
    """Why Transformer Engine could not execute the run, if it could not."""
    found = execution_faults(config.stage_options("te"), model, layout)
    if config.keeps_documents_apart:
        found.append(
            "kernels.backend='te' and rows of several documents (data.mask_documents, batch.packing): its attention "
            "sees all earlier tokens of a row, those of other documents too; use backend = 'torch' or whole rows"
        )
    return found


def _shape(config: EngineConfig, model: ModelConfig, layout: ParallelLayout) -> list[str]:
    # Chunks that the schedule does not take are not worth being judged by how many layers they get.
    return config.parallel.schedule_faults() or layout.faults(model)


def _batch(config: EngineConfig, model: ModelConfig, layout: ParallelLayout) -> list[str]:
    return config.batch.faults(layout.dp)


def _whole_steps(config: EngineConfig, model: ModelConfig, layout: ParallelLayout) -> list[str]:
    batch = config.batch
    if not config.keeps_steps_whole or batch.faults(layout.dp) or batch.num_microbatches(layout.dp) == 1:
        return []
    return [
        f"batch.global_size={batch.global_size} is {batch.num_microbatches(layout.dp)} microbatches of "
        f"micro_size={batch.micro_size} on each of dp={layout.dp}, but this task compares each row with all others of "
        f"its step; set batch.micro_size = {batch.global_size // layout.dp}"
    ]


def _tokens(config: EngineConfig, model: ModelConfig, layout: ParallelLayout) -> list[str]:
    length, multiple = config.batch.seq_len, layout.token_multiple
    if length % multiple == 0:
        return []
    sharers = [f"2 chunks for each of cp={layout.cp}"] if layout.cp > 1 else []
    sharers += [f"tp={layout.tp} with sequence_parallel"] if layout.sequence_parallel else []
    return [
        f"batch.seq_len={length} is not a multiple of {multiple} ({' x '.join(sharers)}); "
        f"use {max(1, round(length / multiple)) * multiple}"
    ]


def _execution(config: EngineConfig, model: ModelConfig, layout: ParallelLayout) -> list[str]:
    if config.asked_backend == "te":
        return te_faults(config, model, layout)
    return execution_faults(config.stage_options("torch"), model, layout)


def _linear_format(config: EngineConfig, model: ModelConfig, layout: ParallelLayout) -> list[str]:
    precision = config.precision
    if precision.linear == "compute" or precision.compute == "bf16":
        return []
    return [
        f"precision.linear={precision.linear!r} gives its results in bf16, but precision.compute="
        f"{precision.compute!r}; set compute = 'bf16'"
    ]


def _loss_scale(config: EngineConfig, model: ModelConfig, layout: ParallelLayout) -> list[str]:
    precision = config.precision
    if precision.loss_scale == "dynamic" or precision.compute == "fp16":
        return []
    return [
        f"precision.loss_scale={precision.loss_scale:g} is for compute='fp16', not '{precision.compute}'; remove the "
        "one or change the other"
    ]


def _gradient_format(config: EngineConfig, model: ModelConfig, layout: ParallelLayout) -> list[str]:
    microbatches = config.batch.num_microbatches(layout.dp)
    if config.precision.grad_reduce == "fp32" or microbatches == 1 or layout.replicas == 1:
        return []
    if layout.shard in ("zero2", "zero3") and layout.shard_degree == layout.replicas:
        return []
    how = f"shard='{layout.shard}'" + ("" if layout.shard_size is None else f", shard_size={layout.shard_size}")
    return [
        f"precision.grad_reduce='bf16' with {how} would sum {microbatches} microbatches in bf16 as well; use "
        "shard = 'zero2' or 'zero3' over all replicas, or one microbatch a step"
    ]


RULES = (
    Rule("the schedule and its chunks; heads, widths, layers and replicas and what divides them", _shape),
    Rule("the batch and the replicas that share it", _batch),
    Rule("tasks that compare the rows of a step, and microbatches", _whole_steps),
    Rule("the length of sequences and the ranks that share their tokens", _tokens),
    Rule("backend, torch.compile, fp8, recompute and the schedule", _execution),
    Rule("formats of linear layers and of everything else", _linear_format),
    Rule("the scale of the loss and the format it is for", _loss_scale),
    Rule("the format in which gradients are summed, sharding and microbatches", _gradient_format),
)
