"""What is likely wrong where two checkpoints differ: what a tensor holds instead of what it should. NumPy only.

Fingerprints of one side matched with the other names of the other side tell swaps, layers off by one and lost experts,
at no reading; the elements of what is left tell flipped bits, zeros, and rows or columns in another order.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from converters.verify import Comparison, tensor_difference
from workbench.checkpoint.source import TensorSource
from workbench.spec.dtypes import ITEM_BYTES
from workbench.spec.geometry import Box

_MOST_READ: Final = 20
_LARGEST_BYTES: Final = 1 << 28  # a tensor beyond this is not held twice to look for an order
_UNIT = re.compile(r"((?:optim\.[^/]*/)?)layers\.(\d+)(?:\.mlp\.experts\.(\d+))?\.(.*)")


@dataclass(frozen=True)
class Diagnosis:
    """units: what whole layers or experts hold instead; tensors: what is likely wrong with each tensor."""

    units: tuple[str, ...]
    tensors: Mapping[str, str]

    def describe(self) -> dict[str, Any]:
        """The diagnosis as JSON values."""
        return {"units": list(self.units), "tensors": dict(self.tensors)}


def diagnose(
    first: TensorSource,
    second: TensorSource,
    comparison: Comparison,
    fingerprints: tuple[Mapping[str, str], Mapping[str, str]],
) -> Diagnosis:
    """What is likely wrong with `second`, if `first` is right; the elements of at most _MOST_READ tensors are read."""
    mine, theirs = fingerprints
    counts = Counter(mine.values())
    origins = {digest: name for name, digest in mine.items() if counts[digest] == 1}
    moved = {name: origins[theirs[name]] for name in comparison.different if theirs[name] in origins}
    tensors = {
        name: f"is swapped with {other}" if moved.get(other) == name else f"holds what {other} holds in the first"
        for name, other in moved.items()
    }
    unknown = [name for name in comparison.different if name not in moved]
    tensors |= {name: describe_change(first, second, name) for name in unknown[:_MOST_READ]}
    return Diagnosis((*_moved_units(moved, comparison), *_lost_units(comparison)), tensors)


def _moved_units(moved: Mapping[str, str], comparison: Comparison) -> Iterator[str]:
    """Layers and experts all of whose differing weights are another one's."""
    differing = Counter(unit for name in comparison.different for unit in _units(name))
    pairs = Counter(
        (here, there)
        for name, other in moved.items()
        if _leaf(name) == _leaf(other)
        for here, there in zip(_units(name), _units(other), strict=False)
        if here != there
    )
    for (here, there), count in pairs.items():
        if 1 < count == differing[here]:
            yield f"{here} holds what {there} holds in the first"


def _lost_units(comparison: Comparison) -> Iterator[str]:
    """Layers and experts of which one side has nothing."""
    held = {unit for name in (*comparison.same, *comparison.different, *comparison.shape) for unit in _units(name)}
    for side, names in (("second", comparison.only_first), ("first", comparison.only_second)):
        lost = dict.fromkeys(unit for name in names for unit in _units(name) if unit not in held)
        yield from (f"{unit} is missing in the {side}" for unit in lost)


def _units(name: str) -> list[str]:
    """The layer of a tensor, and its expert, in words."""
    match = _UNIT.fullmatch(name)
    if match is None:
        return []
    layer = f"{match[1]}layer {match[2]}"
    return [layer] if match[3] is None else [layer, f"expert {match[3]} of {layer}"]


def _leaf(name: str) -> str:
    match = _UNIT.fullmatch(name)
    return match[1] + match[4] if match else name


def describe_change(first: TensorSource, second: TensorSource, name: str) -> str:
    """In words, what became of the elements of a tensor of one shape and dtype."""
    tensor = first.schema[name]
    difference = tensor_difference(first, second, name)
    assert difference is not None, f"{name} has two fingerprints and one content"
    a, b = difference.values
    where = f"the first at {list(difference.first)}: {a:.9g} and {b:.9g}"
    if tensor.numel * ITEM_BYTES[tensor.dtype] <= _LARGEST_BYTES and tensor.shape:
        x, y = (_bits(source.read(name, Box.whole(tensor.shape))) for source in (first, second))
        if found := _pattern(x, y):
            return f"{found}; {where}"
    return (
        f"differs in {difference.elements} of {tensor.numel} elements; {where}; at most {difference.largest:.3g} apart"
    )


def _pattern(x: np.ndarray, y: np.ndarray) -> str:
    """What turned x into y, or nothing known."""
    unequal = np.argwhere(x != y)
    if len(unequal) == 1:
        flipped = int(x[tuple(unequal[0])]) ^ int(y[tuple(unequal[0])])
        return f"has one other {'bit' if flipped.bit_count() == 1 else 'element'}"
    if not y[tuple(unequal.T)].any():
        low, high = unequal.min(axis=0).tolist(), unequal.max(axis=0).tolist()
        return f"is zero from {low} to {high}" if x.size != len(unequal) else "is all zero"
    if x.ndim == 2 and x.shape == y.shape[::-1] and np.array_equal(x.T, y):
        return "is transposed"
    if order := _order(x, y):
        return f"has its rows in another order: {order}"
    if x.ndim == 2 and (order := _order(x.T, y.T)):
        return f"has its columns in another order: {order}"
    return ""


def _order(x: np.ndarray, y: np.ndarray) -> str:
    """Where the rows of y are in x, if they are the same ones and tell themselves apart."""
    places = {row.tobytes(): index for index, row in enumerate(x)}
    rows = [places.get(row.tobytes(), -1) for row in y]
    if len(places) != len(x) or sorted(rows) != list(range(len(x))):
        return ""
    breaks = [index for index in range(1, len(rows)) if rows[index] != rows[index - 1] + 1]
    size = math.gcd(*breaks, len(rows))
    shift = rows[0]
    if all(row == (index + shift) % len(rows) for index, row in enumerate(rows)):
        return f"rotated by {shift} of {len(rows)}"
    index = next(index for index, row in enumerate(rows) if row != index)
    start = index - index % size
    return (
        f"{start} to {start + size - 1} are {rows[start]} to {rows[start] + size - 1} of the first, in blocks of {size}"
    )


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")
