"""What a checkpoint format is to planner and copier: it opens as a source, and is filled as a destination.

A module in `converters/formats/` exposes one `FORMAT`. Everything in between (plan, copy, verify, cast) is shared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from workbench.spec.geometry import Box, LogicalTensor
from workbench.spec.layout import ParallelLayout
from workbench.spec.lora import AdapterRecord
from workbench.spec.model import ModelConfig

if TYPE_CHECKING:
    import numpy as np

    from workbench.checkpoint.manifest import TrainingState
    from workbench.checkpoint.source import TensorSource

Progress = Callable[[int], None]
"""Called with the number of bytes done since the last call; from any thread."""


def no_progress(_: int) -> None:
    """Ignores progress."""


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A checkpoint of any format, open for reading.

    fingerprints: of the logical tensors, as far as the checkpoint records them (may be empty).
    tokenizer: a folder that holds tokenizer files, or None.
    info: more lines for `wb inspect`, label -> text.
    adapter: set when the tensors are an adapter to the weights of another checkpoint; `model` is then the adapted one.
    unplaced: foreign tensors that have no place in the model; `open_checkpoint` refuses them unless allowed.
    dropped: tensors that were left out on the way to `source`, and why.
    edits: what was done to the tensors at `path` to make those of `source`, if anything.
    check: reads everything and raises CheckpointError when the checkpoint contradicts itself (its own checksums,
        sizes, index); None when the format carries nothing to check.
    optimizer_fault: why the state of an optimizer that is there cannot be read; the weights can be taken without it.
    others: paths of other checkpoints that `source` reads as well (the base of an adapter).
    """

    format: str
    path: Path
    source: TensorSource
    model: ModelConfig
    layout: ParallelLayout | None = None
    training: TrainingState | None = None
    tokenizer: Path | None = None
    family: str | None = None
    lineage: tuple[Mapping[str, Any], ...] = ()
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    info: Mapping[str, str] = field(default_factory=dict)
    check: Callable[[Progress], None] | None = None
    adapter: AdapterRecord | None = None
    optimizer_fault: str | None = None
    unplaced: tuple[str, ...] = ()
    dropped: Mapping[str, str] = field(default_factory=dict)
    edits: tuple[str, ...] = ()
    others: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True)
class MegatronRun:
    """How Megatron-LM will be started to load what is written for it.

    own_layers: with its own layers (`--transformer-impl local`) instead of Transformer Engine's. distributed_optimizer:
    with `--use-distributed-optimizer`, for which rank folders hold optimizer state in another form.
    """

    own_layers: bool = False
    distributed_optimizer: bool = False


@dataclass(frozen=True)
class WriteRequest:
    """What a destination is to hold.

    schema: the logical tensors, in the dtypes to be written. megatron: for Megatron's formats.
    read_back: whether each piece is to be read back as it is written, where the format can; else `check` reads.
    """

    path: Path
    schema: Mapping[str, LogicalTensor]
    model: ModelConfig
    layout: ParallelLayout = field(default_factory=ParallelLayout)
    training: TrainingState | None = None
    tokenizer: Path | None = None
    family: str | None = None
    lineage: tuple[Mapping[str, Any], ...] = ()
    max_shard_bytes: int = 5_000_000_000
    adapter: AdapterRecord | None = None
    read_back: bool = True
    megatron: MegatronRun = field(default_factory=MegatronRun)


class Destination(Protocol):
    """A checkpoint that is being written; nothing is at `path` until `commit` returns.

    Made by `Format.destination`, which raises (ConversionError, LayoutError) when the format cannot represent the
    request, and touches nothing. The copier calls `begin`, then `write` from several threads, then `check` if asked,
    then `commit`; or `abort` after any failure. So that another process can go on where this one is killed, it notes
    the `receipt` of each part of a tensor that has been written.
    """

    @property
    def path(self) -> Path: ...

    @property
    def schema(self) -> Mapping[str, LogicalTensor]:
        """The logical tensors that will be written, with the dtypes in which `write` takes them."""
        ...

    @property
    def files(self) -> Mapping[str, int]:
        """Size in bytes of each file that will be written, by its path inside the destination."""
        ...

    def boxes(self, name: str) -> tuple[tuple[str, Box], ...]:
        """The file and box of each piece in which the tensor will lie; together they cover it exactly once."""
        ...

    def sweep(self, name: str) -> int:
        """The dimension along which slabs of the tensor should arrive (that which varies slowest in the files)."""
        ...

    @property
    def in_order(self) -> bool:
        """Whether `write` wants each of `boxes(name)` from its start on; else their parts may come in any order."""
        ...

    def begin(self, *, resume: bool = False) -> None:
        """Makes the unfinished folder next to `path`, or with `resume` takes over the one that a dead process has left.

        ConfigError when `path` exists.
        """
        ...

    def write(self, name: str, box: Box, array: np.ndarray) -> None:
        """Stores a box that lies inside one of `boxes(name)`.

        The calls for a box of `boxes(name)` span its dimensions other than `sweep(name)`. With `in_order` they come in
        order along that one, from one thread at a time; otherwise different threads may have parts of it, each in
        order. Different boxes may be written from different threads. `array` is only lent.
        """
        ...

    def receipt(self, name: str, part: Box) -> Any:
        """JSON values by which `restore` recognises what `write` has stored in `part` of a tensor, now complete."""
        ...

    def restore(self, name: str, part: Box, receipt: Any) -> bool:
        """Takes what another process wrote in `part` as written, if reading it shows that it is still there."""
        ...

    def check(self, progress: Progress) -> None:
        """Makes sure, reading what has not been read back yet, that the files hold what `write` was given.

        VerificationError when they do not.
        """
        ...

    def reopen(self) -> TensorSource:
        """The unfinished destination as a source, for full verification before `commit`."""
        ...

    def commit(self, fingerprints: Mapping[str, str]) -> Path:
        """Makes the destination appear at `path`, complete and durable."""
        ...

    def abort(self, *, keep: bool = False) -> None:
        """Removes what this object has written, and nothing else, or with `keep` leaves what can be taken over.

        Safe at any time but after `commit`, also when `begin` refused.
        """
        ...


class Format(Protocol):
    """One checkpoint format."""

    @property
    def name(self) -> str: ...

    def recognises(self, path: Path) -> bool:
        """Whether `path` looks like this format; reads little, never raises for a foreign path."""
        ...

    def open(self, path: Path, *, family: str | None = None, vocab_size: int | None = None) -> OpenedCheckpoint:
        """Opens for reading. CheckpointError when damaged, ConversionError when it cannot be represented.

        vocab_size: of a checkpoint that keeps its vocabulary padded and may not tell the size without; a format that
        always tells ignores it.
        """
        ...

    def destination(self, request: WriteRequest) -> Destination:
        """Plans a checkpoint to be written. ConversionError when this format cannot hold it, or cannot write."""
        ...
