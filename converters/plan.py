"""What a copy will do, decided and proven before the first byte moves. Pure: reads no tensor, writes nothing.

A plan knows, for every logical tensor, the pieces in which the source holds it and those in which the destination will,
and that both cover it exactly once; every source tensor is copied or listed as dropped. The copy goes along one
dimension of a tensor in slabs, so that each byte is read once and written once and memory stays within the budget.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Final

from converters.format import Destination
from workbench.checkpoint.source import TensorSource
from workbench.checkpoint.writer import BLOCK_BYTES
from workbench.errors import ConversionError, ResourceError
from workbench.spec.dtypes import ITEM_BYTES
from workbench.spec.geometry import Box, LogicalTensor, coverage_fault

DEFAULT_BUDGET_BYTES: Final = 2 << 30
_SLAB_BYTES: Final = BLOCK_BYTES  # what is written at once; larger ones leave the cache before
_SLAB_COPIES: Final = 4  # a slab as read, as cast, as joined or made contiguous for the destination, and as read back
_INTERPRETER_BYTES: Final = 96 << 20  # Python, NumPy and this program; measured by benchmarks/reshard.py
_PIECE_BYTES: Final = 1 << 10  # what is kept of each piece until the end: place, checksum, line of a manifest
_SPLIT_BYTES: Final = 16 << 20  # tensors are shared out among workers, where the pieces allow it, in parts of this size
# Of a worker with a core to itself, checksums and reading back included: benchmarks/convert.py measured 1.1 GB a second
# of CPU time with fingerprints and up to 1.6 without. More workers than these are taken to wait for the disk.
_BYTES_PER_SECOND: Final = 1e9
_FAST_WORKERS: Final = 4
_START_SECONDS: Final = 0.3


@dataclass(frozen=True, slots=True)
class Sweep:
    """A run of slabs for one worker: positions `start` to `stop` of dimension `dim`, `step` at a time.

    It is the unit of work: each piece of a side that wants order lies in one sweep.
    """

    name: str
    dim: int
    start: int
    stop: int
    step: int
    num_bytes: int

    def box(self, shape: Sequence[int]) -> Box:
        """This part of a tensor of `shape`."""
        return self._slab(shape, self.start, self.stop)

    def slabs(self, shape: Sequence[int]) -> Iterator[Box]:
        """The boxes, in order, that together are this part of a tensor of `shape`."""
        for at in range(self.start, self.stop, self.step):
            yield self._slab(shape, at, min(at + self.step, self.stop))

    def _slab(self, shape: Sequence[int], start: int, stop: int) -> Box:
        offset = tuple(start if d == self.dim else 0 for d in range(len(shape)))
        return Box(offset, tuple(stop - start if d == self.dim else n for d, n in enumerate(shape)))


@dataclass(frozen=True)
class Plan:
    """A proven copy: every element of every tensor of `tensors` exactly once.

    num_pieces: boxes that the files of the destination will hold. `files`: their sizes by name.
    """

    tensors: Mapping[str, LogicalTensor]
    sweeps: tuple[Sweep, ...]
    num_pieces: int
    drops: tuple[str, ...]
    files: Mapping[str, int]
    workers: int
    peak_bytes: int

    @property
    def num_bytes(self) -> int:
        """Bytes of tensor data that will be written."""
        return sum(sweep.num_bytes for sweep in self.sweeps)

    @property
    def seconds(self) -> float:
        """About how long the copy takes where a disk is no narrower than a worker."""
        return _START_SECONDS + self.num_bytes / (_BYTES_PER_SECOND * min(self.workers, _FAST_WORKERS))

    def describe(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return {
            "tensors": len(self.tensors),
            "bytes": self.num_bytes,
            "pieces": self.num_pieces,
            "units": len(self.sweeps),
            "dropped": list(self.drops),
            "files": dict(self.files),
            "workers": self.workers,
            "peak_memory_bytes": self.peak_bytes,
            "estimated_seconds": round(self.seconds, 1),
        }


def tensor_bytes(tensor: LogicalTensor) -> int:
    """Size of a tensor's elements."""
    return tensor.numel * ITEM_BYTES[tensor.dtype]


