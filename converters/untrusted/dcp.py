"""Folders of torch.distributed.checkpoint: which global tensors they hold, and where each piece lies. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from converters.untrusted.paths import file_inside
from converters.untrusted.pickle import MAX_BYTES, read_pickle
from converters.untrusted.plain import Allowed, PlainObject, Refused, sizes, text
from converters.untrusted.torch_file import DTYPES, TORCH, StridedTensor, read_torch
from workbench.errors import CheckpointError
from workbench.spec.geometry import Box, coverage_fault

METADATA: Final = ".metadata"
_MODULE: Final = "torch.distributed.checkpoint."
_ALLOWED: Final = Allowed(TORCH, inert=(_MODULE, "megatron.core.dist_checkpointing.strategies."))
_FAULTS: Final = (KeyError, TypeError, AttributeError, ValueError, IndexError)


@dataclass(frozen=True, slots=True)
class DcpBytes:
    """Where an object that is no tensor lies: an archive of torch.save in a range of a file."""

    file: Path
    start: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class DcpPiece:
    """A box of a global tensor, in an archive of its own in a range of a file."""

    box: Box
    dtype: str
    file: Path
    start: int
    num_bytes: int

    def locate(self) -> StridedTensor:
        """The place of the elements themselves; reads the archive's directory, about 2 KB."""
        found = read_torch(self.file, offset=self.start, length=self.num_bytes)
        if type(found) is not StridedTensor or (found.shape, found.dtype) != (self.box.size, self.dtype):
            held = f"{found.dtype} {list(found.shape)}" if type(found) is StridedTensor else type(found).__name__
            expected = f"{self.dtype} {list(self.box.size)}"
            raise CheckpointError(f"{self.file}: holds {held} at byte {self.start}, where {METADATA} says {expected}")
        return found


@dataclass(frozen=True, slots=True)
class DcpTensor:
    """A global tensor; its pieces are proven to cover it exactly once."""

    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[DcpPiece, ...]


@dataclass(frozen=True)
class DcpFolder:
    """What a folder holds: global tensors and other objects, by name."""

    path: Path
    tensors: Mapping[str, DcpTensor]
    objects: Mapping[str, DcpBytes]

    def read_object(self, name: str) -> Any:
        """The plain data of an object (of a list that Megatron wraps it in, the list)."""
        place = self.objects[name]
        return read_torch(place.file, offset=place.start, length=place.num_bytes)


def read_dcp(folder: Path) -> DcpFolder:
    """The tables of the folder's `.metadata`, proven to be whole. CheckpointError when they are not."""
    path = folder / METADATA
    try:
        if path.stat().st_size > MAX_BYTES:
            raise CheckpointError(f"{path}: has {path.stat().st_size} bytes (at most {MAX_BYTES})")
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    metadata = read_pickle(data, _ALLOWED, str(path))
    try:
        return _Tables(folder, metadata).folder()
    except Refused as error:
        raise CheckpointError(f"{path}: {error}") from None
    except _FAULTS as error:
        raise CheckpointError(f"{path}: is not the metadata of a checkpoint: {type(error).__name__} {error}") from error


class _Tables:
    """The metadata while it is taken apart. Faults of its form surface as KeyError, TypeError and the like."""

    def __init__(self, folder: Path, metadata: PlainObject) -> None:
        self.folder_path = folder
        self.attributes = metadata.attributes
        self.files: dict[str, tuple[Path, int]] = {}
        self.places = {
            (text(index.attributes["fqn"]), _offset(index)): info
            for index, info in self.attributes["storage_data"].items()
        }

    def folder(self) -> DcpFolder:
        tensors: dict[str, DcpTensor] = {}
        objects: dict[str, DcpBytes] = {}
        for name, entry in self.attributes["state_dict_metadata"].items():
            if type(name) is not str:
                raise TypeError(f"a name that is a {type(name).__name__}")
            if entry.kind.endswith(".BytesStorageMetadata"):
                objects[name] = DcpBytes(*self._place(name, None))
            else:
                tensors[name] = self._tensor(name, entry)
        return DcpFolder(self.folder_path, tensors, objects)

    def _tensor(self, name: str, entry: PlainObject) -> DcpTensor:
        shape = sizes(entry.attributes["size"])
        dtype = _dtype(entry.attributes["properties"])
        pieces = []
        for chunk in entry.attributes["chunks"]:
            offset, size = sizes(chunk.attributes["offsets"]), sizes(chunk.attributes["sizes"])
            if not len(offset) == len(size) == len(shape):
                raise ValueError(f"{name!r} of shape {list(shape)} has a chunk of {len(size)} dimensions")
            pieces.append(DcpPiece(Box(offset, size), dtype, *self._place(name, offset)))
        if fault := coverage_fault(shape, [piece.box for piece in pieces]):
            raise CheckpointError(f"{self.folder_path / METADATA}: {name!r}: {fault}")
        return DcpTensor(shape, dtype, tuple(pieces))

    def _place(self, name: str, offset: tuple[int, ...] | None) -> tuple[Path, int, int]:
        info = self.places.get((name, offset))
        if info is None:
            raise CheckpointError(f"{self.folder_path / METADATA}: {name!r} at {offset} has no place in any file")
        if info.attributes.get("transform_descriptors"):
            raise CheckpointError(f"{self.folder_path}: {name!r} is compressed; save it without stream transforms")
        file = info.attributes["relative_path"]
        if file not in self.files:
            found = file_inside(self.folder_path, file, METADATA)
            self.files[file] = (found, found.stat().st_size)
        path, file_bytes = self.files[file]
        start, num_bytes = sizes((info.attributes["offset"], info.attributes["length"]))
        if start + num_bytes > file_bytes:
            raise CheckpointError(
                f"{path}: {file_bytes} bytes, but {METADATA} places {name!r} at {start} to {start + num_bytes}; "
                "it is truncated"
            )
        return path, start, num_bytes


def _offset(index: PlainObject) -> tuple[int, ...] | None:
    offset = index.attributes.get("offset")
    return None if offset is None else sizes(offset)


def _dtype(properties: PlainObject) -> str:
    attributes = properties.attributes
    name = attributes["dtype"] if "dtype" in attributes else attributes["__state__"][0]
    if type(name) is not str or not name.startswith("torch."):
        raise TypeError(f"a dtype that is {name!r}")
    return DTYPES.get(name, name)
