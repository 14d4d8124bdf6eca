"""A Hugging Face folder being written: planned completely first, then filled by ranges, then renamed into place."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from converters.family import Family
from converters.format import Progress, WriteRequest
from converters.formats._huggingface_files import CONFIG, INDEX, WEIGHTS
from converters.formats._huggingface_source import HuggingFaceSource
from converters.formats._model_card import model_card
from converters.formats._ranges import write_box
from converters.names import summarise
from converters.rules import Rule, origins, push_pieces
from workbench.checkpoint.safetensors_io import FileLayout, lay_out
from workbench.checkpoint.writer import discard, partial_folder, prepare
from workbench.errors import CheckpointError, ConversionError, ResourceError, VerificationError
from workbench.spec.dtypes import ITEM_BYTES, TORCH_NAMES
from workbench.spec.geometry import Box, LogicalTensor, coverage_fault
from workbench.tokenizer import TOKENIZER_FILES

if TYPE_CHECKING:
    import numpy as np

    from workbench.checkpoint.source import TensorSource

_FORMAT_METADATA: Final = {"format": "pt"}  # transformers refuses files without it


class HuggingFaceDestination:
    """See `converters.format.Destination`. Everything but the weights' bytes is decided by the constructor."""

    def __init__(self, request: WriteRequest, family: Family, birth: Mapping[str, Any]) -> None:
        self._request, self._family = request, family
        self._rules = _bind(request, family)
        self._foreign = _foreign_tensors(request.schema, self._rules)
        self._layouts = _deal_out(self._foreign, request.max_shard_bytes)
        self._file_of = {key: file for file, layout in self._layouts.items() for key in layout.entries}
        self._texts = self._make_texts(birth)
        self._partial = partial_folder(request.path)
        self._descriptors: dict[str, int] = {}
        self._written: list[tuple[str, Box, str]] = []
        self._lock = threading.Lock()

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
        """Size of each file, by name."""
        weights = {file: layout.file_bytes for file, layout in self._layouts.items()}
        tokenizer = {file.name: file.stat().st_size for file in self._tokenizer_files()}
        return weights | tokenizer | {name: len(text) for name, text in self._texts.items()}

    def boxes(self, name: str) -> tuple[tuple[str, Box], ...]:
        """One piece: a logical tensor lies in one file."""
        whole = Box.whole(self._request.schema[name].shape)
        return ((self._file_of[self._rules[name].foreign], whole),)

    def sweep(self, name: str) -> int:
        """The first dimension. Files are filled at any place, so the order is the one that suits the source."""
        return 0

    def begin(self) -> None:
        """Makes the unfinished folder: weight files of full size, configuration and tokenizer."""
        prepare(self.path)
        for file, layout in self._layouts.items():
            try:
                descriptor = os.open(self._partial / file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
                self._descriptors[file] = descriptor
                os.truncate(descriptor, layout.file_bytes)
                os.pwrite(descriptor, layout.prefix, 0)
            except OSError as error:
                raise ResourceError(f"{self._partial / file}: cannot be made: {error.strerror}") from error
        for name, text in self._texts.items():
            (self._partial / name).write_bytes(text)
        for source in self._tokenizer_files():
            shutil.copyfile(source, self._partial / source.name)

    def write(self, name: str, box: Box, array: np.ndarray) -> None:
        """Puts a logical box into its place in its file."""
        rule = self._rules[name]
        file = self._file_of[rule.foreign]
        entry = self._layouts[file].entries[rule.foreign]
        for origin in origins(rule.view, box):
            for part, values in push_pieces(rule.view, origin, lambda wanted: array[wanted.relative_to(box).slices]):
                try:
                    write_box(self._partial / file, self._descriptors[file], entry, part, values)
                except OSError as error:
                    raise ResourceError(f"{self._partial / file}: cannot be written: {error.strerror}") from error
        with self._lock:
            self._written.append((name, box, _digest(array)))

    def check(self, progress: Progress) -> None:
        """Reads back every box that was written and compares it with what `write` was given."""
        source = self.reopen()
        for name, box, digest in self._written:
            array = source.read(name, box)
            if _digest(array) != digest:
                raise VerificationError(
                    f"{self._partial}: {name!r} at {list(box.offset)} reads back other than written"
                )
            progress(array.nbytes)

    def reopen(self) -> TensorSource:
        """The unfinished folder as a source."""
        return HuggingFaceSource(self._partial, self._family, self._request.model)

    def commit(self, fingerprints: Mapping[str, str]) -> Path:
        """Makes the folder appear at `path`, once everything is on disk."""
        self._close(sync=True)
        for file in (*self._texts, *(source.name for source in self._tokenizer_files())):
            _sync(self._partial / file)
        _sync(self._partial)
        if self.path.exists():
            raise CheckpointError(f"{self.path} appeared while it was being written; the result is in {self._partial}")
        self._partial.rename(self.path)
        _sync(self.path.parent)
        return self.path

    def abort(self) -> None:
        """Removes what was written."""
        self._close(sync=False)
        discard(self._partial)

    def _close(self, *, sync: bool) -> None:
        for descriptor in self._descriptors.values():
            if sync:
                os.fsync(descriptor)
            os.close(descriptor)
        self._descriptors.clear()

    def _tokenizer_files(self) -> list[Path]:
        folder = self._request.tokenizer
        return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()] if folder else []

    def _make_texts(self, birth: Mapping[str, Any]) -> dict[str, bytes]:
        """The contents of the small files, by name."""
        request, model = self._request, self._request.model
        dtype = TORCH_NAMES[_main_dtype(self._foreign)]
        original = birth.get("config")
        texts = {CONFIG: _json_text(self._family.dump_config(model, dtype, original))}
        if not model.num_labels:
            generation = birth.get("generation_config") or _generation_config(request)
            texts["generation_config.json"] = _json_text(generation)
        card = model_card(request, self._family, dtype)
        texts["README.md"] = card.encode()
        if len(self._layouts) > 1:
            total = sum(t.numel * ITEM_BYTES[t.dtype] for t in self._foreign.values())
            elements = sum(t.numel for t in self._foreign.values())
            index = {
                "metadata": {"total_size": total, "total_parameters": elements},
                "weight_map": dict(sorted(self._file_of.items())),
            }
            texts[INDEX] = _json_text(index)
        return texts


