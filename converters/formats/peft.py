"""PEFT folders: adapter_config.json and adapter_model.safetensors, as peft writes and loads them. NumPy only."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from os.path import isdir
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from converters.cast import as_float32
from converters.claim import Claim
from converters.family import Family, family_for, family_named
from converters.format import OpenedCheckpoint, Progress, WriteRequest
from converters.formats._huggingface_files import read_json
from converters.formats._peft_card import adapter_card
from converters.formats._peft_config import RECORDED, spec_of
from converters.formats._peft_source import Arrays, read_file, to_file, to_logical
from converters.formats._peft_table import CONFIG, PREFIX, WEIGHTS, adapter_config, judging_keys, peft_modules
from converters.rules import Rule
from workbench.checkpoint.safetensors_io import lay_out
from workbench.checkpoint.store import CHECKPOINTS
from workbench.checkpoint.writer import publish
from workbench.errors import CheckpointError, ConversionError, VerificationError
from workbench.spec.dtypes import ITEM_BYTES, NUMPY_NAMES
from workbench.spec.geometry import Box, LogicalTensor
from workbench.spec.lora import AdapterRecord, held_as, merged_model
from workbench.tokenizer import tokenizer_files

if TYPE_CHECKING:
    from workbench.checkpoint.source import TensorSource

_HEADS = ("score", "classifier")
_BASE_WEIGHT = ".base_layer.weight"


@dataclass(frozen=True)
class PeftFormat:
    """What `PeftModel.from_pretrained` reads and `save_pretrained` writes, for LoRA."""

    name: str = "peft"

    def recognises(self, path: Path) -> bool:
        """Whether `path` is a folder with an adapter's configuration."""
        return (path / CONFIG).is_file()

    def open(self, path: Path, *, family: str | None = None, vocab_size: int | None = None) -> OpenedCheckpoint:
        """The adapter, when the model that it belongs to lies where its configuration says."""
        from converters.open import open_as_it_is

        base = base_path(path)
        if base is None:
            named = read_json(path / CONFIG).get("base_model_name_or_path")
            raise CheckpointError(
                f"{path}: is an adapter to {named!r}, which is not on this machine under that name; say where it is "
                "with --base"
            )
        if self.recognises(base):
            raise CheckpointError(f"{path}: its base {base} is an adapter itself; merge that with `wb merge` first")
        return open_peft(path, open_as_it_is(base, family=family, vocab_size=vocab_size))

    def destination(self, request: WriteRequest) -> PeftDestination:
        """A folder to be written; ConversionError when the request is no adapter or no family can hold its model."""
        if request.adapter is None:
            raise ConversionError(
                f"{request.path}: the source is a whole model, and a PEFT folder holds an adapter; export it --to hf"
            )
        family = family_named(request.family) if request.family else family_for(request.model)
        return PeftDestination(request, request.adapter, family)


def base_path(path: Path) -> Path | None:
    """Where the model of a PEFT folder lies on this machine: as its configuration says, from here or beside it."""
    named = read_json(path / CONFIG).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        return None
    return next((p for p in (Path(named), path / named, path.parent / named) if isdir(p) and p != path), None)


def open_peft(path: Path, base: OpenedCheckpoint) -> OpenedCheckpoint:
    """The adapter at `path` to the model `base`; ConversionError for what cannot be said here, or is missing."""
    metadata, arrays = read_file(path)
    family = family_named(base.family) if base.family else family_for(base.model)
    heads = (arrays.get(f"{PREFIX}{name}.weight") for name in _HEADS)
    labels = next((len(head[1]) for head in heads if head is not None and head[1].ndim), base.model.num_labels)
    model = base.model.with_labels(labels) if labels != base.model.num_labels else base.model
    lora = spec_of(read_json(path / CONFIG), metadata.get(RECORDED), arrays, family, model, str(path))
    arrays = _without_base(arrays, family.bind(merged_model(model, lora)), base, path)
    source, unplaced = to_logical(arrays, family, model, lora, str(path / WEIGHTS))
    return OpenedCheckpoint(
        format=FORMAT.name,
        path=path,
        source=source,
        model=model,
        tokenizer=path if (path / "tokenizer.json").is_file() else base.tokenizer,
        family=family.name,
        lineage=base.lineage,
        info={"base": str(base.path), "r": str(lora.r), "alpha": f"{lora.alpha:g}", "targets": ", ".join(lora.targets)},
        adapter=AdapterRecord(lora=lora, base=str(base.path), base_fingerprint=""),
        unplaced=unplaced,
    )


