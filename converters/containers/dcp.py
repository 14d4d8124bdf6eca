"""Folders of torch.distributed.checkpoint, laid out before their tensors are there. No torch.

Each chunk of a tensor and each other object is an archive of torch.save in a range of a `.distcp` file; `.metadata`
tells where. As torch 2.13 writes it, but for room between archives, so that tensors are aligned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from converters.containers.pickle_writer import Call, Global, Instance, Items, dump
from converters.containers.torch_zip import Storage, lay_out_torch, new_tensor, torch_dtype, torch_size
from converters.formats._files import Checksum, FileContent, Place, whole_file
from converters.formats._folder import WrittenPiece, WrittenTensor
from workbench.checkpoint.safetensors_io import PAGE_BYTES
from workbench.spec.geometry import Box

METADATA: Final = ".metadata"
_ALIGNMENT: Final = 64
_LARGE_BYTES: Final = 64 << 10
_VERSION: Final = "1.0.0"
_STRIDED: Final = Call(Global("torch.serialization", "_get_layout"), ("torch.strided",))


@dataclass(frozen=True)
class GlobalTensor:
    """A tensor to be stored. chunks: boxes that cover it exactly once, and the `.distcp` file of each.

    data: its bytes, of one that has a single chunk and is known beforehand (a step count). padding: as of
    `converters.formats._folder.WrittenTensor`.
    """

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[tuple[Box, str], ...]
    data: bytes | None = None
    padding: int = 0


@dataclass(frozen=True)
class DcpLayout:
    """The files of the folder, and where the tensors that are not known yet will lie in them."""

    files: Mapping[str, FileContent]
    tensors: Mapping[str, WrittenTensor]


def lay_out_dcp(
    tensors: Mapping[str, GlobalTensor], objects: Mapping[str, tuple[str, Any]], *, planner_data: Any = None
) -> DcpLayout:
    """A folder of `tensors` and `objects` (file and plain value), both by their full names.

    planner_data: for programs that rebuild a nested state dictionary, the path of keys of each name.
    """
    files: dict[str, _File] = {}
    entries: dict[str, Any] = {}
    places: list[tuple[Instance, Instance]] = []
    found: dict[str, WrittenTensor] = {}
    for name, (file, value) in objects.items():
        _, info = files.setdefault(file, _File(file)).add(value)
        entries[name] = _object("metadata.BytesStorageMetadata", {})
        places.append((_index(name, None, None), info))
    for name, tensor in tensors.items():
        pieces = []
        for number, (box, file) in enumerate(tensor.chunks):
            stored = new_tensor(tensor.dtype, box.size, tensor.data)
            starts, info = files.setdefault(file, _File(file)).add(stored)
            pieces.append(WrittenPiece(box, (Place(file, starts[stored.storage]),)))
            places.append((_index(name, torch_size(box.offset), number), info))
        entries[name] = _tensor_metadata(tensor)
        if tensor.data is None:
            found[name] = WrittenTensor(tensor.dtype, tensor.shape, tuple(pieces), tensor.padding)
    metadata = {
        "state_dict_metadata": entries,
        "planner_data": planner_data,
        "storage_data": Items(tuple(places)),
        "storage_meta": None,
        "version": _VERSION,
    }
    contents = {file: growing.content() for file, growing in files.items()}
    return DcpLayout({**contents, METADATA: whole_file(dump(_object("metadata.Metadata", metadata)))}, found)


class _File:
    """A `.distcp` file that grows by archives."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._end = 0
        self._known: list[tuple[int, bytes]] = []
        self._checksums: list[Checksum] = []

    def add(self, value: Any) -> tuple[Mapping[Storage, int], Instance]:
        """Appends an archive of `value`: where its storages begin, and what the metadata say of it."""
        laid = lay_out_torch(value)
        large = [place for storage, place in laid.storages.items() if storage.num_bytes >= _LARGE_BYTES]
        # What is large begins on a page: a copy to any other address runs at half the speed.
        start = self._end + (-(self._end + large[0]) % PAGE_BYTES if large else -self._end % _ALIGNMENT)
        laid = laid.at(start)
        self._known += laid.known
        self._checksums += laid.checksums
        self._end = start + laid.num_bytes
        place = {"relative_path": self._name, "offset": start, "length": laid.num_bytes}
        return laid.storages, _object("filesystem._StorageInfo", place)

    def content(self) -> FileContent:
        return FileContent(self._end, tuple(self._known), tuple(self._checksums))


def _object(kind: str, state: Any) -> Instance:
    """An object of a class of torch.distributed.checkpoint."""
    module, _, name = kind.rpartition(".")
    return Instance(Global(f"torch.distributed.checkpoint.{module}", name), state)


def _index(name: str, offset: Call | None, number: int | None) -> Instance:
    return _object("metadata.MetadataIndex", {"fqn": name, "offset": offset, "index": number})


def _tensor_metadata(tensor: GlobalTensor) -> Instance:
    contiguous = Call(Global("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"), (0,))
    properties = (torch_dtype(tensor.dtype), _STRIDED, False, contiguous, False)
    chunks = [
        _object("metadata.ChunkStorageMetadata", {"offsets": torch_size(box.offset), "sizes": torch_size(box.size)})
        for box, _ in tensor.chunks
    ]
    state = {
        "properties": _object("metadata.TensorProperties", properties),
        "size": torch_size(tensor.shape),
        "chunks": chunks,
    }
    return _object("metadata.TensorStorageMetadata", state)
