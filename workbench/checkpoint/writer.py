"""Writing native checkpoints: safetensors files filled by ranges, then a manifest, then one rename. NumPy only.

A save by many ranks: rank 0 calls `prepare`, every rank calls `write_rank_files` for its own boxes, rank 0 gathers the
`RankEntries`, makes the manifest with `assemble` and calls `commit`. Until the rename the folder is called `.partial`
and does not exist for any reader.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from xxhash import xxh3_64

from workbench.checkpoint.buffers import aligned_contiguous, aligned_empty
from workbench.checkpoint.descriptors import Descriptors
from workbench.checkpoint.fingerprint import PartialFingerprint, box_fingerprint, fingerprint
from workbench.checkpoint.manifest import MANIFEST, TOKENIZER, Manifest, StoredBox, StoredTensor, TrainingState
from workbench.checkpoint.reader import box_key
from workbench.checkpoint.safetensors_io import lay_out
from workbench.errors import ConfigError, ResourceError, VerificationError
from workbench.spec.dtypes import NUMPY_NAMES
from workbench.spec.geometry import Box, LogicalTensor, coverage_fault
from workbench.spec.layout import ParallelLayout
from workbench.spec.lora import AdapterRecord
from workbench.spec.model import ModelConfig
from workbench.spec.schema import OPTIMIZER_PREFIX

JOURNAL: Final = "journal.jsonl"
"""What an interrupted conversion had done; it is never part of a checkpoint."""
FILE_METADATA: Final = {"format": "pt"}
BLOCK_BYTES: Final = 2 << 20
"""Hashed, written and read back while still in the cache, and a slab of a conversion: a file takes one write at a time,
so threads whose turns are long find to taking them by themselves, and many short ones wait for each other."""


def rank_tag(tp_rank: int, stage: int, dp_rank: int | None = None) -> str:
    """How the files of a rank are told apart: `tp00-pp01`, and `-dp02` when data-parallel ranks store shards."""
    return f"tp{tp_rank:02d}-pp{stage:02d}" + ("" if dp_rank is None else f"-dp{dp_rank:02d}")


def file_of(name: str, tag: str) -> str:
    """The file in which a rank stores a logical tensor: weights and optimizer state lie apart."""
    return f"{'optim' if name.startswith(OPTIMIZER_PREFIX) else 'model'}-{tag}.safetensors"


class _BoxWriter:
    """One stored box being filled from its start, with the checksum of what has passed."""

    def __init__(self, tensor: LogicalTensor, box: Box, start: int, num_bytes: int) -> None:
        self.tensor, self.box, self.start, self.num_bytes = tensor, box, start, num_bytes
        self.done = 0
        self.checksum = ""
        self.hashers: tuple[xxh3_64, xxh3_64] | None = None
        """Of what was written and of what was read back, while it is being filled."""


class ShardFileWriter:
    """A safetensors file of boxes, preallocated and filled by ranges; different boxes from any threads."""

    def __init__(
        self,
        path: Path,
        boxes: Sequence[tuple[LogicalTensor, Box]],
        descriptors: Descriptors,
        *,
        read_back: bool = False,
    ) -> None:
        self.path = path
        self._read_back, self._descriptors = read_back, descriptors
        layout = lay_out([(box_key(t, box), t.dtype, box.size) for t, box in boxes], FILE_METADATA)
        self.file_bytes = layout.file_bytes
        self._boxes: dict[tuple[str, Box], _BoxWriter] = {}
        for tensor, box in boxes:
            entry = layout.entries[box_key(tensor, box)]
            self._boxes[tensor.name, box] = _BoxWriter(tensor, box, entry.start, entry.num_bytes)
        self._prefix = layout.prefix

    def create(self, *, resume: bool = False) -> None:
        """Makes the file at its full size, with its header; with `resume` it may be there, and keeps its boxes."""
        with write_faults(self.path):
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | (0 if resume else os.O_EXCL) | os.O_CLOEXEC, 0o644)
            try:
                os.truncate(descriptor, self.file_bytes)
                _write_all(descriptor, memoryview(self._prefix), 0)
            finally:
                os.close(descriptor)

    def append(self, name: str, box: Box, array: np.ndarray) -> None:
        """Writes the next elements of the stored box `box` of tensor `name`; `array` is only lent."""
        writer = self._boxes[name, box]
        assert array.dtype == NUMPY_NAMES[writer.tensor.dtype], (name, array.dtype, writer.tensor.dtype)
        data = aligned_contiguous(array).reshape(-1).view(np.uint8).data
        assert writer.done + len(data) <= writer.num_bytes, f"{name}: more elements than the box holds"
        written, read_back = writer.hashers = writer.hashers or (xxh3_64(), xxh3_64())
        memory = aligned_empty((min(BLOCK_BYTES, len(data)) if self._read_back else 0,), "uint8").data
        with write_faults(self.path), self._descriptors.use(self.path) as descriptor:
            for start in range(0, len(data), BLOCK_BYTES):
                block = data[start : start + BLOCK_BYTES]
                written.update(block)
                _write_all(descriptor, block, writer.start + writer.done)
                if self._read_back:  # at once, while it is in the cache
                    read_back.update(_read_all(descriptor, memory[: len(block)], writer.start + writer.done))
                writer.done += len(block)
        if writer.done == writer.num_bytes:
            writer.checksum, writer.hashers = written.hexdigest(), None
            if self._read_back:
                self._compare(writer, read_back.hexdigest())

    def _compare(self, writer: _BoxWriter, found: str) -> None:
        if writer.checksum != found:
            raise VerificationError(
                f"{self.path.name}: tensor {writer.tensor.name!r}, box at {list(writer.box.offset)}: read back with "
                f"checksum {found}, written with {writer.checksum}; the disk or its memory is faulty"
            )

    def checksum(self, name: str, box: Box) -> str:
        """The checksum of a box that is full."""
        return self._boxes[name, box].checksum

    def restore(self, name: str, box: Box, checksum: str) -> bool:
        """Takes a box as full if the file already holds one of this checksum."""
        writer, found = self._boxes[name, box], xxh3_64()
        memory = aligned_empty((BLOCK_BYTES,), "uint8").data
        with write_faults(self.path), self._descriptors.use(self.path) as descriptor:
            for start in range(0, writer.num_bytes, BLOCK_BYTES):
                block = memory[: min(BLOCK_BYTES, writer.num_bytes - start)]
                found.update(_read_all(descriptor, block, writer.start + start))
        if found.hexdigest() != checksum:
            return False
        writer.done, writer.checksum = writer.num_bytes, checksum
        return True

    def entries(self) -> tuple[tuple[LogicalTensor, StoredBox], ...]:
        """What the file holds; every box must be full."""
        found = []
        for writer in self._boxes.values():
            assert writer.done == writer.num_bytes, f"{writer.tensor.name}: {writer.done} of {writer.num_bytes} bytes"
            stored = StoredBox(writer.box, self.path.name, writer.start, writer.num_bytes, writer.checksum)
            found.append((writer.tensor, stored))
        return tuple(found)

    def sync(self) -> None:
        """Returns when the bytes are on the disk."""
        with write_faults(self.path), self._descriptors.use(self.path) as descriptor:
            os.fsync(descriptor)


class write_faults:
    """Turns a failed write into a ResourceError that says whether the disk is full."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ResourceError(f"{self.path}: no space left on the device; free some and try again") from error
            raise ResourceError(f"{self.path}: cannot be written: {error.strerror}") from error


