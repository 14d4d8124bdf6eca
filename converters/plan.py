"""What a copy will do, decided and proven before the first byte moves. Pure: reads no tensor, writes nothing.

A plan knows, for every logical tensor, the pieces in which the source holds it and those in which the destination will,
and that both cover it exactly once; every source tensor is copied or listed as dropped. The copy goes along one
dimension of a tensor in slabs, so that each byte is read once and written once and memory stays within the budget.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from converters.format import Destination
from workbench.checkpoint.source import TensorSource
from workbench.errors import ConversionError, ResourceError
from workbench.spec.dtypes import ITEM_BYTES
from workbench.spec.geometry import Box, LogicalTensor, coverage_fault

DEFAULT_BUDGET_BYTES: Final = 512 << 20
_SLAB_BYTES: Final = 2 << 20  # larger ones leave the cache between being read, hashed and written
_SLAB_COPIES: Final = 4  # a slab as read, as cut or joined for the destination, as cast, and made contiguous
_INTERPRETER_BYTES: Final = 96 << 20  # Python, NumPy and this program; measured by benchmarks/reshard.py
_SPLIT_BYTES: Final = 16 << 20  # tensors above this are shared out among workers where the pieces allow it


@dataclass(frozen=True, slots=True)
class Unit:
    """One piece of the destination: this box of this tensor goes into this file."""

    name: str
    box: Box
    file: str


@dataclass(frozen=True, slots=True)
class Sweep:
    """A run of slabs for one worker: positions `start` to `stop` of dimension `dim`, `step` at a time."""

    name: str
    dim: int
    start: int
    stop: int
    step: int

    def slabs(self, shape: Sequence[int]) -> Iterator[Box]:
        """The boxes, in order, that together are this part of a tensor of `shape`."""
        if not shape:
            yield Box((), ())
            return
        for at in range(self.start, self.stop, self.step):
            offset = tuple(at if d == self.dim else 0 for d in range(len(shape)))
            size = tuple(min(self.step, self.stop - at) if d == self.dim else n for d, n in enumerate(shape))
            yield Box(offset, size)


@dataclass(frozen=True)
class Plan:
    """A proven copy: every element of every tensor of `tensors` exactly once."""

    tensors: Mapping[str, LogicalTensor]
    units: tuple[Unit, ...]
    sweeps: tuple[Sweep, ...]
    drops: tuple[str, ...]
    files: Mapping[str, int]
    workers: int
    peak_bytes: int

    @property
    def num_bytes(self) -> int:
        """Bytes of tensor data that will be written."""
        return sum(tensor_bytes(tensor) for tensor in self.tensors.values())

    def describe(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return {
            "tensors": len(self.tensors),
            "bytes": self.num_bytes,
            "pieces": len(self.units),
            "dropped": list(self.drops),
            "files": dict(self.files),
            "workers": self.workers,
            "peak_memory_bytes": self.peak_bytes,
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
) -> Plan:
    """The plan of copying `source` into `destination`; ConversionError lists what would be lost, or stored twice."""
    tensors = destination.schema
    _check_names(source.schema, tensors, drops)
    units: list[Unit] = []
    sweeps: list[Sweep] = []
    faults: list[str] = []
    slab_bytes = min(_SLAB_BYTES, _slab_budget(budget_bytes, workers))
    largest = 0
    for name, tensor in tensors.items():
        pieces = destination.boxes(name)
        here, there = source.chunks(name), [box for _, box in pieces]
        for side, boxes in (("source", here), ("destination", there)):
            if fault := coverage_fault(tensor.shape, boxes):
                faults.append(f"{name}: in the {side}, {fault}")
        units += [Unit(name, box, file) for file, box in pieces]
        found = _sweeps(tensor, destination.sweep(name), (*here, *there), slab_bytes)
        sweeps += found
        largest = max(largest, _slab_size(tensor, found[0]))
    if faults:
        raise ConversionError("the plan does not cover each element once: " + _some(faults))
    sweeps.sort(key=lambda s: -(s.stop - s.start) * _row_bytes(tensors[s.name], s.dim))
    peak = _INTERPRETER_BYTES + workers * _SLAB_COPIES * largest
    return Plan(tensors, tuple(units), tuple(sweeps), tuple(drops), destination.files, workers, peak)


def _check_names(
    held: Mapping[str, LogicalTensor], wanted: Mapping[str, LogicalTensor], drops: Collection[str]
) -> None:
    faults = []
    if missing := [name for name in wanted if name not in held]:
        faults.append(f"{len(missing)} tensors are not in the source: {_some(missing)}")
    if lost := [name for name in held if name not in wanted and name not in drops]:
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


def _slab_budget(budget_bytes: int, workers: int) -> int:
    slab = (budget_bytes - _INTERPRETER_BYTES) // (workers * _SLAB_COPIES)
    if slab < 64 << 10:
        least = _INTERPRETER_BYTES + workers * _SLAB_COPIES * (64 << 10)
        raise ResourceError(
            f"a memory budget of {budget_bytes} bytes is too small for {workers} workers; give at least {least}"
        )
    return slab


def _row_bytes(tensor: LogicalTensor, dim: int) -> int:
    others = math.prod(n for d, n in enumerate(tensor.shape) if d != dim)
    return others * ITEM_BYTES[tensor.dtype]


def _slab_size(tensor: LogicalTensor, sweep: Sweep) -> int:
    return min(sweep.step, sweep.stop - sweep.start) * _row_bytes(tensor, sweep.dim)


def _sweeps(tensor: LogicalTensor, dim: int, boxes: Collection[Box], slab_bytes: int) -> list[Sweep]:
    """A sweep over a tensor, split where no piece on either side straddles the cut: then each piece has one worker."""
    if not tensor.shape:
        return [Sweep(tensor.name, 0, 0, 1, 1)]
    row_bytes = max(1, _row_bytes(tensor, dim))
    length = tensor.shape[dim]
    step = max(1, slab_bytes // row_bytes)
    cuts = [0, length]
    if length * row_bytes > _SPLIT_BYTES:
        spans = {(box.offset[dim], box.end[dim]) for box in boxes}
        starts = {start for start, _ in spans}
        cuts = sorted({0, length, *(c for c in starts if not any(a < c < b for a, b in spans))})
    return [Sweep(tensor.name, dim, a, b, step) for a, b in itertools.pairwise(cuts)]
