"""The manifest of a native checkpoint: what it holds, where each box lies, and how to know that it is intact. No torch.

`docs/checkpoint-format.md` is the specification; this module writes and reads it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, NoReturn

from xxhash import xxh3_64_hexdigest

from workbench.checkpoint.bounded_json import parse_json
from workbench.checkpoint.safetensors_io import MAX_DIMS, is_shape
from workbench.errors import CheckpointError
from workbench.spec.dtypes import ITEM_BYTES
from workbench.spec.geometry import Box, LogicalTensor, coverage_fault
from workbench.spec.layout import ParallelLayout
from workbench.spec.lora import AdapterRecord
from workbench.spec.model import ModelConfig

MANIFEST: Final = "manifest.json"
TOKENIZER: Final = "tokenizer"
FORMAT_NAME: Final = "workbench-checkpoint"
VERSION: Final = 2  # 1 had other fingerprints: they are left out, as if none had been recorded
_CHECKSUM = re.compile(rb'"manifest_checksum": "([0-9a-f]{16})"')
_NO_CHECKSUM: Final = b'"manifest_checksum": "0000000000000000"'


@dataclass(frozen=True, slots=True)
class StoredBox:
    """One box of a logical tensor and the bytes that hold it; `start` counts from the first byte of the file."""

    box: Box
    file: str
    start: int
    num_bytes: int
    checksum: str


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A logical tensor of a checkpoint, and the boxes in which it lies."""

    tensor: LogicalTensor
    fingerprint: str
    boxes: tuple[StoredBox, ...]