def _write_all(descriptor: int, data: memoryview, start: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], start + done)


def _read_all(descriptor: int, block: memoryview, start: int) -> memoryview:
    """`block`, filled with the bytes from `start` on."""
    done = 0
    while done < len(block):
        count = os.preadv(descriptor, [block[done:]], start + done)
        assert count > 0, "the file has become shorter"
        done += count
    return block


@dataclass(frozen=True, slots=True)
class RankEntries:
    """What one rank has written: its boxes, its part of the fingerprints, and its files; small, to be gathered."""

    boxes: tuple[tuple[LogicalTensor, StoredBox], ...]
    fingerprints: Mapping[str, PartialFingerprint]
    files: Mapping[str, int]


def write_rank_files(
    partial: Path, tag: str, items: Iterable[tuple[LogicalTensor, Box, Callable[[], np.ndarray]]]
) -> RankEntries:
    """Writes a rank's boxes to `model-<tag>` and `optim-<tag>`, fsynced; each provider is called once, in order.

    A provider returns the box in storage dtype (BF16 as uint16 bits).
    """
    items = list(items)
    by_file: dict[str, list[tuple[LogicalTensor, Box, Callable[[], np.ndarray]]]] = {}
    for item in items:
        by_file.setdefault(file_of(item[0].name, tag), []).append(item)
    boxes: list[tuple[LogicalTensor, StoredBox]] = []
    parts: dict[str, PartialFingerprint] = {}
    files: dict[str, int] = {}
    descriptors = Descriptors(os.O_RDWR)
    for file, inside in by_file.items():
        writer = ShardFileWriter(partial / file, [(tensor, box) for tensor, box, _ in inside], descriptors)
        writer.create()
        for tensor, box, provide in inside:
            array = np.ascontiguousarray(provide()).reshape(box.size)
            writer.append(tensor.name, box, array)
            part = box_fingerprint(tensor, box, array)
            parts[tensor.name] = parts.get(tensor.name, PartialFingerprint()) + part
        boxes.extend(writer.entries())
        files[file] = writer.file_bytes
        writer.sync()
    descriptors.close()
    return RankEntries(tuple(boxes), parts, files)