def _without_base(arrays: Arrays, rules: Mapping[str, Rule], base: OpenedCheckpoint, path: Path) -> Arrays:
    """The tensors but for weights of the base that peft saves with an adapted embedding or head; they must be those of
    the base, or the adapter is not to it. rules: of the model that the adapter makes."""
    kept = {key: array for key, array in arrays.items() if not key.endswith(_BASE_WEIGHT)}
    names = {
        f"{PREFIX}{rule.foreign}": held_as(name, base.source.schema) for name, rule in rules.items() if not rule.view
    }
    for key in arrays.keys() - kept.keys():
        name, (dtype, array) = names.get(key.removesuffix(_BASE_WEIGHT) + ".weight", ""), arrays[key]
        held = base.source.schema.get(name)
        if held is None or held.shape != array.shape:
            raise ConversionError(f"{path / WEIGHTS}: {key!r} is not a weight of {base.path}")
        whole = as_float32(base.source.read(name, Box.whole(held.shape)), held.dtype)
        if not np.array_equal(whole, as_float32(array, dtype)):
            raise ConversionError(f"{path / WEIGHTS}: {key!r} holds other values than {name!r} of {base.path}")
    return kept


class PeftDestination:
    """See `converters.format.Destination`. The tensors are gathered in memory and written when all are there."""

    def __init__(self, request: WriteRequest, adapter: AdapterRecord, family: Family) -> None:
        self._request, self._adapter, self._family = request, adapter, family
        self._modules = peft_modules(family, request.model, adapter.lora)
        self._judging = judging_keys(family, request.model)
        config = adapter_config(family, request.model, adapter.lora, base=base_name(request))
        self._texts = {
            CONFIG: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
            "README.md": adapter_card(request, config).encode(),
        }
        self._arrays: Arrays = {
            name: (tensor.dtype, np.zeros(tensor.shape, NUMPY_NAMES[tensor.dtype]))
            for name, tensor in request.schema.items()
        }
        self._claim = Claim(request.path)
        self._partial = self._claim.folder

    @property
    def path(self) -> Path:
        return self._request.path

    @property
    def schema(self) -> Mapping[str, LogicalTensor]:
        return self._request.schema

    @property
    def files(self) -> Mapping[str, int]:
        return {WEIGHTS: sum(tensor.numel * ITEM_BYTES[tensor.dtype] for tensor in self.schema.values())}

    def boxes(self, name: str) -> tuple[tuple[str, Box], ...]:
        return ((WEIGHTS, Box.whole(self.schema[name].shape)),)

    def sweep(self, name: str) -> int:
        return 0

    @property
    def in_order(self) -> bool:
        return True

    def begin(self, *, resume: bool = False) -> None:
        """Makes the unfinished folder. What has been written elsewhere is never there: all is written at the end."""
        self._claim.take()

    def write(self, name: str, box: Box, array: np.ndarray) -> None:
        self._arrays[name][1][box.slices] = array

    def receipt(self, name: str, part: Box) -> None:
        return None

    def restore(self, name: str, part: Box, receipt: None) -> bool:
        return False

    def check(self, progress: Progress) -> None:
        """Writes the folder, reads it back and compares every element."""
        self._flush()
        try:
            found = self.reopen()
        except ConversionError as error:
            raise VerificationError(f"what was written is not the adapter: {error}") from error
        for name, (_, array) in self._arrays.items():
            if not np.array_equal(_bits(found.read(name, Box.whole(array.shape))), _bits(array)):
                raise VerificationError(f"{self._partial / WEIGHTS}: {name!r} reads back other than written")
            progress(array.nbytes)

    def reopen(self) -> TensorSource:
        """The unfinished folder as a source."""
        self._flush()
        lora, model = self._adapter.lora, self._request.model
        source, _ = to_logical(read_file(self._partial)[1], self._family, model, lora, str(self._partial))
        return source

    def commit(self, fingerprints: Mapping[str, str]) -> Path:
        """Renames the folder into place, once everything is on disk."""
        self._flush()
        publish(self._partial, self.path)
        self._claim.release()
        return self.path

    def abort(self, *, keep: bool = False) -> None:
        self._claim.give_up()

    def _flush(self) -> None:
        """Writes every file, once."""
        if (self._partial / WEIGHTS).exists():
            return
        tensors = to_file(self._arrays, self._modules, self._judging)
        layout = lay_out(
            [(key, dtype, array.shape) for key, (dtype, array) in tensors.items()],
            {"format": "pt", RECORDED: self._adapter.lora.model_dump_json()},
        )
        with (self._partial / WEIGHTS).open("xb") as file:
            file.write(layout.prefix)
            for key, entry in layout.entries.items():
                file.seek(entry.start)
                file.write(np.ascontiguousarray(tensors[key][1]).data)
            file.flush()
            os.fsync(file.fileno())
        for name, text in self._texts.items():
            (self._partial / name).write_bytes(text)
        for path in tokenizer_files(self._request.tokenizer):
            (self._partial / path.name).write_bytes(path.read_bytes())


def base_name(request: WriteRequest) -> str:
    """What to call the base: the name of the Hugging Face folder that it came from, else its own; never a path."""
    names = [str(entry["name"]) for entry in request.lineage if entry.get("kind") == "import" and entry.get("name")]
    if names or request.adapter is None:
        return names[-1] if names else ""
    path = Path(request.adapter.base)
    return path.parent.parent.name if path.parent.name == CHECKPOINTS else path.name


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint8)


FORMAT = PeftFormat()
