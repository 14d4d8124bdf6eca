"""Runs a plan: any source into any destination, in slabs, by threads; the destination appears whole or not at all."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Final, Literal

import numpy as np

from converters.format import Destination, OpenedCheckpoint, Progress, no_progress
from converters.full import check_whole
from converters.journal import Done, Journal, refuse_changes, source_files
from converters.plan import Plan, Sweep
from converters.threads import in_threads
from workbench.checkpoint.buffers import aligned_empty
from workbench.checkpoint.fingerprint import PartialFingerprint, box_fingerprint
from workbench.checkpoint.source import TensorSource
from workbench.checkpoint.writer import partial_folder
from workbench.errors import ResourceError, WorkbenchError
from workbench.parallel.host_memory import keep_freed_memory
from workbench.spec.geometry import Box

Verify = Literal["none", "crc", "full"]
_BLOCK_BYTES: Final = 512  # of st_blocks
_SPARE_BYTES: Final = 16 << 20  # for manifests, configuration and tokenizers


def copy_checkpoint(
    opened: OpenedCheckpoint,
    source: TensorSource,
    destination: Destination,
    plan: Plan,
    *,
    format: str,
    verify: Verify = "crc",
    resume: bool = False,
    progress: Progress = no_progress,
) -> dict[str, str]:
    """Fills and commits `destination` and returns the fingerprints of what it holds.

    `source` is that of `opened`, perhaps wrapped (a cast); `format` is the destination's. With "crc" the source's own
    checksums are verified and what is written is read back, piece by piece; "full" also assembles each tensor of both
    sides by other code, once it is on the disk, and compares them (`converters.full`). Whatever fails, nothing is at
    the destination. Its unfinished folder stays after a kill, Ctrl-C, or a failure of the machine (a full disk, a
    device that cannot be read), for `resume` to take up again; it goes when what it holds is in doubt, or the source.
    CheckpointError when the source is damaged, or has changed meanwhile.
    """
    require_space(destination.path, sum(plan.files.values()))
    known = known_fingerprints(opened, source, plan)
    before = source_files(opened, destination.path)
    journal = Journal(destination.path, plan, before, opened.edits)
    if resume:
        journal.read()
    try:
        destination.begin(resume=bool(journal.done))
        journal.open()
        wanted = plan.tensors.keys() - known.keys()
        computed = run_plan(plan, source, destination, fingerprint=wanted, progress=progress, journal=journal)
        fingerprints = {name: known.get(name) or computed[name] for name in plan.tensors}
        if verify != "none":
            if opened.check is not None:
                opened.check(progress)
            destination.check(progress)
        refuse_changes(before, source_files(opened, destination.path))
        if verify == "full":
            check_whole(opened, destination, format, fingerprints, progress)
        destination.commit(fingerprints)
    except BaseException as error:
        keep = isinstance(error, KeyboardInterrupt) or isinstance(error.__cause__, OSError)
        destination.abort(keep=keep)
        if keep and isinstance(error, WorkbenchError) and (partial := partial_folder(destination.path)).exists():
            advice = f"what was copied is in {partial}: run the same with --resume to go on from it, or remove it"
            raise type(error)(f"{error}; {advice}") from error.__cause__
        raise
    finally:
        journal.close()
    return fingerprints


def work_bytes(plan: Plan, verify: Verify) -> int:
    """About how many bytes `copy_checkpoint` will report to its progress callback."""
    return plan.num_bytes * {"none": 1, "crc": 2, "full": 3}[verify]


def known_fingerprints(opened: OpenedCheckpoint, source: TensorSource, plan: Plan) -> dict[str, str]:
    """Fingerprints that the source records and that hold for what is written: those of tensors that are not cast."""
    before = opened.source.schema
    same = (name for name, tensor in plan.tensors.items() if before.get(name) == tensor == source.schema[name])
    return {name: opened.fingerprints[name] for name in same if opened.fingerprints.get(name)}


def require_space(path: Path, num_bytes: int) -> None:
    """ResourceError unless the file system of `path` has room for `num_bytes`; an unfinished folder makes room."""
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    held = sum(file.stat().st_blocks * _BLOCK_BYTES for file in partial_folder(path).rglob("*"))
    free = shutil.disk_usage(parent).free + held
    if num_bytes + _SPARE_BYTES > free:
        raise ResourceError(f"{path}: needs {num_bytes + _SPARE_BYTES} bytes, but only {free} are free in {parent}")


def run_plan(
    plan: Plan,
    source: TensorSource,
    destination: Destination,
    *,
    fingerprint: Collection[str] = (),
    progress: Progress = no_progress,
    journal: Journal | None = None,
) -> dict[str, str]:
    """Copies every slab of the plan but what the journal knows and `destination` still holds, and keeps the journal.

    Returns the fingerprints of the tensors named in `fingerprint`.
    """
    sums: dict[str, PartialFingerprint] = {name: PartialFingerprint() for name in fingerprint}
    done = journal.done if journal is not None else {}
    lock = threading.Lock()
    keep_freed_memory()
    copier = _Copier(plan, source, destination, progress)

    def work(numbered: tuple[int, Sweep], stop: threading.Event) -> None:
        index, sweep = numbered
        box = sweep.box(plan.tensors[sweep.name].shape)
        if index in done and destination.restore(sweep.name, box, done[index].receipt):
            part = done[index].part
            progress(sweep.num_bytes)
        else:
            part = copier.run(sweep, stop, fingerprint=sweep.name in sums)
            if journal is not None and not stop.is_set():
                journal.add(index, Done(part, destination.receipt(sweep.name, box)))
        if sweep.name in sums:
            with lock:
                sums[sweep.name] += part

    in_threads(enumerate(plan.sweeps), work, plan.workers)
    return {name: part.finish(plan.tensors[name]) for name, part in sums.items()}


class _Copier:
    """Moves the slabs of one sweep after another."""

    def __init__(self, plan: Plan, source: TensorSource, destination: Destination, progress: Progress) -> None:
        self._plan, self._source, self._destination, self._progress = plan, source, destination, progress

    def run(self, sweep: Sweep, stop: threading.Event, *, fingerprint: bool) -> PartialFingerprint:
        """Copies one sweep, in order; the fingerprint's part of it if asked."""
        tensor = self._plan.tensors[sweep.name]
        whole = sweep.box(tensor.shape)
        chunks = [chunk for chunk in self._source.chunks(sweep.name) if whole.intersect(chunk)]
        pieces = [piece for _, piece in self._destination.boxes(sweep.name) if whole.intersect(piece)]
        total = PartialFingerprint()
        for slab in sweep.slabs(tensor.shape):
            if stop.is_set():
                break
            held = [(box, self._source.read(sweep.name, box)) for chunk in chunks if (box := chunk.intersect(slab))]
            cut = [(box, _cut(held, box)) for piece in pieces if (box := piece.intersect(slab))]
            for box, array in cut:
                self._destination.write(sweep.name, box, array)
                self._progress(array.nbytes)
            if fingerprint:  # of the side that has fewer parts: they take longer than their bytes do
                total += sum((box_fingerprint(tensor, *part) for part in min(held, cut, key=len)), PartialFingerprint())
        return total


def _cut(held: Iterable[tuple[Box, np.ndarray]], box: Box) -> np.ndarray:
    """The elements of `box` from arrays of boxes that together cover it; a view when one of them is enough."""
    pieces = [(common, array[common.relative_to(own).slices]) for own, array in held if (common := own.intersect(box))]
    if len(pieces) == 1:
        return pieces[0][1]
    joined = aligned_empty(box.size, pieces[0][1].dtype)
    for common, array in pieces:
        joined[common.relative_to(box).slices] = array
    return joined
