"""Saving and loading a run: every rank writes and reads its own boxes, rank 0 makes a save appear all at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.optimizer import Optimizer
from workbench.checkpoint.manifest import TrainingState
from workbench.checkpoint.reader import NativeSource
from workbench.checkpoint.writer import (
    RankEntries,
    assemble,
    commit,
    copy_tokenizer,
    discard,
    partial_folder,
    prepare,
    rank_tag,
    write_rank_files,
)
from workbench.errors import CheckpointError, WorkbenchError
from workbench.models.state import load, stored_boxes
from workbench.parallel.live import LiveParameter
from workbench.parallel.mesh import Mesh
from workbench.spec.geometry import Box, LogicalTensor
from workbench.spec.layout import ParallelLayout
from workbench.spec.lora import AdapterRecord
from workbench.spec.model import ModelConfig
from workbench.spec.schema import OPTIMIZER_PREFIX

Item = tuple[LogicalTensor, Box, Callable[[], np.ndarray]]


@dataclass(frozen=True)
class Contents:
    """What goes into a checkpoint besides numbers; the same on every rank. `adapter`: what is saved is an adapter."""

    model: ModelConfig
    lineage: Sequence[Mapping[str, Any]] = ()
    tokenizer: Path | None = None
    adapter: AdapterRecord | None = None


def save(
    final: Path,
    parameters: Sequence[LiveParameter],
    optimizer: Optimizer | None,
    mesh: Mesh,
    *,
    training: TrainingState,
    contents: Contents,
) -> None:
    """Writes a checkpoint at `final`; without an optimizer, its moments are left out. Collective over the world.

    A failure of any rank is raised on every rank, and then nothing appears at `final`.
    """
    first = mesh.world.rank == 0
    _together(mesh, lambda: prepare(final) if first else None)
    partial = partial_folder(final)
    items = _items(parameters, optimizer)
    try:
        entries = _together(mesh, lambda: write_rank_files(partial, _tag(mesh), items))
        _together(mesh, lambda: _commit(final, entries, mesh.layout, training, contents) if first else None)
    except BaseException:
        if first:
            discard(partial)
        raise


def _commit(
    final: Path, entries: Sequence[RankEntries], layout: ParallelLayout, training: TrainingState, contents: Contents
) -> None:
    partial = partial_folder(final)
    manifest = assemble(
        entries,
        model=contents.model,
        layout=layout,
        training=training,
        lineage=contents.lineage,
        tokenizer=None if contents.tokenizer is None else copy_tokenizer(contents.tokenizer, partial),
        adapter=contents.adapter,
    )
    commit(partial, final, manifest)


def load_training(
    source: NativeSource, parameters: Sequence[LiveParameter], optimizer: Optimizer, *, updates: int
) -> None:
    """Fills parameters and moments from a checkpoint of any layout; CheckpointError when it holds no moments."""
    moments = optimizer.moments()
    if moments and not any(name.startswith(OPTIMIZER_PREFIX) for name in source.schema):
        raise CheckpointError(
            f"{source.folder}: holds no optimizer state, so a run cannot go on from it; finetune from it instead, "
            "or set run.resume = 'never' in a new run.dir"
        )
    load(parameters, source)
    for prefix, values in moments.items():
        load([p for p in parameters if p.path in values], source, prefix=f"{prefix}/", values=values)
    optimizer.step_count = updates


def _items(parameters: Sequence[LiveParameter], optimizer: Optimizer | None) -> list[Item]:
    def boxes() -> Iterator[Item]:
        for stored in stored_boxes(parameters):
            yield stored.tensor, stored.box, stored.array
        for prefix, values in (optimizer.moments() if optimizer is not None else {}).items():
            for stored in stored_boxes(parameters, prefix=f"{prefix}/", values=values):
                yield stored.tensor, stored.box, stored.array

    return list(boxes())


def _tag(mesh: Mesh) -> str:
    at = mesh.coordinate
    # Replicas that hold parts of their own are the first ones, whose position is that among the sharers.
    return rank_tag(at.tp_rank, at.stage, mesh.data.rank if max(mesh.shard.size, mesh.ep.size) > 1 else None)


def _together(mesh: Mesh, work: Callable[[], Any]) -> list[Any]:
    """The results of `work` on all ranks; if it failed on one, its error is raised on all, so that none waits."""
    try:
        outcome: Any = work()
        error: BaseException | None = None
    except Exception as caught:
        outcome, error = None, caught
    described = None if error is None else (type(error), str(error))
    gathered = mesh.world.gather_objects((outcome, described))
    if error is not None:
        raise error
    for rank, (_, fault) in enumerate(gathered):
        if fault is not None:
            kind = fault[0] if issubclass(fault[0], WorkbenchError) else CheckpointError
            raise kind(fault[1] if kind is fault[0] else f"rank {rank} failed to save: {fault[0].__name__}: {fault[1]}")
    return [outcome for outcome, _ in gathered]
