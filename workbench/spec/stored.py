"""Which rank stores which box of each logical tensor: small even for 10^6 boxes. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from workbench.spec.geometry import Box, ParameterSpec, Part, Place
from workbench.spec.layout import ParallelLayout
from workbench.spec.model import ModelConfig
from workbench.spec.schema import parameter_specs, stage_places


@dataclass(frozen=True, slots=True)
class StoredPieces:
    """A logical tensor as ranks store it: on one stage and one rank of the expert axis, a box on each of `tp_ranks`."""

    stage: int
    ep_rank: int
    tp_ranks: tuple[int, ...]
    boxes: tuple[Box, ...]


def stored_tensors(
    model: ModelConfig, layout: ParallelLayout, specs: Iterable[ParameterSpec] | None = None
) -> dict[str, StoredPieces]:
    """What a checkpoint of `layout` holds of each logical tensor, by name: each element once.

    Of several copies the first one is stored; what several stages hold is stored by the first stage, and what is not
    dealt by the first rank of the expert axis. `specs`: what is stored, if not the parameters of the model (an
    adapter). Tensors that are cut alike share their boxes, so this stays small where there are 10^6 of them.
    """
    stages: dict[Place, int] = {}
    for stage in reversed(range(layout.pp)):
        stages |= dict.fromkeys(stage_places(model, layout, stage), stage)
    found: dict[str, StoredPieces] = {}
    for spec in parameter_specs(model, layout) if specs is None else specs:
        stage = stages[spec.places[0]] if len(spec.places) == 1 else 0
        share = len(spec.parts) // spec.dealt
        for index, part in enumerate(spec.parts):
            tp_ranks, boxes = _cut(part.shape, part.dim, part.units, part.replicate, part.pad_to, layout.tp)
            found[part.name] = StoredPieces(stage, index // share if spec.dealt > 1 else 0, tp_ranks, boxes)
    return found


@lru_cache(maxsize=4096)
def _cut(
    shape: tuple[int, ...], dim: int | None, units: int | None, replicate: bool, pad_to: int | None, tp: int
) -> tuple[tuple[int, ...], tuple[Box, ...]]:
    """The tensor-parallel ranks that store a part of a tensor, and their boxes."""
    part = Part("", shape, dim, units, replicate, pad_to)
    shards = [(tp_rank, part.shard(tp, tp_rank)) for tp_rank in range(tp)]
    held = [(tp_rank, shard.box) for tp_rank, shard in shards if shard is not None and shard.copy == 0]
    return tuple(tp_rank for tp_rank, _ in held), tuple(box for _, box in held)
