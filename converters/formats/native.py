"""The native checkpoint as a format: opened at whatever layout it has, written at any other."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np

from converters.claim import Claim
from converters.format import Destination, OpenedCheckpoint, Progress, WriteRequest
from converters.formats._native_boxes import NativeBoxes
from converters.names import summarise
from converters.threads import in_threads
from workbench.checkpoint.descriptors import Descriptors
from workbench.checkpoint.early_sync import EarlySync
from workbench.checkpoint.manifest import TOKENIZER, Manifest, StoredBox, StoredTensor, is_native
from workbench.checkpoint.reader import NativeSource, open_native
from workbench.checkpoint.source import TensorSource
from workbench.checkpoint.writer import (
    ShardFileWriter,
    commit,
    copy_tokenizer,
)
from workbench.errors import ConfigError, ConversionError
from workbench.spec.geometry import Box, LogicalTensor


class NativeFormat:
    """Native checkpoints; see docs/checkpoint-format.md."""

    name = "native"

    def recognises(self, path: Path) -> bool:
        """Whether there is a manifest of ours."""
        return is_native(path)

    def open(self, path: Path, *, family: str | None = None, vocab_size: int | None = None) -> OpenedCheckpoint:
        """The checkpoint at `path`; CheckpointError when it is missing, unfinished, truncated, newer or foreign."""
        source = open_native(path)
        manifest = source.manifest
        tokenizer = path / TOKENIZER if manifest.tokenizer else None
        return OpenedCheckpoint(
            format=self.name,
            path=path,
            source=source,
            model=manifest.model,
            layout=manifest.layout,
            training=manifest.training,
            tokenizer=tokenizer,
            family=family or _family(manifest),
            lineage=manifest.lineage,
            fingerprints={name: stored.fingerprint for name, stored in manifest.tensors.items()},
            check=source.check,
            adapter=manifest.adapter,
        )

    def destination(self, request: WriteRequest) -> Destination:
        """A native checkpoint at the request's layout; LayoutError when the layout cannot hold the model."""
        request.layout.validate_for(request.model)
        return NativeDestination(request)


def _family(manifest: Manifest) -> str | None:
    found = [str(parent["family"]) for parent in manifest.lineage if parent.get("family")]
    return found[-1] if found else None


