"""What the base says of each row: its log-probability of the answer, found once and kept with the run.

The base is the stage that a run begins with, or at any time one whose adapters are switched off: there is no second
copy of it. A run that goes on reads what it wrote, for its weights may not be the base's any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from xxhash import xxh3_64

from finetune.adapters._lora_layers import switched_off
from finetune.objective import TaskEvaluation
from finetune.task import Example, Prepared
from pretrain.engine import Pipeline, Share, to_batch
from workbench.errors import DataError
from workbench.models.batch import Batch
from workbench.parallel.mesh import Mesh

FILE: Final = "reference.safetensors"


def with_reference(
    prepared: Prepared, pipeline: Pipeline, folder: Path, *, micro_size: int, begins: bool, is_base: bool
) -> Prepared:
    """The rows, each with its value `reference`, as the file of the run in `folder` has it or as the stage says now.

    begins: the run is new, so that a file there is of another. is_base: without adapters, the stage holds the base's
    weights; where it does not, a row that the file does not know is a DataError. Collective over the mesh.
    """
    sets = {"train": prepared.train, **prepared.held_out}
    keys = {name: digest(rows) for name, rows in sets.items()}
    known = {} if begins else _read(folder, pipeline.mesh)
    missing = {keys[name]: (name, rows) for name, rows in sets.items() if keys[name] not in known}
    if missing and not is_base:
        raise DataError(
            f"{folder / FILE}: does not hold what the base says of the {' and '.join(n for n, _ in missing.values())} "
            "rows, and the run has no base any more to ask: its weights have been trained; give the rows and the file "
            "that it began with, or name another run.dir"
        )
    for key, (name, rows) in missing.items():
        known[key] = base_logps(pipeline, TaskEvaluation(name, rows, prepared), len(rows), micro_size=micro_size)
    if missing and pipeline.mesh.world.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{FILE}.partial"
        save_file({key: known[key] for key in keys.values()}, partial)
        partial.replace(folder / FILE)
    return _attach(prepared, known)


def with_saved_reference(prepared: Prepared, folder: Path, mesh: Mesh) -> Prepared:
    """The held-out rows with their values `reference` from the file of the run in `folder`; DataError for others."""
    known = _read(folder, mesh)
    if lacking := [name for name, rows in prepared.held_out.items() if digest(rows) not in known]:
        raise DataError(
            f"{folder / FILE}: does not hold what the base says of the {' and '.join(lacking)} rows, by which rewards "
            "are measured; judge the rows that the run was given, by the configuration of that run"
        )
    return _attach(replace(prepared, train=()), known)


def base_logps(pipeline: Pipeline, rows: TaskEvaluation, num_rows: int, *, micro_size: int) -> np.ndarray:
    """The log-probability of each row's answer under the stage without its adapters, float64. Collective."""
    mesh = pipeline.mesh
    found = torch.zeros(num_rows, dtype=torch.float64, device=mesh.device)

    def take(batch: Batch, output: torch.Tensor) -> None:
        rows_B = batch.values["row"].long()
        found[rows_B[rows_B >= 0]] = -output.double().sum(dim=-1)[rows_B >= 0]

    share = Share(micro_size, mesh.dp.rank, mesh.dp.size)
    with switched_off(pipeline.stage):
        for some in rows.batches(share, num_microbatches=2 * mesh.pp.size, max_samples=None):
            named = [replace(one, values={"row": one.sample_ids}) for one in some]
            pipeline.evaluate([to_batch(one, mesh.device) for one in named], "token_losses", take)
    # Ranks of tp and cp hold copies, stages where the network does not end hold zeros.
    part = found if mesh.tp.rank == mesh.cp.rank == 0 else torch.zeros_like(found)
    return mesh.world.all_reduce(part).cpu().numpy()


def digest(rows: Sequence[Example]) -> str:
    """What tells one set of rows from another."""
    seen = xxh3_64()
    for row in rows:
        seen.update(np.int64(len(row.input_ids)).tobytes() + row.input_ids.tobytes() + row.labels.tobytes())
    return seen.hexdigest()


def _read(folder: Path, mesh: Mesh) -> dict[str, np.ndarray]:
    """What the file holds, by digest; nothing without one. Rank 0 reads for all."""
    path = folder / FILE
    found: dict[str, np.ndarray] = mesh.world.broadcast_object(
        load_file(path) if mesh.world.rank == 0 and path.is_file() else {}
    )
    return found


def _attach(prepared: Prepared, known: dict[str, np.ndarray]) -> Prepared:
    def attached(rows: Sequence[Example]) -> list[Example]:
        values = known[digest(rows)].tolist() if rows else []
        pairs = zip(rows, values, strict=True)
        return [replace(row, values={**row.values, "reference": value}) for row, value in pairs]

    held_out = {name: attached(rows) for name, rows in prepared.held_out.items()}
    return replace(prepared, train=attached(prepared.train), held_out=held_out)