def _bind(request: WriteRequest, family: Family) -> dict[str, Rule]:
    """The rule of each logical tensor; ConversionError when the request holds others, or not all."""
    if request.adapter is not None:
        raise ConversionError(
            f"{request.path}: an adapter alone is no Hugging Face model; export it with --to peft, or merge it first"
        )
    bound = family.bind(request.model)
    if over := sorted(set(request.schema) - set(bound)):
        moments = all(name.startswith("optim.") for name in over)
        advice = "; leave the optimizer out (--optimizer drop)" if moments else ""
        raise ConversionError(
            f"{request.path}: {summarise(over, 'has', 'have')} no place in a Hugging Face folder of family "
            f"{family.name!r}{advice}"
        )
    if missing := sorted(set(bound) - set(request.schema)):
        raise ConversionError(f"{request.path}: {summarise(missing, 'is', 'are')} missing from the source")
    return bound


def _foreign_tensors(schema: Mapping[str, LogicalTensor], rules: Mapping[str, Rule]) -> dict[str, LogicalTensor]:
    """Every tensor of the folder by its name there, after proof that the logical tensors fill it exactly once."""
    found: dict[str, LogicalTensor] = {}
    filled: dict[str, list[Box]] = {}
    for name, rule in rules.items():
        tensor = LogicalTensor(rule.foreign, rule.foreign_shape(schema[name].shape), schema[name].dtype)
        other = found.setdefault(rule.foreign, tensor)
        if other != tensor:
            raise ConversionError(
                f"{name!r} is {tensor.dtype} {list(tensor.shape)} as part of {rule.foreign!r}, which is {other.dtype} "
                f"{list(other.shape)}; give all weights one type with --dtype"
            )
        filled.setdefault(rule.foreign, []).extend(origins(rule.view, Box.whole(schema[name].shape)))
    for name, tensor in found.items():
        fault = coverage_fault(tensor.shape, filled[name])
        assert fault is None, f"the family's rules do not fill {name}: {fault}"
    return found


def _deal_out(tensors: Mapping[str, LogicalTensor], max_bytes: int) -> dict[str, FileLayout]:
    """Files of at most `max_bytes` (or one tensor), filled in network order; named as save_pretrained names them."""
    groups: list[list[LogicalTensor]] = [[]]
    filled = 0
    for tensor in tensors.values():
        num_bytes = tensor.numel * ITEM_BYTES[tensor.dtype]
        if groups[-1] and filled + num_bytes > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += num_bytes
    count = len(groups)
    names = [WEIGHTS] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    return {
        name: lay_out([(t.name, t.dtype, t.shape) for t in group], _FORMAT_METADATA)
        for name, group in zip(names, groups, strict=True)
    }


def _main_dtype(tensors: Mapping[str, LogicalTensor]) -> str:
    """The element type of most elements."""
    counts: dict[str, int] = {}
    for tensor in tensors.values():
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel
    return max(counts, key=lambda dtype: counts[dtype])


def _generation_config(request: WriteRequest) -> dict[str, Any]:
    model = request.model
    tokens = {
        "bos_token_id": model.bos_token_id,
        "eos_token_id": model.eos_token_id,
        "pad_token_id": model.pad_token_id,
    }
    return {"_from_model_config": True, **{key: value for key, value in tokens.items() if value is not None}}


def _json_text(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _digest(array: np.ndarray) -> str:
    import numpy as np
    from xxhash import xxh3_128_hexdigest

    return xxh3_128_hexdigest(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