class NativeDestination:
    """A native checkpoint being written."""

    def __init__(self, request: WriteRequest) -> None:
        self._request = request
        self._boxes = NativeBoxes(request)
        self._claim = Claim(request.path)
        self._partial = self._claim.folder
        self._writers: dict[str, ShardFileWriter] = {}
        self._descriptors = Descriptors(os.O_RDWR)
        self._tokenizer: dict[str, str] = {}
        self._flusher = EarlySync()

    @property
    def path(self) -> Path:
        return self._request.path

    @property
    def schema(self) -> Mapping[str, LogicalTensor]:
        return self._request.schema

    @cached_property
    def files(self) -> Mapping[str, int]:
        return self._boxes.file_sizes()

    def boxes(self, name: str) -> tuple[tuple[str, Box], ...]:
        return self._boxes.pieces(name)

    def sweep(self, name: str) -> int:
        return 0

    @property
    def in_order(self) -> bool:
        return True

    def begin(self, *, resume: bool = False) -> None:
        """Makes the `.partial` folder and its files; ConfigError when the path exists or is being written."""
        self._claim.take(resume=resume)
        for file, boxes in self._boxes.files():
            path, read_back = self._partial / file, self._request.read_back
            self._writers[file] = ShardFileWriter(path, boxes, self._descriptors, read_back=read_back)
            self._writers[file].create(resume=resume)
        if self._request.tokenizer is not None:
            self._tokenizer = copy_tokenizer(self._request.tokenizer, self._partial)

    def write(self, name: str, box: Box, array: np.ndarray) -> None:
        """Appends to the stored box that contains `box`."""
        file, piece = next((f, p) for f, p in self.boxes(name) if p.contains(box))
        self._writers[file].append(name, piece, array)
        self._flusher.written(self._writers[file], array.nbytes)

    def receipt(self, name: str, part: Box) -> list[str]:
        """The checksums of the boxes in `part`."""
        return [self._writers[file].checksum(name, box) for file, box in self._inside(name, part)]

    def restore(self, name: str, part: Box, receipt: list[str]) -> bool:
        """Compares the boxes in `part` with their checksums."""
        inside = self._inside(name, part)
        return all(self._writers[f].restore(name, box, said) for (f, box), said in zip(inside, receipt, strict=True))

    def _inside(self, name: str, part: Box) -> list[tuple[str, Box]]:
        return [(file, box) for file, box in self.boxes(name) if part.contains(box)]

    def check(self, progress: Progress) -> None:
        """Syncs; every box has been read back as it was written, or is read now when that was not asked for."""
        self._sync()
        if self._request.read_back:
            progress(sum(self.files.values()))
        else:
            NativeSource(self._partial, self._written({})).check(progress)

    def _sync(self) -> None:
        self._flusher.finish()
        in_threads(self._writers.values(), lambda writer, _: writer.sync(), 2)

    def reopen(self) -> TensorSource:
        """What has been written, as a source."""
        return NativeSource(self._partial, self._written({}))

    def commit(self, fingerprints: Mapping[str, str]) -> Path:
        """Syncs, writes the manifest and renames."""
        self._sync()
        commit(self._partial, self.path, self._written(fingerprints))
        self._close()
        self._claim.release()
        return self.path

    def link(self, source: NativeSource) -> Path:
        """Makes the checkpoint without copying: its files are hard links to those of `source`.

        ConversionError when a stored box would belong to two ranks; ConfigError when the file system refuses links.
        """
        self._refuse_straddling(source)
        tensors = {name: source.manifest.tensors[name] for name in self.schema}
        used = {stored.file for tensor in tensors.values() for stored in tensor.boxes}
        files = {file: size for file, size in source.manifest.files.items() if file in used}
        self._claim.take()
        try:
            for file in files:
                _link(source.folder / file, self._partial / file)
            if self._request.tokenizer is not None:
                self._tokenizer = copy_tokenizer(self._request.tokenizer, self._partial)
            commit(self._partial, self.path, self._manifest(tensors, files))
        except BaseException:
            self.abort()
            raise
        self._claim.release()
        return self.path

    def _refuse_straddling(self, source: NativeSource) -> None:
        faults = []
        for name in self.schema:
            ours = [box for _, box in self.boxes(name)]
            if not all(any(box.contains(stored) for box in ours) for stored in source.chunks(name)):
                faults.append(name)
        if faults:
            raise ConversionError(f"--lazy: {summarise(faults, 'is', 'are')} cut anew; leave --lazy out to copy")

    def abort(self, *, keep: bool = False) -> None:
        """Removes the `.partial` folder if it is this writer's and not to be kept."""
        self._close()
        self._claim.give_up(keep=keep)

    def _close(self) -> None:
        self._flusher.cancel()
        self._descriptors.close()

    def _written(self, fingerprints: Mapping[str, str]) -> Manifest:
        boxes: dict[str, list[StoredBox]] = {name: [] for name in self.schema}
        for writer in self._writers.values():
            for tensor, stored in writer.entries():
                boxes[tensor.name].append(stored)
        tensors = {
            name: StoredTensor(tensor, fingerprints.get(name, ""), tuple(sorted(boxes[name], key=_by_offset)))
            for name, tensor in self.schema.items()
        }
        return self._manifest(tensors, self.files)

    def _manifest(self, tensors: Mapping[str, StoredTensor], files: Mapping[str, int]) -> Manifest:
        request = self._request
        return Manifest(
            model=request.model,
            layout=request.layout,
            tensors=tensors,
            files=files,
            training=request.training,
            lineage=request.lineage,
            tokenizer=self._tokenizer,
            adapter=request.adapter,
        )


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        raise ConfigError(
            f"--lazy: {target} cannot be a hard link to {source}: {error.strerror}; name a destination beside the "
            "source, or leave --lazy out to copy"
        ) from error


def _by_offset(stored: StoredBox) -> tuple[int, ...]:
    return stored.box.offset


FORMAT = NativeFormat()
