"""Full verification: each tensor of both sides assembled by other code than wrote it, and compared bit by bit.

Each format has its second reader in `converters/independent/`. Some rows of one tensor of each side are in memory at a
time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, Protocol

import numpy as np

from converters.cast import as_float64
from converters.format import Destination, OpenedCheckpoint, Progress
from converters.verify import slabs
from workbench.checkpoint.fingerprint import PartialFingerprint, box_fingerprint
from workbench.checkpoint.source import TensorSource
from workbench.checkpoint.writer import partial_folder
from workbench.errors import CheckpointError, VerificationError
from workbench.registry import load
from workbench.spec.dtypes import ITEM_BYTES
from workbench.spec.geometry import Box, LogicalTensor

_PACKAGE: Final = "converters.independent"
Read = Callable[[LogicalTensor, Box], np.ndarray]
"""Rows of a logical tensor, in storage dtype: a box that spans all but the first dimension."""


class Reader(Protocol):
    """The READER of a module of `converters/independent/`: made of a folder and of the source that its format opens."""

    def __init__(self, folder: Path, source: TensorSource) -> None: ...

    def read(self, tensor: LogicalTensor, rows: slice) -> np.ndarray:
        """These rows of a logical tensor, in storage dtype (all of a scalar)."""
        ...


def _reader(format: str, folder: Path, source: TensorSource) -> Read:
    """Reads tensors of a folder, which its format opens as `source`."""
    files: Reader = load(_PACKAGE, format, "READER")(folder, source)
    return lambda tensor, box: files.read(tensor, box.slices[0] if box.size else slice(0, 1))


def check_whole(
    opened: OpenedCheckpoint, destination: Destination, format: str, fingerprints: Mapping[str, str], progress: Progress
) -> None:
    """Compares every tensor of the unfinished `destination`, of `format`, with the source's.

    VerificationError names the first tensor that differs, its first differing element and both values. Tensors of an
    edited checkpoint are nowhere in a file: those are compared by the fingerprints that were taken while writing.
    """
    try:
        written = destination.reopen()
    except CheckpointError as error:
        raise VerificationError(f"what was written cannot be read back: {error}") from error
    ours = None if opened.edits else _reader(opened.format, opened.path, opened.source)
    theirs = _reader(format, partial_folder(destination.path), written)
    for name, tensor in destination.schema.items():
        total = PartialFingerprint()
        for box in slabs(Box.whole(tensor.shape), ITEM_BYTES[tensor.dtype]):
            found = theirs(tensor, box)
            if ours is not None:
                before = opened.source.schema[name]
                _require_equal(before, ours(before, box), tensor, found, box)
            total += box_fingerprint(tensor, box, found)
            progress(found.nbytes)
        if (digest := total.finish(tensor)) != fingerprints[name]:
            raise VerificationError(
                f"what was written differs from the source: {name} has fingerprint {digest}, not {fingerprints[name]}"
            )


def _require_equal(before: LogicalTensor, x: np.ndarray, after: LogicalTensor, y: np.ndarray, box: Box) -> None:
    """VerificationError unless `y` is `x`, rounded to the nearest element of the dtype if it was cast."""
    x, y = np.ascontiguousarray(x).reshape(-1), np.ascontiguousarray(y).reshape(-1)
    wanted, got = as_float64(x, before.dtype), as_float64(y, after.dtype)
    if before.dtype == after.dtype:
        unequal = x.view(f"u{x.itemsize}") != y.view(f"u{y.itemsize}")
    else:
        wanted = nearest(wanted, after.dtype)
        unequal = ~(((wanted == got) & (np.signbit(wanted) == np.signbit(got))) | (np.isnan(wanted) & np.isnan(got)))
    if not unequal.any():
        return
    at = int(unequal.argmax())
    index = [int(i) + first for i, first in zip(np.unravel_index(at, box.size), box.offset, strict=True)]
    raise VerificationError(
        f"what was written differs from the source: {after.name}, first at {index}: {got[at]:.9g} was written, the "
        f"source has {wanted[at]:.9g} (bits {_hex(y[at])}, from {_hex(x[at])})"
    )


def nearest(values: np.ndarray, dtype: str) -> np.ndarray:
    """Each value's nearest one of a floating dtype, ties to even, as float64: by the spacing of numbers of its size."""
    digits, least = {"F32": (24, -125), "BF16": (8, -125), "F16": (11, -13)}[dtype]
    _, exponent = np.frexp(values)
    spacing = np.exp2(np.maximum(exponent, least).astype(np.float64) - digits)
    nearest_values: np.ndarray = np.where(np.isfinite(values), np.rint(values / spacing) * spacing, values)
    return nearest_values


def _hex(element: np.generic) -> str:
    return "0x" + element.tobytes()[::-1].hex()
