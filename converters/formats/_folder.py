"""A foreign checkpoint being written: a folder of files of known size, filled by ranges, then renamed into place.

A format that writes says with data where everything lies (`FolderContents`): the files, the tensors as the foreign
program names them, the pieces in which these lie in files, and the rules that lead to the logical tensors. A logical
box that arrives is taken through its rules and scattered into all pieces that it meets.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from xxhash import xxh3_128_hexdigest

from converters.claim import Claim
from converters.format import Progress, WriteRequest
from converters.formats._files import FileContent, Place, RangedWriter
from converters.rules import Rule, assemble, origins, pull, push_pieces
from converters.threads import in_threads
from workbench.checkpoint.descriptors import Descriptors
from workbench.checkpoint.early_sync import EarlySync
from workbench.checkpoint.writer import publish, sync_path, write_faults
from workbench.errors import ConversionError, VerificationError
from workbench.spec.dtypes import ITEM_BYTES, NUMPY_NAMES
from workbench.spec.geometry import Box, LogicalTensor, coverage_fault

if TYPE_CHECKING:
    from workbench.checkpoint.source import TensorSource

_WORKERS: Final = 2


@dataclass(frozen=True, slots=True)
class WrittenPiece:
    """A box of a tensor to be written and where it will lie; at several places when the format repeats it."""

    box: Box
    places: tuple[Place, ...]


@dataclass(frozen=True)
class WrittenTensor:
    """A tensor to be written, as the foreign program names it.

    pieces: their boxes cover it exactly once. padding: number of its elements that no logical tensor has and that
    stay zero (a padded vocabulary).
    """

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[WrittenPiece, ...]
    padding: int = 0


@dataclass(frozen=True)
class FolderContents:
    """Everything of a foreign checkpoint but the numbers in its tensors.

    files: by path inside the folder. tensors: those that logical tensors fill. rules: for each logical tensor, the one
    or several places in `tensors` that it fills (`foreign` names them). copies: files taken over from elsewhere.
    """

    files: Mapping[str, FileContent]
    tensors: Mapping[str, WrittenTensor]
    rules: Mapping[str, tuple[Rule, ...]]
    copies: Mapping[str, Path] = field(default_factory=dict)

    def check(self, schema: Mapping[str, LogicalTensor]) -> None:
        """Asserts that the logical tensors of `schema` fill every foreign tensor exactly once, in its dtype."""
        filled: dict[str, list[Box]] = {name: [] for name in self.tensors}
        for name, tensor in schema.items():
            assert self.rules[name], f"{name} has no place"
            for rule in self.rules[name]:
                foreign = self.tensors[rule.foreign]
                found = (foreign.dtype, rule.foreign_shape(tensor.shape))
                assert found == (tensor.dtype, foreign.shape), (name, tensor, foreign.dtype, foreign.shape)
                filled[rule.foreign] += origins(rule.view, Box.whole(tensor.shape))
        for name, foreign in self.tensors.items():
            fault = coverage_fault(foreign.shape, [piece.box for piece in foreign.pieces])
            assert fault is None, f"the pieces of {name}: {fault}"
            fault = coverage_fault(foreign.shape, filled[name], foreign.padding)
            assert fault is None, f"the rules do not fill {name}: {fault}"


class FolderDestination:
    """See `converters.format.Destination`. `reopen` opens the unfinished folder with the format's own reader."""

    def __init__(self, request: WriteRequest, contents: FolderContents, reopen: Callable[[Path], TensorSource]) -> None:
        contents.check(request.schema)
        self._request, self._contents, self._reopen = request, contents, reopen
        self._claim = Claim(request.path)
        self._partial = self._claim.folder
        self._targets = {name: _targets(contents, tensor) for name, tensor in request.schema.items()}
        self._descriptors = Descriptors(os.O_RDWR)
        self._writers = {
            file: RangedWriter(self._partial / file, content, self._descriptors)
            for file, content in contents.files.items()
        }
        self._written: dict[str, list[tuple[Box, str]]] = {name: [] for name in request.schema}
        self._mutex = threading.Lock()
        self._sealed = False
        self._flusher = EarlySync()

    @property
    def path(self) -> Path:
        """Where the folder will be."""
        return self._request.path

    @property
    def schema(self) -> Mapping[str, LogicalTensor]:
        """The logical tensors that will be written."""
        return self._request.schema

    @property
    def files(self) -> Mapping[str, int]:
        """Size of each file, by its path inside the folder."""
        sizes = {file: content.num_bytes for file, content in self._contents.files.items()}
        return sizes | {file: source.stat().st_size for file, source in self._contents.copies.items()}

    def boxes(self, name: str) -> tuple[tuple[str, Box], ...]:
        """The whole tensor at once: it is cut and scattered when it is written."""
        _, pieces = self._targets[name][0]
        file = pieces[0].places[0].file if pieces else ""
        return ((file, Box.whole(self.schema[name].shape)),)

    def sweep(self, name: str) -> int:
        """The first dimension. Files are filled at any place, so the order is the one that suits the source."""
        return 0

    @property
    def in_order(self) -> bool:
        """Whether files carry checksums: these are made of bytes that pass in order."""
        return any(content.checksums for content in self._contents.files.values())

    def begin(self, *, resume: bool = False) -> None:
        """Makes the unfinished folder with files of full size. ConfigError when it exists or is being written."""
        self._claim.take(resume=resume)
        for writer in self._writers.values():
            writer.create(resume=resume)
        for file, source in self._contents.copies.items():
            with write_faults(self._partial / file):
                shutil.copyfile(source, self._partial / file)

    def write(self, name: str, box: Box, array: np.ndarray) -> None:
        """Puts a logical box into every place where it lies."""
        for rule, pieces in self._targets[name]:
            for origin in origins(rule.view, box):
                for part, values in push_pieces(
                    rule.view, origin, lambda wanted: array[wanted.relative_to(box).slices]
                ):
                    self._scatter(pieces, part, values)
        digest = _digest(array)
        if self._request.read_back:  # at once, while it is in the cache
            self._compare(name, box, digest)
        with self._mutex:
            self._written[name].append((box, digest))

    def _scatter(self, pieces: Iterable[WrittenPiece], part: Box, values: np.ndarray) -> None:
        for piece, common in _meeting(pieces, part):
            for place in piece.places:
                writer = self._writers[place.file]
                array = values[common.relative_to(part).slices]
                writer.write(place, piece.box.size, common.relative_to(piece.box), array)
                self._flusher.written(writer, array.nbytes)

    def check(self, progress: Progress) -> None:
        """Compares every box, in all of its places, with what `write` was given, unless `write` has done so."""

        def compare(written: tuple[str, Box, str], stop: threading.Event) -> None:
            name, box, digest = written
            if not (self._request.read_back or stop.is_set()):
                self._compare(name, box, digest)
            progress(box.numel * ITEM_BYTES[self.schema[name].dtype])

        self._finish()
        written = ((name, box, digest) for name, boxes in self._written.items() for box, digest in boxes)
        in_threads(written, compare, _WORKERS)

    def _compare(self, name: str, box: Box, digest: str) -> None:
        if not self._holds(name, box, digest):
            raise VerificationError(f"{self._partial}: {name!r} at {list(box.offset)} reads back other than written")

    def receipt(self, name: str, part: Box) -> list[Any]:
        """The boxes that were written in `part`, with their digests."""
        return [(box.offset, box.size, digest) for box, digest in self._written[name] if part.contains(box)]

    def restore(self, name: str, part: Box, receipt: list[Any]) -> bool:
        """Compares the boxes in `part` with their digests."""
        found = [(Box(tuple(offset), tuple(size)), digest) for offset, size, digest in receipt]
        if coverage_fault(part.size, [box.relative_to(part) for box, _ in found]):
            return False
        if not all(self._holds(name, box, digest) for box, digest in found):
            return False
        with self._mutex:
            self._written[name] += found
        return True

    def _holds(self, name: str, box: Box, digest: str) -> bool:
        return all(_digest(array) == digest for array in self._read_back(name, box))

    def _read_back(self, name: str, box: Box) -> Iterator[np.ndarray]:
        """The elements of a logical box, once from each set of copies of its pieces."""
        dtype = np.dtype(NUMPY_NAMES[self.schema[name].dtype])
        for rule, pieces in self._targets[name]:
            for copy in range(max((len(piece.places) for piece in pieces), default=0)):
                yield pull(rule.view, box, partial(self._gather, pieces, copy, dtype))

    def _gather(self, pieces: Iterable[WrittenPiece], copy: int, dtype: np.dtype, part: Box) -> np.ndarray:
        def read(piece: WrittenPiece, common: Box) -> np.ndarray:
            place = piece.places[min(copy, len(piece.places) - 1)]
            return self._writers[place.file].read(place, piece.box.size, common.relative_to(piece.box), dtype)

        return assemble(part, ((common, read(piece, common)) for piece, common in _meeting(pieces, part)))

    def _finish(self) -> None:
        """Returns when the checksums are stored and everything is on the disk."""
        self._flusher.finish()
        if not self._sealed:
            in_threads(self._writers.values(), lambda writer, _: writer.seal(), _WORKERS)
            self._sealed = True
        in_threads(self._writers.values(), lambda writer, _: writer.sync(), _WORKERS)

    def reopen(self) -> TensorSource:
        """The unfinished folder as a source."""
        self._finish()
        return self._reopen(self._partial)

    def commit(self, fingerprints: Mapping[str, str]) -> Path:
        """Makes the folder appear at `path`, once everything is on the disk."""
        self._finish()
        with write_faults(self._partial):
            for file in self._contents.copies:
                sync_path(self._partial / file)
            for folder, _, _ in os.walk(self._partial):
                sync_path(Path(folder))
        publish(self._partial, self.path)
        self._close()
        self._claim.release()
        return self.path

    def abort(self, *, keep: bool = False) -> None:
        """Removes what was written, if it was this writer's and is not to be kept."""
        self._close()
        self._claim.give_up(keep=keep)

    def _close(self) -> None:
        self._flusher.cancel()
        self._descriptors.close()


