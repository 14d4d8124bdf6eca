"""A source whose weights are cast to another dtype as they are read. NumPy only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from workbench.checkpoint.source import TensorSource
from workbench.errors import ConversionError
from workbench.spec.dtypes import NUMPY_NAMES
from workbench.spec.geometry import Box, LogicalTensor
from workbench.spec.schema import OPTIMIZER_PREFIX

FLOATS: Final = ("F32", "BF16", "F16")


def cast_to(source: TensorSource, dtype: str | None) -> TensorSource:
    """The source with its weights in `dtype`; the source itself without one."""
    return source if dtype is None else CastSource(source, dtype)


class CastSource:
    """The weights of a source in another floating dtype, rounded to nearest, ties to even; moments stay as they are."""

    def __init__(self, source: TensorSource, dtype: str) -> None:
        if dtype not in FLOATS:
            raise ConversionError(f"dtype {dtype!r} is not one to cast to; use one of {', '.join(FLOATS)}")
        self._source, self._dtype = source, dtype
        self._schema = {name: self._cast(tensor) for name, tensor in source.schema.items()}

    def _cast(self, tensor: LogicalTensor) -> LogicalTensor:
        if tensor.name.startswith(OPTIMIZER_PREFIX) or tensor.dtype not in FLOATS:
            return tensor
        return LogicalTensor(tensor.name, tensor.shape, self._dtype)

    @property
    def schema(self) -> Mapping[str, LogicalTensor]:
        """The tensors in their new dtypes."""
        return self._schema

    def chunks(self, name: str) -> tuple[Box, ...]:
        """As the source holds it."""
        return self._source.chunks(name)

    def read(self, name: str, box: Box) -> np.ndarray:
        """The box, cast; ConversionError when a finite value has no finite value in the new dtype."""
        array = self._source.read(name, box)
        before, after = self._source.schema[name].dtype, self._schema[name].dtype
        if before == after:
            return array
        cast = cast_array(array, before, after)
        if after != "F32" and _infinite(cast, after) > _infinite(array, before):
            raise ConversionError(f"{name}: has values that are too large for {after}; keep {before}")
        return cast


def cast_array(array: np.ndarray, before: str, after: str) -> np.ndarray:
    """Elements of one floating dtype in another, rounded to nearest, ties to even; BF16 as uint16 bits."""
    if before == after:
        return array
    wide = as_float32(array, before)
    if after == "F32":
        return wide
    if after == "F16":
        with np.errstate(over="ignore"):
            return wide.astype(np.float16)
    return _round_to_bf16(wide)


def as_float32(array: np.ndarray, dtype: str) -> np.ndarray:
    """Elements of any floating dtype as fp32; BF16 is given as uint16 bits."""
    if dtype == "BF16":
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return array.astype(np.float32, copy=False)


def _round_to_bf16(array: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(array).view(np.uint32).reshape(array.shape)
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded = ((bits + half) >> np.uint32(16)).astype(np.uint16)
    is_nan = np.isnan(array)
    if is_nan.any():  # rounding could carry a NaN into infinity: keep its top bits and make it quiet
        quiet = (bits >> np.uint32(16)).astype(np.uint16) | np.uint16(0x0040)
        rounded = np.where(is_nan, quiet, rounded)
    return rounded


def from_float64(array: np.ndarray, dtype: str) -> np.ndarray:
    """Float64 elements in a floating dtype, rounded once, to nearest, ties to even; BF16 as uint16 bits."""
    if dtype != "BF16":
        return array.astype(NUMPY_NAMES[dtype])
    # By way of fp32, rounded to odd: what was cut off stays in the last bit, so the second rounding is as if the first.
    near = np.asarray(array, np.float32)
    bits = near.view(np.uint32).reshape(near.shape)
    with np.errstate(invalid="ignore"):
        error = np.where(np.isfinite(array), np.abs(near.astype(np.float64)) - np.abs(array), 0.0)
    odd = (bits - (error > 0).astype(np.uint32)) | (error != 0).astype(np.uint32)
    return _round_to_bf16(odd.view(np.float32))


def _infinite(array: np.ndarray, dtype: str) -> int:
    if dtype == "BF16":
        return int(np.count_nonzero((array & np.uint16(0x7FFF)) == np.uint16(0x7F80)))
    return int(np.count_nonzero(np.isinf(array)))


def as_float64(array: np.ndarray, dtype: str) -> np.ndarray:
    """Elements of any dtype as float64, for comparing values."""
    return (as_float32(array, dtype) if dtype == "BF16" else array).astype(np.float64)
