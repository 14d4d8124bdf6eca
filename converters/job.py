"""One conversion: an open checkpoint, what becomes of its tensors, a destination, and the proven plan between them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from converters.cast import CastSource
from converters.copy import Verify, copy_checkpoint, require_space
from converters.format import Destination, Format, OpenedCheckpoint, Progress, WriteRequest, no_progress
from converters.formats.native import NativeDestination
from converters.plan import DEFAULT_BUDGET_BYTES, Plan, make_plan
from workbench.checkpoint.reader import NativeSource
from workbench.checkpoint.source import TensorSource
from workbench.errors import ConfigError, ConversionError
from workbench.spec.geometry import LogicalTensor
from workbench.spec.layout import ParallelLayout
from workbench.spec.lora import adapter_tensors
from workbench.spec.schema import OPTIMIZER_PREFIX, logical_tensors

Optimizer = Literal["keep", "drop", "require"]


@dataclass(frozen=True)
class JobOptions:
    """What the user may choose. dtype: for weights, None to keep them; max_shard_bytes: for formats with shards.

    read_back: read each piece back as it is written; needed for every kind of verification. lazy: nothing will be
    copied, only `Job.link` called."""

    layout: ParallelLayout
    dtype: str | None = None
    optimizer: Optimizer = "keep"
    workers: int = 2
    budget_bytes: int = DEFAULT_BUDGET_BYTES
    max_shard_bytes: int = 5_000_000_000
    read_back: bool = True
    lazy: bool = False


@dataclass(frozen=True)
class Job:
    """A conversion that has been planned and can be run once."""

    opened: OpenedCheckpoint
    source: TensorSource
    destination: Destination
    plan: Plan

    def run(self, *, verify: Verify = "crc", resume: bool = False, progress: Progress = no_progress) -> dict[str, str]:
        """Writes and commits the destination; the fingerprints of what it holds."""
        return copy_checkpoint(
            self.opened, self.source, self.destination, self.plan, verify=verify, resume=resume, progress=progress
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
    source = CastSource(opened.source, options.dtype) if options.dtype else opened.source
    schema, drops = _choose(source, opened, options.optimizer)
    _check_complete(opened, schema)
    request = WriteRequest(
        path=path,
        schema=schema,
        model=opened.model,
        layout=options.layout,
        training=opened.training,
        tokenizer=opened.tokenizer,
        family=opened.family,
        lineage=(*opened.lineage, _parent(opened, operation)),
        max_shard_bytes=options.max_shard_bytes,
        read_back=options.read_back,
        adapter=opened.adapter,
    )
    destination = target.destination(request)
    plan = make_plan(source, destination, drops=drops, workers=options.workers, budget_bytes=options.budget_bytes)
    if not options.lazy:
        require_space(path, sum(plan.files.values()))
    return Job(opened, source, destination, plan)


def _choose(
    source: TensorSource, opened: OpenedCheckpoint, optimizer: Optimizer
) -> tuple[dict[str, LogicalTensor], tuple[str, ...]]:
    """The tensors to carry and those to drop."""
    moments = tuple(name for name in source.schema if name.startswith(OPTIMIZER_PREFIX))
    if optimizer == "require" and not moments:
        raise ConversionError(f"{opened.path}: holds no optimizer state; use --optimizer keep to go on without")
    if optimizer != "drop":
        return dict(source.schema), ()
    return {name: t for name, t in source.schema.items() if not name.startswith(OPTIMIZER_PREFIX)}, moments


def _check_complete(opened: OpenedCheckpoint, schema: dict[str, LogicalTensor]) -> None:
    """ConversionError when weights of the model are missing or have another shape than the model says."""
    adapter = opened.adapter
    expected = logical_tensors(opened.model, "F32")
    if adapter is not None:
        expected = adapter_tensors(opened.model, adapter.lora, "F32")
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


def _parent(opened: OpenedCheckpoint, operation: str) -> dict[str, Any]:
    """What the manifest of the result says of its parent."""
    return {
        "operation": operation,
        "path": str(opened.path.absolute()),
        "format": opened.format,
        "family": opened.family,
        "layout": opened.layout.model_dump(mode="json") if opened.layout else None,
        "step": opened.training.step if opened.training else None,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
