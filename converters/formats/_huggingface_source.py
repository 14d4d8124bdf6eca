"""The weights of a Hugging Face folder as a tensor source. NumPy, no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from converters.family import Family
from converters.formats._ranges import TensorReader
from converters.matching import Match, match
from converters.rules import pull
from workbench.checkpoint.safetensors_io import FileEntry, read_header
from workbench.errors import CheckpointError, ConversionError
from workbench.spec.dtypes import NUMPY_NAMES
from workbench.spec.geometry import Box, LogicalTensor
from workbench.spec.model import ModelConfig

if TYPE_CHECKING:
    import numpy as np

CONFIG: Final = "config.json"
WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
_PICKLES: Final = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_COMPARE_ROWS: Final = 1024


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; CheckpointError when there is none."""
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: holds {type(document).__name__}, not an object")
    return document


def find_weights(folder: Path) -> dict[str, tuple[str, FileEntry]]:
    """File and place of every tensor in the folder; CheckpointError when files are missing or the index is wrong."""
    if (folder / INDEX).is_file():
        return _by_index(folder)
    if (folder / WEIGHTS).is_file():
        return {key: (WEIGHTS, entry) for key, entry in read_header(folder / WEIGHTS).entries.items()}
    if pickles := [name for name in _PICKLES if (folder / name).is_file()]:
        raise CheckpointError(
            f"{folder / pickles[0]}: a pickle, which may run code when it is loaded, is not read; convert it first: "
            "AutoModel.from_pretrained(...).save_pretrained(...) of transformers writes model.safetensors"
        )
    raise CheckpointError(f"{folder}: has neither {WEIGHTS} nor {INDEX}; is the download complete?")


def _by_index(folder: Path) -> dict[str, tuple[str, FileEntry]]:
    index = folder / INDEX
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise CheckpointError(f"{index}: has no weight_map from tensor names to files")
    files = sorted(set(places.values()))
    if strange := [f for f in files if Path(f).name != f or "\\" in f or f in ("", ".", "..")]:
        raise CheckpointError(f"{index}: names {strange[0]!r}, which is not a file of this folder")
    if absent := [file for file in files if not (folder / file).is_file()]:
        raise CheckpointError(f"{folder}: {', '.join(absent)} missing, named in {INDEX}; is the download complete?")
    found: dict[str, tuple[str, FileEntry]] = {}
    for file in files:
        for key, entry in read_header(folder / file).entries.items():
            if places.get(key) != file:
                raise CheckpointError(f"{folder / file}: holds {key!r}, which {INDEX} places in {places.get(key)}")
            found[key] = (file, entry)
    if lost := sorted(set(places) - set(found)):
        raise CheckpointError(f"{folder / places[lost[0]]}: lacks {lost[0]!r}, which {INDEX} places there")
    return found


class HuggingFaceSource:
    """A Hugging Face folder seen as logical tensors (`TensorSource`)."""

    def __init__(self, folder: Path, family: Family, model: ModelConfig) -> None:
        entries = find_weights(folder)
        if strange := sorted({e.dtype for _, e in entries.values()} - NUMPY_NAMES.keys()):
            raise ConversionError(
                f"{folder}: holds tensors of type {', '.join(strange)}: quantized weights are not read"
            )
        foreign = {key: LogicalTensor(key, entry.shape, entry.dtype) for key, (_, entry) in entries.items()}
        self.match: Match = match(family, model, foreign, str(folder))
        self._reader = TensorReader(folder, entries)
        for name, other in self.match.repeated:
            self._compare(folder, foreign[name], foreign[other])

    def _compare(self, folder: Path, tensor: LogicalTensor, other: LogicalTensor) -> None:
        """Raises CheckpointError unless the two tensors are equal bit for bit."""
        equal = (tensor.shape, tensor.dtype) == (other.shape, other.dtype)
        for row in range(0, tensor.shape[0] if equal else 0, _COMPARE_ROWS):
            rows = min(_COMPARE_ROWS, tensor.shape[0] - row)
            box = Box((row, *(0 for _ in tensor.shape[1:])), (rows, *tensor.shape[1:]))
            if self._reader.read(tensor.name, box).tobytes() != self._reader.read(other.name, box).tobytes():
                equal = False
                break
        if not equal:
            raise CheckpointError(
                f"{folder}: {tensor.name!r} differs from {other.name!r}, but {CONFIG} says tie_word_embeddings=true; "
                "one of them is wrong: set tie_word_embeddings=false to keep both"
            )

    @property
    def schema(self) -> Mapping[str, LogicalTensor]:
        """Every logical tensor by name."""
        return self.match.schema

    def chunks(self, name: str) -> tuple[Box, ...]:
        """The whole tensor: a foreign tensor lies in one file."""
        return (Box.whole(self.match.schema[name].shape),)

    def read(self, name: str, box: Box) -> np.ndarray:
        """The elements of `box` in storage dtype; may be a view."""
        foreign, rule = self.match.places[name]
        return pull(rule.view, box, lambda part: self._reader.read(foreign, part))

    def close(self) -> None:
        """Gives the files back."""
        self._reader.close()