def foreign_tensors(
    schema: Mapping[str, LogicalTensor], rules: Mapping[str, tuple[Rule, ...]]
) -> dict[str, LogicalTensor]:
    """Every foreign tensor that the rules fill, by its foreign name, in the order of `rules`."""
    found: dict[str, LogicalTensor] = {}
    for name, places in rules.items():
        for rule in places:
            tensor = LogicalTensor(rule.foreign, rule.foreign_shape(schema[name].shape), schema[name].dtype)
            other = found.setdefault(rule.foreign, tensor)
            if other != tensor:
                raise ConversionError(
                    f"{name!r} is {tensor.dtype} {list(tensor.shape)} as part of {rule.foreign!r}, which is "
                    f"{other.dtype} {list(other.shape)}; give all weights one type with --dtype"
                )
    return found


def padding_of(
    tensors: Mapping[str, LogicalTensor], schema: Mapping[str, LogicalTensor], rules: Mapping[str, tuple[Rule, ...]]
) -> dict[str, int]:
    """By foreign name, the elements of `tensors` that no logical tensor has."""
    found = {name: tensor.numel for name, tensor in tensors.items()}
    for name, places in rules.items():
        for rule in places:
            found[rule.foreign] -= schema[name].numel
    return found


def _targets(contents: FolderContents, tensor: LogicalTensor) -> list[tuple[Rule, tuple[WrittenPiece, ...]]]:
    """The rules of a logical tensor, each with the pieces that hold some of it."""
    found = []
    for rule in contents.rules[tensor.name]:
        parts = origins(rule.view, Box.whole(tensor.shape))
        pieces = contents.tensors[rule.foreign].pieces
        found.append((rule, tuple(p for p in pieces if any(p.box.intersect(part) for part in parts))))
    return found


def _meeting(pieces: Iterable[WrittenPiece], part: Box) -> Iterator[tuple[WrittenPiece, Box]]:
    for piece in pieces:
        if (common := piece.box.intersect(part)) is not None:
            yield piece, common


def _digest(array: np.ndarray) -> str:
    return xxh3_128_hexdigest(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
