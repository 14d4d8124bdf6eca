"""The weights of a PEFT folder as logical tensors, and back. Adapters are small: held in memory. NumPy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from converters.family import Family
from converters.formats._peft_table import HEAD, PREFIX, WEIGHTS, PeftModule, peft_modules
from converters.names import summarise
from workbench.checkpoint.safetensors_io import RangedFile, read_header
from workbench.errors import CheckpointError, ConversionError
from workbench.spec.dtypes import NUMPY_NAMES
from workbench.spec.geometry import Box, LogicalTensor
from workbench.spec.lora import LoraSpec, adapter_tensors, factor_names, projections
from workbench.spec.model import ModelConfig

Arrays = dict[str, tuple[str, np.ndarray]]
"""dtype and elements, by name."""

SCORE = f"{HEAD}.weight"


class ArraySource:
    """Logical tensors that are in memory (`TensorSource`)."""

    def __init__(self, arrays: Arrays) -> None:
        self._arrays = arrays
        self._schema = {name: LogicalTensor(name, array.shape, dtype) for name, (dtype, array) in arrays.items()}

    @property
    def schema(self) -> Mapping[str, LogicalTensor]:
        return self._schema

    def chunks(self, name: str) -> tuple[Box, ...]:
        return (Box.whole(self._schema[name].shape),)

    def read(self, name: str, box: Box) -> np.ndarray:
        return self._arrays[name][1][box.slices]


def read_file(folder: Path) -> tuple[Mapping[str, str], Arrays]:
    """The metadata and every tensor of adapter_model.safetensors; CheckpointError when it is missing or damaged."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing; only safetensors are read, so save the adapter again with a new peft"
        )
    file = RangedFile(path)
    found: Arrays = {}
    header = read_header(path)
    for key, entry in header.entries.items():
        if entry.dtype not in NUMPY_NAMES:
            raise CheckpointError(f"{path}: tensor {key!r} has dtype {entry.dtype}, which is not supported")
        array = np.empty(entry.shape, NUMPY_NAMES[entry.dtype])
        file.read_into(array, entry.start)
        found[key] = (entry.dtype, array)
    file.close()
    return header.metadata, found


def file_targets(file: Arrays, family: Family, model: ModelConfig, where: str) -> tuple[str, ...]:
    """The projections that the tensors of a file adapt, in network order; ConversionError when there is none."""
    known = peft_modules(family, model, LoraSpec(targets="all"))
    found = {weight.split(".")[-2] for m in known if m.keys[0] in file for weight, _ in m.parts}
    if not found:
        some = next(iter(file), "nothing")
        raise ConversionError(
            f"{where}: adapts no projection of family {family.name!r}; it holds {some!r}, and names must begin with "
            f"{PREFIX!r}"
        )
    return tuple(name for name in projections(model) if name in found)


def to_logical(file: Arrays, family: Family, model: ModelConfig, lora: LoraSpec, where: str) -> Arrays:
    """The logical tensors of a file's; ConversionError for a name or a shape that has no place, or is missing."""
    found: Arrays = {}
    left = dict(file)
    faults: list[str] = []
    missing: list[str] = []
    for module in peft_modules(family, model, lora):
        if any(key not in left for key in module.keys):
            missing += [key for key in module.keys if key not in left]
            continue
        a, b = (left.pop(key) for key in module.keys)
        try:
            found |= _pairs(module, a, b, lora.r)
        except ConversionError as error:
            faults.append(str(error))
    if model.num_labels:
        head = left.pop(f"{PREFIX}{SCORE}", None)
        if head is None:
            missing.append(f"{PREFIX}{SCORE}")
        else:
            found[SCORE] = head
    if missing:
        faults.append(f"{summarise(missing, 'is', 'are')} missing")
    if left:
        faults.append(f"{summarise(left, 'has', 'have')} no place")
    if faults:
        raise ConversionError(f"{where}: {'; '.join(faults[:8])}")
    return {name: found[name] for name in adapter_tensors(model, lora, "F32")}


def _pairs(module: PeftModule, a: tuple[str, np.ndarray], b: tuple[str, np.ndarray], r: int) -> Arrays:
    """Our pairs of one adapter: unstacked where it was stacked, else with A repeated for each projection."""
    rank = a[1].shape[0]
    if a[1].shape != (rank, module.inputs) or b[1].shape != (module.outputs, rank):
        raise ConversionError(
            f"{module.path}: A {list(a[1].shape)} and B {list(b[1].shape)} do not fit a module of {module.inputs} "
            f"inputs and {module.outputs} outputs"
        )
    found: Arrays = {}
    if rank == r:
        for weight, rows in module.parts:
            a_name, b_name = factor_names(weight)
            found[a_name], found[b_name] = a, (b[0], b[1][rows])
        return found
    blocks = np.zeros_like(b[1])
    for index, (weight, rows) in enumerate(module.parts[: rank // r]):
        a_name, b_name = factor_names(weight)
        ranks = slice(index * r, (index + 1) * r)
        found[a_name], found[b_name] = (a[0], a[1][ranks]), (b[0], b[1][rows, ranks])
        blocks[rows, ranks] = b[1][rows, ranks]
    if rank != r * len(module.parts) or not np.array_equal(blocks, b[1]):
        raise ConversionError(f"{module.path}: has rank {rank}, the others {r}; adapters here have one rank")
    return found


def to_file(logical: Arrays, modules: Sequence[PeftModule]) -> Arrays:
    """The tensors of adapter_model.safetensors, by name."""
    found: Arrays = {}
    for module in modules:
        pairs = [tuple(logical[name] for name in factor_names(weight)) for weight, _ in module.parts]
        a_key, b_key = module.keys
        dtype = pairs[0][0][0]
        a = np.concatenate([a for (_, a), _ in pairs])
        b = np.zeros((module.outputs, len(a)), a.dtype)
        for index, ((_, rows), (_, (_, block))) in enumerate(zip(module.parts, pairs, strict=True)):
            ranks = block.shape[1]
            b[rows, index * ranks : (index + 1) * ranks] = block
        found[a_key], found[b_key] = (dtype, a), (dtype, b)
    if SCORE in logical:
        found[f"{PREFIX}{SCORE}"] = logical[SCORE]
    return found