def assemble(
    entries: Iterable[RankEntries],
    *,
    model: ModelConfig,
    layout: ParallelLayout,
    training: TrainingState | None = None,
    lineage: Sequence[Mapping[str, Any]] = (),
    tokenizer: Mapping[str, str] | None = None,
    adapter: AdapterRecord | None = None,
) -> Manifest:
    """The manifest of what all ranks have written, after proof that every element was stored exactly once."""
    boxes: dict[str, list[StoredBox]] = {}
    tensors: dict[str, LogicalTensor] = {}
    parts: dict[str, list[PartialFingerprint]] = {}
    files: dict[str, int] = {}
    for rank in entries:
        for tensor, stored in rank.boxes:
            tensors[tensor.name] = tensor
            boxes.setdefault(tensor.name, []).append(stored)
        for name, part in rank.fingerprints.items():
            parts.setdefault(name, []).append(part)
        files.update(rank.files)
    for name, tensor in tensors.items():
        fault = coverage_fault(tensor.shape, [stored.box for stored in boxes[name]])
        assert fault is None, f"{name}: {fault}"
    stored_tensors = {
        name: StoredTensor(tensor, fingerprint(tensor, parts[name]), tuple(sorted(boxes[name], key=_by_offset)))
        for name, tensor in tensors.items()
    }
    return Manifest(model, layout, stored_tensors, files, training, tuple(lineage), tokenizer or {}, adapter)


def _by_offset(stored: StoredBox) -> tuple[int, ...]:
    return stored.box.offset


def partial_folder(final: Path) -> Path:
    """Where a checkpoint is written before it is complete."""
    return final.with_name(final.name + ".partial")


def prepare(final: Path) -> Path:
    """An empty `.partial` folder for a checkpoint at `final`; what a dead save has left there is removed."""
    if final.exists():
        raise ConfigError(f"{final} exists already; remove it or name another destination")
    partial = partial_folder(final)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    return partial


def copy_tokenizer(source: Path, partial: Path) -> dict[str, str]:
    """Copies the files of a tokenizer folder into the checkpoint, durably; their checksums, for the manifest."""
    target = partial / TOKENIZER
    target.mkdir(exist_ok=True)
    checksums = {}
    for file in sorted(source.iterdir()):
        if file.is_file():
            data = file.read_bytes()
            checksums[file.name] = xxh3_64(data).hexdigest()
            (target / file.name).write_bytes(data)
            sync_path(target / file.name)
    sync_path(target)
    return checksums


def commit(partial: Path, final: Path, manifest: Manifest) -> None:
    """Makes the checkpoint appear at `final`: the manifest is written last, everything is on disk, then one rename."""
    for name, size in manifest.files.items():
        found = (partial / name).stat().st_size
        assert found == size, f"{name}: {found} bytes, expected {size}"
    path = partial / MANIFEST
    with write_faults(path):
        with path.open("wb") as file:
            file.write(manifest.to_bytes())
            file.flush()
            os.fsync(file.fileno())
    publish(partial, final)


def publish(partial: Path, final: Path) -> None:
    """The end of every commit: the journal goes, and what is complete and on the disk gets its name.

    ConfigError when the name has been taken meanwhile.
    """
    with write_faults(partial):
        (partial / JOURNAL).unlink(missing_ok=True)
        sync_path(partial)
        if final.exists():
            raise ConfigError(f"{final} appeared while it was being written; remove it or name another destination")
        partial.rename(final)
        sync_path(final.parent)


def discard(partial: Path) -> None:
    """Removes an unfinished checkpoint, as far as that is possible."""
    with suppress(OSError):
        shutil.rmtree(partial)


def sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