def make_plan(
    source: TensorSource,
    destination: Destination,
    *,
    drops: Collection[str] = (),
    workers: int = 2,
    budget_bytes: int = DEFAULT_BUDGET_BYTES,
    source_in_order: bool = True,
) -> Plan:
    """The plan of copying `source` into `destination`; ConversionError lists what would be lost, or stored twice.

    source_in_order: whether the source should be read piece by piece from the start of each, for it has checksums.

    What it decides for a tensor is decided once for all that lie alike: models of 10^6 pieces have few kinds of them.
    """
    tensors = destination.schema
    _check_names(source.schema, tensors, drops)
    pieces = {name: tuple(box for _, box in destination.boxes(name)) for name in tensors}
    num_pieces = sum(map(len, pieces.values()))
    fixed_bytes = _INTERPRETER_BYTES + num_pieces * _PIECE_BYTES
    slab_bytes = min(_SLAB_BYTES, _slab_budget(budget_bytes, fixed_bytes, workers))
    cuts: dict[tuple[object, ...], _Cut] = {}
    sweeps: list[Sweep] = []
    faults: list[str] = []
    for name, tensor in tensors.items():
        here, there, dim = source.chunks(name), pieces[name], destination.sweep(name)
        key = (tensor.shape, tensor.dtype, dim, here, there)
        cut = cuts.get(key)
        if cut is None:
            whole = (*(here if source_in_order else ()), *(there if destination.in_order else ()))
            cut = cuts[key] = _cut(tensor, dim, _faults(tensor, here, there), whole, slab_bytes)
        faults += [f"{name}: {fault}" for fault in cut.faults]
        sweeps += [Sweep(name, dim, start, stop, cut.step, (stop - start) * cut.row_bytes) for start, stop in cut.spans]
    if faults:
        raise ConversionError("the plan does not cover each element once: " + _some(faults))
    sweeps.sort(key=attrgetter("num_bytes"), reverse=True)
    largest = max((cut.slab_bytes for cut in cuts.values()), default=0)
    peak = fixed_bytes + workers * _SLAB_COPIES * largest
    return Plan(tensors, tuple(sweeps), num_pieces, tuple(drops), destination.files, workers, peak)


def _check_names(
    held: Mapping[str, LogicalTensor], wanted: Mapping[str, LogicalTensor], drops: Collection[str]
) -> None:
    faults = []
    if missing := [name for name in wanted if name not in held]:
        faults.append(f"{len(missing)} tensors are not in the source: {_some(missing)}")
    allowed = set(drops)
    if lost := [name for name in held if name not in wanted and name not in allowed]:
        faults.append(f"{len(lost)} tensors of the source have no place in the destination: {_some(lost)}")
    for name, tensor in wanted.items():
        if name in held and (held[name].shape, held[name].dtype) != (tensor.shape, tensor.dtype):
            faults.append(
                f"{name} is {held[name].dtype} {list(held[name].shape)} in the source, "
                f"{tensor.dtype} {list(tensor.shape)} in the destination"
            )
    if faults:
        raise ConversionError("; ".join(faults[:8]))


def _some(texts: Sequence[str], most: int = 4) -> str:
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


def _slab_budget(budget_bytes: int, fixed_bytes: int, workers: int) -> int:
    slab = (budget_bytes - fixed_bytes) // (workers * _SLAB_COPIES)
    if slab < 64 << 10:
        least = fixed_bytes + workers * _SLAB_COPIES * (64 << 10)
        raise ResourceError(
            f"a memory budget of {budget_bytes} bytes is too small for {workers} workers; give at least {least}"
        )
    return slab


@dataclass(frozen=True, slots=True)
class _Cut:
    """How a tensor is shared out: spans along the dimension of its sweep, each for one worker, `step` rows a slab."""

    spans: tuple[tuple[int, int], ...]
    step: int
    row_bytes: int
    faults: tuple[str, ...]

    @property
    def slab_bytes(self) -> int:
        return min(self.step, max(stop - start for start, stop in self.spans)) * self.row_bytes


def _faults(tensor: LogicalTensor, here: Sequence[Box], there: Sequence[Box]) -> tuple[str, ...]:
    sides = (("source", here), ("destination", there))
    found = [(side, coverage_fault(tensor.shape, boxes)) for side, boxes in sides]
    return tuple(f"in the {side}, {fault}" for side, fault in found if fault)


def _cut(tensor: LogicalTensor, dim: int, faults: tuple[str, ...], whole: Sequence[Box], slab_bytes: int) -> _Cut:
    """Cuts a tensor where none of the boxes `whole` straddles the cut: then each of them has one worker."""
    if not tensor.shape or faults:
        return _Cut(((0, 1),), 1, tensor_bytes(tensor), faults)
    length = tensor.shape[dim]
    row_bytes = tensor_bytes(tensor) // max(1, length)
    rows = max(1, _SPLIT_BYTES // max(1, row_bytes))
    parts = {(box.offset[dim], box.end[dim]) for box in whole} or {(at, at + rows) for at in range(0, length, rows)}
    cuts, reach = [0], 0
    for start, end in sorted(parts):
        if start >= reach and (start - cuts[-1]) * row_bytes >= _SPLIT_BYTES:
            cuts.append(start)
        reach = max(reach, end)
    spans = tuple(itertools.pairwise([*cuts, length]))
    return _Cut(spans, max(1, slab_bytes // max(1, row_bytes)), row_bytes, ())
