"""Whether two checkpoints hold the same: by fingerprint for all, bit by bit where they differ. NumPy only."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from converters.cast import as_float64
from converters.format import Progress, no_progress
from converters.threads import in_threads
from workbench.checkpoint.fingerprint import PartialFingerprint, box_fingerprint
from workbench.checkpoint.source import TensorSource
from workbench.spec.dtypes import ITEM_BYTES
from workbench.spec.geometry import Box, LogicalTensor
from workbench.spec.model import ModelConfig

_SLAB_BYTES: Final = 4 << 20


@dataclass(frozen=True, slots=True)
class Comparison:
    """How the tensors of two checkpoints compare, by name; `dtype` and `shape` hold both sides' as text."""

    same: tuple[str, ...]
    different: tuple[str, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    shape: Mapping[str, str]
    dtype: Mapping[str, str]

    @property
    def equal(self) -> bool:
        """Whether both hold the same tensors with the same bits."""
        return not (self.different or self.only_first or self.only_second or self.shape or self.dtype)


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """Where two tensors of one shape differ: how many elements, the first of them, and by how much at most."""

    name: str
    elements: int
    first: tuple[int, ...]
    values: tuple[float, float]
    largest: float


def compute_fingerprints(
    source: TensorSource, *, names: Collection[str] | None = None, progress: Progress = no_progress
) -> dict[str, str]:
    """The fingerprints of the tensors of a source (all, or those named), from their bytes."""
    wanted = [tensor for name, tensor in source.schema.items() if names is None or name in names]
    found: dict[str, str] = {}

    def work(tensor: LogicalTensor, stop: threading.Event) -> None:
        total = PartialFingerprint()
        for chunk in source.chunks(tensor.name):
            for box in slabs(chunk, ITEM_BYTES[tensor.dtype]):
                if stop.is_set():
                    return
                array = source.read(tensor.name, box)
                total += box_fingerprint(tensor, box, array)
                progress(array.nbytes)
        found[tensor.name] = total.finish(tensor)

    in_threads(sorted(wanted, key=lambda t: -t.numel), work, 2)
    return {tensor.name: found[tensor.name] for tensor in wanted}


def slabs(box: Box, item_bytes: int) -> Iterator[Box]:
    """A box cut along its first dimension into boxes of a few MiB."""
    if not box.size:
        yield box
        return
    row_bytes = max(1, box.numel // max(1, box.size[0]) * item_bytes)
    step = max(1, _SLAB_BYTES // row_bytes)
    for at in range(0, box.size[0], step):
        size = (min(step, box.size[0] - at), *box.size[1:])
        yield Box((box.offset[0] + at, *box.offset[1:]), size)


def compare_fingerprints(first: Mapping[str, str], second: Mapping[str, str]) -> list[str]:
    """What differs between two sets of fingerprints, a line a tensor."""
    faults = [f"{name} is missing" for name in first if name not in second]
    faults += [f"{name} is unexpected" for name in second if name not in first]
    both = [name for name in first if name in second]
    faults += [f"{n} has fingerprint {second[n]}, not {first[n]}" for n in both if first[n] != second[n]]
    return faults


def compare(
    first: Mapping[str, LogicalTensor],
    second: Mapping[str, LogicalTensor],
    fingerprints: tuple[Mapping[str, str], Mapping[str, str]],
) -> Comparison:
    """The comparison of two schemas with their fingerprints."""
    both = [name for name in first if name in second]
    shape = {
        n: f"{list(first[n].shape)} and {list(second[n].shape)}" for n in both if first[n].shape != second[n].shape
    }
    dtype = {
        n: f"{first[n].dtype} and {second[n].dtype}"
        for n in both
        if n not in shape and first[n].dtype != second[n].dtype
    }
    like = [name for name in both if name not in shape and name not in dtype]
    mine, theirs = fingerprints
    return Comparison(
        same=tuple(name for name in like if mine[name] == theirs[name]),
        different=tuple(name for name in like if mine[name] != theirs[name]),
        only_first=tuple(name for name in first if name not in second),
        only_second=tuple(name for name in second if name not in first),
        shape=shape,
        dtype=dtype,
    )


def tensor_difference(first: TensorSource, second: TensorSource, name: str) -> TensorDifference | None:
    """Element by element, how a tensor of one shape differs between two sources; None when bits (or values) agree.

    Equal dtypes are compared bit for bit; others by value.
    """
    one, other = first.schema[name], second.schema[name]
    elements, largest = 0, 0.0
    where: tuple[int, ...] = ()
    values = (0.0, 0.0)
    for box in slabs(Box.whole(one.shape), 8):
        a, b = first.read(name, box), second.read(name, box)
        x, y = as_float64(a, one.dtype), as_float64(b, other.dtype)
        unequal = _bits(a) != _bits(b) if one.dtype == other.dtype else x != y
        count = int(np.count_nonzero(unequal))
        if not count:
            continue
        if not elements:
            at = tuple(int(i) for i in np.argwhere(unequal)[0]) if unequal.ndim else ()
            where = tuple(o + i for o, i in zip(box.offset, at, strict=True))
            values = (float(x[at]), float(y[at]))
        elements += count
        with np.errstate(invalid="ignore", over="ignore"):
            largest = max(largest, float(np.nan_to_num(np.abs(x - y), nan=np.inf)[unequal].max()))
    return TensorDifference(name, elements, where, values, largest) if elements else None


def _bits(array: np.ndarray) -> np.ndarray:
    """The elements as unsigned integers, so that NaN equals itself and zero differs from minus zero."""
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}").reshape(array.shape)


_TRAINING_ONLY: Final = (
    *("embed_dropout", "attention_dropout", "hidden_dropout", "initializer_range", "scale_residual_init"),
    *("moe.router_aux_loss_coef", "moe.router_z_loss_coef", "moe.bias_update_rate"),
)


def model_differences(first: ModelConfig, second: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """Fields that two models do not share, those inside others as `moe.num_experts`, with both values."""
    ours, theirs = _flat(first.model_dump(mode="json")), _flat(second.model_dump(mode="json"))
    names = dict.fromkeys((*ours, *theirs))
    return {n: (ours.get(n), theirs.get(n)) for n in names if ours.get(n) != theirs.get(n)}


def changes_outputs(field_name: str) -> bool:
    """Whether a field says what a trained model computes, and not only how it is trained."""
    return field_name not in _TRAINING_ONLY


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def describe(comparison: Comparison) -> dict[str, Any]:
    """A comparison as JSON values."""
    return {
        "equal": comparison.equal,
        "same": len(comparison.same),
        "different": list(comparison.different),
        "only_first": list(comparison.only_first),
        "only_second": list(comparison.only_second),
        "shape": dict(comparison.shape),
        "dtype": dict(comparison.dtype),
    }
