"""A vocabulary with more words, or fewer: rows added to embedding and head, or cut off. Moments of new rows are 0."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import numpy as np

from converters.cast import as_float64, from_float64
from converters.edits.edited import changed_model, edited
from converters.format import OpenedCheckpoint
from converters.verify import slabs
from workbench.checkpoint.source import TensorSource
from workbench.errors import ConversionError
from workbench.spec.dtypes import NUMPY_NAMES
from workbench.spec.geometry import Box, LogicalTensor
from workbench.spec.schema import logical_tensors, weight_of

NewRows = Literal["zero", "mean"]


class ResizedSource:
    """A source some of whose tensors have another number of rows; `mean`: new rows of weights are the mean of all."""

    def __init__(self, source: TensorSource, rows: Mapping[str, int], *, mean: bool) -> None:
        """rows: the new number, by weight."""
        self._source, self._mean = source, mean
        self._schema = {
            name: replace(tensor, shape=(rows.get(weight_of(name), tensor.shape[0]), *tensor.shape[1:]))
            if tensor.shape
            else tensor
            for name, tensor in source.schema.items()
        }
        self._means: dict[str, np.ndarray] = {}
        self._lock = threading.Lock()

    @property
    def schema(self) -> Mapping[str, LogicalTensor]:
        """The tensors with their new shapes."""
        return self._schema

    def chunks(self, name: str) -> tuple[Box, ...]:
        """As the source holds it, as far as it is kept, and the new rows."""
        after, before = self._schema[name].shape, self._source.schema[name].shape
        kept = [box.intersect(Box.whole(after)) for box in self._source.chunks(name)]
        found = tuple(box for box in kept if box is not None)
        if after == before or after[0] < before[0]:
            return found
        return (*found, Box((before[0], *(0 for _ in after[1:])), (after[0] - before[0], *after[1:])))

    def read(self, name: str, box: Box) -> np.ndarray:
        """The box, with new rows filled in."""
        tensor = self._source.schema[name]
        kept = box.intersect(Box.whole(tensor.shape))
        if kept == box:
            return self._source.read(name, box)
        array = np.zeros(box.size, NUMPY_NAMES[tensor.dtype])
        if self._mean and weight_of(name) == name:
            array[...] = self._mean_row(name)[(*box.slices[1:],)]
        if kept is not None:
            array[kept.relative_to(box).slices] = self._source.read(name, kept)
        return array

    def _mean_row(self, name: str) -> np.ndarray:
        """The mean of the old rows, in float64, rounded once."""
        with self._lock:
            if name not in self._means:
                tensor = self._source.schema[name]
                total = np.zeros(tensor.shape[1:])
                for box in slabs(Box.whole(tensor.shape), 8):
                    total += as_float64(self._source.read(name, box), tensor.dtype).sum(axis=0)
                self._means[name] = from_float64(total / tensor.shape[0], tensor.dtype)
            return self._means[name]


def resize_vocabulary(opened: OpenedCheckpoint, vocab_size: int, new_rows: NewRows = "mean") -> OpenedCheckpoint:
    """`opened` with `vocab_size` words; ConversionError when a special token would be cut off."""
    model = changed_model(opened, {"vocab_size": vocab_size})
    lost = [f"{name}={value}" for name, value in model.model_dump().items() if name.endswith("token_id") and value]
    if lost := [text for text in lost if int(text.partition("=")[2]) >= vocab_size]:
        raise ConversionError(f"{opened.path}: a vocabulary of {vocab_size} has no place for {', '.join(lost)}")
    before, after = logical_tensors(opened.model, "F32"), logical_tensors(model, "F32")
    rows = {name: tensor.shape[0] for name, tensor in after.items() if tensor.shape != before[name].shape}
    what = f"vocab_size {opened.model.vocab_size} -> {vocab_size}"
    if vocab_size > opened.model.vocab_size:
        what += f", new rows {'zero' if new_rows == 'zero' else 'the mean of the old'}, their moments zero"
    return edited(opened, ResizedSource(opened.source, rows, mean=new_rows == "mean"), what, model=model)
