"""The mean of several checkpoints of one model: summed in float64 as they are read, rounded once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from converters.cast import FLOATS, as_float64, from_float64
from converters.edits.edited import edited, moments
from converters.format import OpenedCheckpoint, Progress
from workbench.checkpoint.source import TensorSource
from workbench.errors import ConfigError, ConversionError
from workbench.spec.geometry import Box, LogicalTensor
from workbench.spec.schema import OPTIMIZER_PREFIX


class AverageSource:
    """The weighted mean of sources with the same tensors; schema, dtypes and chunks are those of the first."""

    def __init__(self, sources: Sequence[TensorSource], weights: Sequence[float]) -> None:
        """The weights sum to one. ConversionError lists the tensors in which the sources do not agree."""
        self._sources, self._weights = sources, weights
        first = sources[0].schema
        self._schema = {name: tensor for name, tensor in first.items() if not name.startswith(OPTIMIZER_PREFIX)}
        faults = [
            f"{name} is {t.dtype}, not a floating type" for name, t in self._schema.items() if t.dtype not in FLOATS
        ]
        for number, source in enumerate(sources[1:], start=2):
            held = {n: t.shape for n, t in source.schema.items() if not n.startswith(OPTIMIZER_PREFIX)}
            faults += [f"number {number} lacks {name}" for name in self._schema if name not in held]
            faults += [f"number {number} also has {name}" for name in held if name not in self._schema]
            faults += [
                f"{name} is {list(t.shape)}, in number {number} {list(held[name])}"
                for name, t in self._schema.items()
                if held.get(name, t.shape) != t.shape
            ]
        if faults:
            more = f" and {len(faults) - 4} more" if len(faults) > 4 else ""
            raise ConversionError(f"these checkpoints have no mean: {'; '.join(faults[:4])}{more}")

    @property
    def schema(self) -> Mapping[str, LogicalTensor]:
        """Every weight, as the first source has it."""
        return self._schema

    def chunks(self, name: str) -> tuple[Box, ...]:
        """As the first source holds it."""
        return self._sources[0].chunks(name)

    def read(self, name: str, box: Box) -> np.ndarray:
        """The mean of the box."""
        total = np.zeros(box.size)
        for source, weight in zip(self._sources, self._weights, strict=True):
            total += weight * as_float64(source.read(name, box), source.schema[name].dtype)
        return from_float64(total, self._schema[name].dtype)


def average(
    opened: OpenedCheckpoint, others: Sequence[OpenedCheckpoint], weights: Sequence[float] = ()
) -> OpenedCheckpoint:
    """The mean of `opened` and `others`; the weights, by default all one, are divided by their sum.

    Moments are dropped: those of several weights are not those of their mean.
    """
    everyone = (opened, *others)
    weights = weights or (1.0,) * len(everyone)
    if len(weights) != len(everyone) or min(weights) < 0 or not sum(weights) > 0:
        raise ConfigError(f"{len(everyone)} checkpoints are averaged, so give as many weights from 0 on, not {weights}")
    for other in others:
        if other.model != opened.model:
            ours, theirs = opened.model.model_dump(), other.model.model_dump()
            differing = [f"{name}={ours[name]!r} and {theirs[name]!r}" for name in ours if ours[name] != theirs[name]]
            raise ConversionError(f"{opened.path} and {other.path} are other models: {'; '.join(differing)}")
    shares = [weight / sum(weights) for weight in weights]
    names = ", ".join(f"{share:.6g} x {one.path.absolute()}" for share, one in zip(shares, everyone, strict=True))

    def check(progress: Progress) -> None:
        for one in everyone:
            if one.check is not None:
                one.check(progress)

    return edited(
        replace(opened, check=check, others=(*opened.others, *(one.path for one in others))),
        AverageSource([one.source for one in everyone], shares),
        f"the mean of {names}",
        dropped=moments(opened.source, "the optimizer state of one checkpoint is not that of the mean"),
        goes_on=False,
    )
