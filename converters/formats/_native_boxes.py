"""Where each piece of a native checkpoint will lie: looked up tensor by tensor, whatever the number of files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache

from converters.format import WriteRequest
from workbench.checkpoint.reader import offset_text
from workbench.checkpoint.safetensors_io import file_bytes
from workbench.checkpoint.writer import FILE_METADATA, file_of, rank_tag
from workbench.spec.geometry import Box, LogicalTensor
from workbench.spec.lora import adapter_specs
from workbench.spec.schema import weight_of
from workbench.spec.stored import StoredPieces, stored_tensors


class NativeBoxes:
    """The pieces of the tensors of a request, from the model's one table of geometry.

    Moments are cut like their weights. A tensor that the model does not know is stored whole by the first rank: nothing
    is left out for want of a place.
    """

    def __init__(self, request: WriteRequest) -> None:
        self._schema, self._ep = request.schema, request.layout.ep
        adapter = request.adapter
        specs = None if adapter is None else adapter_specs(request.model, adapter.lora, request.layout)
        self._stored = stored_tensors(request.model, request.layout, specs)
        self._names: dict[tuple[bool, int, int], list[str]] = {}
        self._files: dict[tuple[bool, int, int, tuple[int, ...]], tuple[str, ...]] = {}
        for name in request.schema:
            held = self._held(name)
            self._names.setdefault((weight_of(name) is not name, held.stage, held.ep_rank), []).append(name)

    def _held(self, name: str) -> StoredPieces:
        found = self._stored.get(weight_of(name))
        return found or StoredPieces(0, 0, (0,), (Box.whole(self._schema[name].shape),))

    def pieces(self, name: str) -> tuple[tuple[str, Box], ...]:
        """File and box of every piece of a tensor."""
        held = self._held(name)
        key = (weight_of(name) is not name, held.stage, held.ep_rank, held.tp_ranks)
        files = self._files.get(key)
        if files is None:
            files = tuple(file_of(name, self._tag(held, tp_rank)) for tp_rank in held.tp_ranks)
            self._files[key] = files
        return tuple(zip(files, held.boxes, strict=True))

    def _tag(self, held: StoredPieces, tp_rank: int) -> str:
        return rank_tag(tp_rank, held.stage, held.ep_rank if self._ep > 1 else None)

    def files(self) -> Iterator[tuple[str, list[tuple[LogicalTensor, Box]]]]:
        """Each file and what it will hold, in the order of the tensors."""
        for names in self._names.values():
            found: dict[str, list[tuple[LogicalTensor, Box]]] = {}
            for name in names:
                for file, box in self.pieces(name):
                    found.setdefault(file, []).append((self._schema[name], box))
            yield from found.items()

    def file_sizes(self) -> dict[str, int]:
        """Size in bytes of each file."""
        found: dict[str, int] = {}
        for names in self._names.values():
            entries: dict[str, list[tuple[int, str, tuple[int, ...]]]] = {}
            for name in names:
                tensor = self._schema[name]
                name_bytes = len(json.dumps(name))
                for file, box in self.pieces(name):
                    key_bytes = name_bytes + (0 if box.size == tensor.shape else _offset_bytes(box.offset))
                    entries.setdefault(file, []).append((key_bytes, tensor.dtype, box.size))
            found |= {file: file_bytes(inside, FILE_METADATA) for file, inside in entries.items()}
        return dict(sorted(found.items()))


@lru_cache(maxsize=4096)
def _offset_bytes(offset: tuple[int, ...]) -> int:
    return len(offset_text(offset))
