"""Where the tensors of a Hugging Face folder lie: safetensors, or the pickles of older releases. NumPy, no torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from converters.formats._ranges import TensorReader
from converters.untrusted.paths import file_inside
from converters.untrusted.plain import Allowed
from converters.untrusted.torch_file import TORCH, StridedTensor, read_torch
from workbench.checkpoint.safetensors_io import FileEntry, read_header
from workbench.errors import CheckpointError
from workbench.spec.geometry import Box, LogicalTensor

if TYPE_CHECKING:
    import numpy as np

CONFIG: Final = "config.json"
WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
_PICKLE: Final = "pytorch_model.bin"
_PICKLE_INDEX: Final = "pytorch_model.bin.index.json"
_MAX_JSON_BYTES: Final = 1 << 28
_STATE_DICT: Final = Allowed(TORCH)

Place = TypeVar("Place")


class BoxReader(Protocol):
    """Tensors in files, by the names that the files give them."""

    def read(self, name: str, box: Box) -> np.ndarray: ...

    def close(self) -> None: ...


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; CheckpointError when there is none."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: has {path.stat().st_size} bytes (at most {_MAX_JSON_BYTES})")
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


def open_weights(folder: Path) -> tuple[Mapping[str, LogicalTensor], BoxReader]:
    """Every tensor of the folder by its name there, and what reads them.

    CheckpointError when files are missing or contradict their index.
    """
    if (folder / INDEX).is_file():
        return _safetensors(folder, _by_index(folder, INDEX, lambda path: read_header(path).entries))
    if (folder / WEIGHTS).is_file():
        path = file_inside(folder, WEIGHTS, CONFIG)
        return _safetensors(folder, {key: (WEIGHTS, entry) for key, entry in read_header(path).entries.items()})
    if (folder / _PICKLE_INDEX).is_file():
        indexed = _by_index(folder, _PICKLE_INDEX, read_state_dict)
        return _strided({key: place for key, (_, place) in indexed.items()})
    if (folder / _PICKLE).is_file():
        return _strided(read_state_dict(file_inside(folder, _PICKLE, CONFIG)))
    raise CheckpointError(f"{folder}: has neither {WEIGHTS} nor {INDEX} nor {_PICKLE}; is the download complete?")


def read_state_dict(path: Path) -> dict[str, StridedTensor]:
    """The tensors of a state dictionary that torch.save stored; CheckpointError when it holds anything else."""
    found = read_torch(path, allowed=_STATE_DICT)
    if type(found) is not dict:
        raise CheckpointError(f"{path}: holds {type(found).__name__}, not tensors by name")
    for name, value in found.items():
        if type(name) is not str or type(value) is not StridedTensor:
            raise CheckpointError(f"{path}: holds {type(value).__name__} {str(name)[:200]!r}, not a tensor with a name")
    return found


def _safetensors(folder: Path, entries: Mapping[str, tuple[str, FileEntry]]) -> tuple[dict[str, LogicalTensor], Any]:
    tensors = {key: LogicalTensor(key, entry.shape, entry.dtype) for key, (_, entry) in entries.items()}
    return tensors, TensorReader(folder, entries)


def _strided(places: Mapping[str, StridedTensor]) -> tuple[dict[str, LogicalTensor], Any]:
    return {key: LogicalTensor(key, place.shape, place.dtype) for key, place in places.items()}, StridedReader(places)


class StridedReader:
    """Tensors that lie in strided places (`BoxReader`)."""

    def __init__(self, places: Mapping[str, StridedTensor]) -> None:
        self._places = places

    def read(self, name: str, box: Box) -> np.ndarray:
        """A fresh array of a box; the mapping that it is read through ends with it."""
        return self._places[name].read(box)

    def close(self) -> None:
        """Nothing is kept open."""


def _by_index(
    folder: Path, index_name: str, read: Callable[[Path], Mapping[str, Place]]
) -> dict[str, tuple[str, Place]]:
    index = folder / index_name
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise CheckpointError(f"{index}: has no weight_map from tensor names to files")
    files = sorted(set(places.values()))
    strange = [file for file in files if file in ("", ".", "..") or "/" in file or "\\" in file or "\0" in file]
    if absent := [file for file in files if not strange and not (folder / file).is_file()]:
        raise CheckpointError(
            f"{folder}: {', '.join(absent)} missing, named in {index_name}; is the download complete?"
        )
    found: dict[str, tuple[str, Place]] = {}
    for file in strange or files:
        path = file_inside(folder, file, index_name)
        for key, place in read(path).items():
            if places.get(key) != file:
                raise CheckpointError(f"{path}: holds {key!r}, which {index_name} places in {places.get(key)}")
            found[key] = (file, place)
    if lost := sorted(set(places) - set(found)):
        raise CheckpointError(f"{folder / places[lost[0]]}: lacks {lost[0]!r}, which {index_name} places there")
    return found