@dataclass(frozen=True)
class TrainingState:
    """Where a run stood: enough, with weights and moments, to go on as if it had never stopped.

    samples, tokens: consumed since the start. The mappings hold JSON values that belong to the scheduler, the
    optimizer (kind and its step) and the data (position of the sampler).
    """

    step: int
    samples: int = 0
    tokens: int = 0
    seed: int = 0
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """All that a checkpoint says of itself.

    files: size in bytes by name. lineage: what it came from, oldest first. tokenizer: xxh3-64 of each file in
    `tokenizer/`, by name. adapter: set when the tensors are an adapter to the weights of another checkpoint.
    """

    model: ModelConfig
    layout: ParallelLayout
    tensors: Mapping[str, StoredTensor]
    files: Mapping[str, int]
    training: TrainingState | None = None
    lineage: tuple[Mapping[str, Any], ...] = ()
    tokenizer: Mapping[str, str] = field(default_factory=dict)
    adapter: AdapterRecord | None = None

    def to_bytes(self) -> bytes:
        """The text of manifest.json, a line for each tensor, with its own checksum filled in."""
        head: dict[str, Any] = {
            "model": self.model.model_dump(mode="json", exclude_defaults=False),
            "layout": self.layout.model_dump(mode="json"),
            "training": None if self.training is None else training_to_json(self.training),
            "lineage": [dict(parent) for parent in self.lineage],
            "tokenizer": dict(self.tokenizer),
            "adapter": None if self.adapter is None else self.adapter.model_dump(mode="json"),
            "files": dict(self.files),
        }
        lines = [f'{{"format": "{FORMAT_NAME}", "version": {VERSION},', _NO_CHECKSUM.decode() + ","]
        lines += [f"{json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
        lines.append('"tensors": {')
        tensors = [f"{json.dumps(name)}: {json.dumps(_tensor_to_json(t))}" for name, t in self.tensors.items()]
        text = "\n".join([*lines, ",\n".join(tensors), "}}", ""]).encode()
        checksum = xxh3_64_hexdigest(text).encode()
        return text.replace(_NO_CHECKSUM, b'"manifest_checksum": "' + checksum + b'"', 1)


def training_to_json(state: TrainingState) -> dict[str, Any]:
    """A training state as JSON values."""
    names = ("step", "samples", "tokens", "seed", "scheduler", "optimizer", "data")
    return {name: value if isinstance(value := getattr(state, name), int) else dict(value) for name in names}


def training_from_json(raw: Mapping[str, Any], path: Path) -> TrainingState:
    """The training state that `training_to_json` wrote, found in the file at `path`; CheckpointError when damaged."""
    try:
        return _Parser(path).training(raw)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: is not a training state: {type(error).__name__} {error}") from error


def _tensor_to_json(stored: StoredTensor) -> dict[str, Any]:
    boxes = [[list(b.box.offset), list(b.box.size), b.file, b.start, b.num_bytes, b.checksum] for b in stored.boxes]
    return {
        "dtype": stored.tensor.dtype,
        "shape": list(stored.tensor.shape),
        "fingerprint": stored.fingerprint,
        "boxes": boxes,
    }


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder; CheckpointError says what kind of folder it is when it has none."""
    path = folder / MANIFEST
    if folder.name.endswith(".partial"):  # even with a manifest: its writer died before the rename
        raise CheckpointError(_why_no_manifest(folder))
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path}: is no regular file")
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(_why_no_manifest(folder)) from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    return _Parser(path).manifest(text)


def is_native(folder: Path) -> bool:
    """Whether a folder holds a manifest of this format, of any version."""
    try:
        if not (folder / MANIFEST).is_file():  # a pipe would be waited for
            return False
        with (folder / MANIFEST).open("rb") as file:
            return f'"format": "{FORMAT_NAME}"'.encode() in file.read(200)
    except OSError:
        return False


def _why_no_manifest(folder: Path) -> str:
    partial = folder.with_name(folder.name + ".partial")
    if folder.name.endswith(".partial") and folder.is_dir():
        return f"{folder}: an unfinished checkpoint: its save was interrupted; use the checkpoint before it"
    if not folder.exists():
        if partial.is_dir():
            return f"{folder}: only the unfinished {partial.name} is there: its save was interrupted; use an older one"
        return f"{folder}: no such checkpoint"
    if not folder.is_dir():
        return f"{folder}: a file, not a checkpoint folder"
    return f"{folder}: has no {MANIFEST}: not a native checkpoint, or one that was never finished"


class _Parser:
    """Turns untrusted JSON into a Manifest; every refusal names the file and the value."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def refuse(self, why: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: {why}")

    def manifest(self, text: bytes) -> Manifest:
        raw = self._document(text)
        try:
            files = {self._file_name(name): self._size(size) for name, size in raw["files"].items()}
            tensors = {name: self._tensor(name, value, files) for name, value in raw["tensors"].items()}
            if raw["version"] < 2:
                tensors = {name: replace(stored, fingerprint="") for name, stored in tensors.items()}
            training = None if raw["training"] is None else self.training(raw["training"])
            return Manifest(
                model=ModelConfig.model_validate(raw["model"]),
                layout=ParallelLayout.model_validate(raw["layout"]),
                tensors=tensors,
                files=files,
                training=training,
                lineage=tuple(raw["lineage"]),
                tokenizer={self._file_name(name): str(value) for name, value in raw["tokenizer"].items()},
                adapter=None if raw["adapter"] is None else AdapterRecord.model_validate(raw["adapter"]),
            )
        except KeyError as error:
            self.refuse(f"the key {error} is missing; the manifest is damaged")
        except (AttributeError, TypeError, ValueError) as error:
            self.refuse(f"the manifest is damaged: {error}")

    def _document(self, text: bytes) -> dict[str, Any]:
        try:
            raw = parse_json(text)
        except ValueError as error:
            self.refuse(f"not valid JSON ({error}); the manifest is damaged")
        if not isinstance(raw, dict) or raw.get("format") != FORMAT_NAME:
            found = raw.get("format") if isinstance(raw, dict) else type(raw).__name__
            self.refuse(f"format {found!r} is not {FORMAT_NAME!r}; not a native checkpoint")
        version = raw.get("version")
        if type(version) is not int or version < 1:
            self.refuse(f"version {version!r} is not a version number; the manifest is damaged")
        if version > VERSION:
            self.refuse(f"format version {version}, but this program reads up to version {VERSION}; update workbench")
        written = _CHECKSUM.search(text)
        if written is None:
            self.refuse("it has no manifest_checksum; the manifest is damaged")
        found = xxh3_64_hexdigest(text.replace(written.group(0), _NO_CHECKSUM, 1))
        if found != written.group(1).decode():
            self.refuse(
                f"manifest_checksum is {written.group(1).decode()}, its text has {found}; the manifest is damaged"
            )
        return raw

    def _file_name(self, name: str) -> str:
        if not name or "/" in name or "\\" in name or "\0" in name or name in (".", ".."):
            self.refuse(f"file name {name!r} leaves the folder")
        return name

    def _size(self, value: Any) -> int:
        if type(value) is not int or not 0 <= value < 1 << 62:
            self.refuse(f"{value!r} is not a size")
        return value

    def _sizes(self, values: Any) -> tuple[int, ...]:
        if not isinstance(values, list) or len(values) > MAX_DIMS:
            self.refuse(f"{str(values)[:200]} is not a list of sizes")
        return tuple(self._size(value) for value in values)

    def _tensor(self, name: str, raw: dict[str, Any], files: Mapping[str, int]) -> StoredTensor:
        if not is_shape(raw["shape"]):
            self.refuse(f"tensor {name!r}: shape {str(raw['shape'])[:200]} is not a list of sizes")
        tensor = LogicalTensor(name, tuple(raw["shape"]), raw["dtype"])
        if tensor.dtype not in ITEM_BYTES:
            self.refuse(f"tensor {name!r}: dtype {tensor.dtype!r} is not known")
        boxes = tuple(self._box(tensor, value, files) for value in raw["boxes"])
        if fault := coverage_fault(tensor.shape, [b.box for b in boxes]):
            self.refuse(f"tensor {name!r}: {fault}; the manifest is damaged")
        return StoredTensor(tensor, str(raw["fingerprint"]), boxes)

    def _box(self, tensor: LogicalTensor, raw: Sequence[Any], files: Mapping[str, int]) -> StoredBox:
        offset, size, file, start, num_bytes, checksum = raw
        box = Box(self._sizes(offset), self._sizes(size))
        rank = len(tensor.shape)
        if len(box.offset) != rank or len(box.size) != rank:
            self.refuse(f"tensor {tensor.name!r}: a box of {len(box.size)} dimensions in a tensor of {rank}")
        if file not in files:
            self.refuse(f"tensor {tensor.name!r}: lies in {file!r}, which is not among the files")
        expected = box.numel * ITEM_BYTES[tensor.dtype]
        if self._size(num_bytes) != expected:
            self.refuse(f"tensor {tensor.name!r}: {num_bytes} bytes for a box of {expected}")
        if self._size(start) + num_bytes > files[file]:
            self.refuse(f"tensor {tensor.name!r}: ends after the {files[file]} bytes of {file}")
        return StoredBox(box, file, start, num_bytes, str(checksum))

    def training(self, raw: Mapping[str, Any]) -> TrainingState:
        step, samples, tokens = (self._size(raw[name]) for name in ("step", "samples", "tokens"))
        scheduler, optimizer, data = (dict(raw[name]) for name in ("scheduler", "optimizer", "data"))
        if "step" in optimizer:
            self._size(optimizer["step"])
        if type(raw["seed"]) is not int:
            self.refuse(f"seed {raw['seed']!r} is not a whole number")
        return TrainingState(step, samples, tokens, raw["seed"], scheduler, optimizer, data)
