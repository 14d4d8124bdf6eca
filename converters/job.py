"""One conversion: an open checkpoint, what becomes of its tensors, a destination, and the proven plan between them."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from converters.cast import cast_to
from converters.copy import Verify, copy_checkpoint, require_space
from converters.drops import allowed_drops, reasons, require_used
from converters.format import (
    Destination,
    Format,
    MegatronRun,
    OpenedCheckpoint,
    Progress,
    WriteRequest,
    no_progress,
)
from converters.formats.native import NativeDestination
from converters.plan import DEFAULT_BUDGET_BYTES, Plan, make_plan
from workbench.checkpoint.reader import NativeSource
from workbench.checkpoint.source import TensorSource
from workbench.errors import ConfigError, ConversionError
from workbench.spec.geometry import LogicalTensor
from workbench.spec.layout import ParallelLayout
from workbench.spec.lora import adapter_tensors
from workbench.spec.schema import OPTIMIZER_PREFIX, logical_tensors, weight_of

Optimizer = Literal["keep", "drop", "require"]


@dataclass(frozen=True)
class JobOptions:
    """What the user may choose. dtype: for weights, None to keep them; max_shard_bytes: for formats with shards;
    megatron: for Megatron's.

    read_back: read each piece back as it is written; needed for every kind of verification. lazy: nothing will be
    copied, only `Job.link` called. allow_drop: patterns of tensors, unknown to the model, that may be left out."""

    layout: ParallelLayout
    dtype: str | None = None
    optimizer: Optimizer = "keep"
    workers: int = 2
    budget_bytes: int = DEFAULT_BUDGET_BYTES
    max_shard_bytes: int = 5_000_000_000
    read_back: bool = True
    lazy: bool = False
    allow_drop: tuple[str, ...] = ()
    megatron: MegatronRun = field(default_factory=MegatronRun)


@dataclass(frozen=True)
class Job:
    """A conversion that has been planned and can be run once. format: of the destination. dropped: what is left out,
    and why."""

    opened: OpenedCheckpoint
    source: TensorSource
    destination: Destination
    plan: Plan
    format: str
    dropped: Mapping[str, str]

    def describe(self) -> dict[str, Any]:
        """The plan as JSON values, with the reasons of what is left out."""
        return {**self.plan.describe(), "dropped": list(self.dropped), "dropped_why": reasons(self.dropped)}

    def run(self, *, verify: Verify = "crc", resume: bool = False, progress: Progress = no_progress) -> dict[str, str]:
        """Writes and commits the destination; the fingerprints of what it holds."""
        return copy_checkpoint(
            self.opened,
            self.source,
            self.destination,
            self.plan,
            format=self.format,
            verify=verify,
            resume=resume,
            progress=progress,
        )

    def link(self) -> None:
        """Makes the destination of hard links to the files of the source, without reading or writing a tensor.

        ConversionError when that is no native checkpoint at either end, or its tensors must be cut or cast.
        """
        if not (isinstance(self.source, NativeSource) and isinstance(self.destination, NativeDestination)):
            raise ConversionError(f"--lazy: the files of {self.opened.path} would have to change; leave it out to copy")
        self.destination.link(self.source)


def make_job(opened: OpenedCheckpoint, target: Format, path: Path, options: JobOptions, *, operation: str) -> Job:
    """The planned conversion of `opened` to `path`. Reads no tensor and writes nothing.

    Raises ConfigError when `path` exists, LayoutError or ConversionError when the target cannot hold the source, and
    ResourceError when space or memory would not be enough.
    """
    if path.exists():
        raise ConfigError(f"{path} exists already; remove it or name another destination")
    source = cast_to(opened.source, options.dtype)
    known = _expected(opened)
    cut = _choose(source, opened, options, known)
    dropped = {**opened.dropped, **cut}
    require_used(options.allow_drop, dropped)
    schema = {name: tensor for name, tensor in source.schema.items() if name not in cut}
    _check_complete(opened, schema, known)
    request = WriteRequest(
        path=path,
        schema=schema,
        model=opened.model,
        layout=options.layout,
        training=opened.training,
        tokenizer=opened.tokenizer,
        family=opened.family,
        lineage=(*opened.lineage, _parent(opened, operation, dropped)),
        max_shard_bytes=options.max_shard_bytes,
        read_back=options.read_back,
        megatron=options.megatron,
        adapter=opened.adapter,
    )
    destination = target.destination(request)
    plan = make_plan(
        source,
        destination,
        drops=cut,
        workers=options.workers,
        budget_bytes=options.budget_bytes,
        source_in_order=opened.check is not None,
    )
    if not options.lazy:
        require_space(path, sum(plan.files.values()))
    return Job(opened, source, destination, plan, target.name, dropped)


def _choose(
    source: TensorSource, opened: OpenedCheckpoint, options: JobOptions, known: Collection[str]
) -> dict[str, str]:
    """The tensors of `source` to drop, and why: moments as asked, and of unknown ones those that are allowed."""
    moments = [name for name in source.schema if name.startswith(OPTIMIZER_PREFIX)]
    if options.optimizer == "require" and not moments and opened.optimizer_fault is None:
        raise ConversionError(f"{opened.path}: holds no optimizer state; use --optimizer keep to go on without")
    if opened.optimizer_fault is not None and options.optimizer != "drop":
        raise ConversionError(f"{opened.optimizer_fault}; use --optimizer drop to go on without the optimizer's state")
    unknown = [name for name in source.schema if weight_of(name) not in known] if options.allow_drop else []
    allowed = allowed_drops(unknown, options.allow_drop)
    return allowed | (dict.fromkeys(moments, "optimizer state, not asked for") if options.optimizer == "drop" else {})


def _expected(opened: OpenedCheckpoint) -> dict[str, LogicalTensor]:
    """What the model, or the adapter, consists of."""
    if opened.adapter is not None:
        return adapter_tensors(opened.model, opened.adapter.lora, "F32")
    return logical_tensors(opened.model, "F32")


def _check_complete(
    opened: OpenedCheckpoint, schema: Mapping[str, LogicalTensor], expected: Mapping[str, LogicalTensor]
) -> None:
    """ConversionError when weights of the model are missing or have another shape than the model says."""
    held = [name for name in expected if name in schema]
    faults = [f"{name} is missing" for name in expected if name not in schema]
    faults += [
        f"{name} has shape {list(schema[name].shape)}, but the model configuration says {list(expected[name].shape)}"
        for name in held
        if schema[name].shape != expected[name].shape
    ]
    if faults:
        more = f" and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise ConversionError(f"{opened.path}: {'; '.join(faults[:4])}{more}")


def _parent(opened: OpenedCheckpoint, operation: str, dropped: Mapping[str, str]) -> dict[str, Any]:
    """What the manifest of the result says of its parent."""
    return {
        "operation": operation,
        "path": str(opened.path.absolute()),
        "format": opened.format,
        "family": opened.family,
        "layout": opened.layout.model_dump(mode="json") if opened.layout else None,
        "step": opened.training.step if opened.training else None,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **({"edits": list(opened.edits)} if opened.edits else {}),
        **({"dropped": reasons(dropped)} if dropped else {}),
    }
