"""Where parameters lie in the flat buffers of Megatron's distributed optimizer. Pure arithmetic.

A rank lines its parameters up in the reverse of their order in the module, one line for each pair of types (parameter,
gradient) and again for experts. Each starts at a multiple of 64 elements, and the line is cut into buckets. What pads a
bucket at its end is never stored, so nothing here depends on the number of replicas but the default bucket's size.
(megatron-core 0.16.1, distributed/param_and_grad_buffer.py, `_ParamAndGradBuffer.__init__`.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from workbench.errors import CheckpointError

ALIGNMENT: Final = 64


@dataclass(frozen=True, slots=True)
class FlatParameter:
    """A parameter of one rank. `alone`: it has a bucket of its own, as an embedding that two stages share has."""

    name: str
    numel: int
    alone: bool = False


@dataclass(frozen=True, slots=True)
class Bucket:
    """`numel` elements, as they are stored, and the first one of each parameter that lies here."""

    numel: int
    starts: Mapping[str, int]


def default_bucket_size(num_replicas: int) -> int:
    """The elements after which a bucket is full when gradients are reduced while others are computed."""
    return max(40_000_000, 1_000_000 * num_replicas)


def fill_buckets(parameters: Sequence[FlatParameter], bucket_size: int | None) -> tuple[Bucket, ...]:
    """The buckets of a buffer, whose parameters are given in the order of the module; `bucket_size` None: one bucket.

    A bucket starts at a multiple of 128 elements, so that places inside of it do not depend on where it starts.
    """
    found: list[Bucket] = []
    starts: dict[str, int] = {}
    end = 0
    for parameter in reversed(parameters):
        start = _round_up(end, ALIGNMENT)
        if parameter.alone and starts:
            found.append(Bucket(start, starts))  # closed after the room that would have come before this parameter
            starts, start = {}, 0
        starts[parameter.name] = start
        end = start + parameter.numel
        if parameter.alone or (bucket_size is not None and end >= bucket_size):
            found.append(Bucket(end, starts))
            starts, end = {}, 0
    return (*found, Bucket(end, starts)) if starts else tuple(found)


def fit_buckets(parameters: Sequence[FlatParameter], sizes: Sequence[int], where: str) -> tuple[Bucket, ...]:
    """The buckets of a buffer whose stored sizes are known, whatever rule cut them.

    CheckpointError names the first bucket at whose size no parameter ends.
    """
    found: list[Bucket] = []
    starts: dict[str, int] = {}
    end = before = 0
    for parameter in reversed(parameters):
        start = _round_up(end, ALIGNMENT)
        starts[parameter.name] = start
        before, end = end, start + parameter.numel
        size = sizes[len(found)] if len(found) < len(sizes) else 0
        if size in (end, _round_up(end, ALIGNMENT)):
            found.append(Bucket(size, starts))
            starts, end = {}, 0
        elif end > size:
            raise CheckpointError(
                f"{where}: bucket {len(found)} holds {size} elements, but {parameter.name!r} ends at {end} of it and "
                f"the parameter before at {before}; these are not the buckets of this model at this layout"
            )
    if len(found) < len(sizes) or starts:
        raise CheckpointError(
            f"{where}: bucket {len(found)} holds {sizes[len(found)]} elements, but the parameters left for it fill "
            f"{end}; these are not the buckets of this model at this layout"
        )
    return tuple(found)


def joined(buckets: Sequence[Bucket]) -> Bucket:
    """A whole buffer as `distrib_optim.pt` holds it: its buckets one after another."""
    starts: dict[str, int] = {}
    numel = 0
    for bucket in buckets:
        starts |= {name: numel + start for name, start in bucket.starts.items()}
        numel += bucket.numel
    return Bucket(numel, starts)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
