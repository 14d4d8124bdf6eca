"""The weights of a PEFT folder as logical tensors, and back. Adapters are small: held in memory. NumPy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from converters.family import Family
from converters.formats._peft_table import (
    PREFIX,
    WEIGHTS,
    PeftModule,
    has_experts_one_by_one,
    judging_keys,
    peft_modules,
    weight_rules,
)
from converters.names import summarise
from converters.rules import Rule
from workbench.checkpoint.safetensors_io import RangedFile, read_header
from workbench.errors import CheckpointError, ConversionError
from workbench.spec.dtypes import NUMPY_NAMES
from workbench.spec.geometry import Box, LogicalTensor
from workbench.spec.lora import LoraSpec, adapter_tensors, factor_names, magnitude_name, merged_model
from workbench.spec.model import ModelConfig

Arrays = dict[str, tuple[str, np.ndarray]]
"""dtype and elements, by name."""


class PeftSource:
    """Logical tensors that are in memory (`TensorSource`). rules: of the weights that they adapt, by name."""

    def __init__(self, arrays: Arrays, rules: Mapping[str, Rule]) -> None:
        self._arrays, self.rules = arrays, rules
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


def to_logical(
    file: Arrays, family: Family, model: ModelConfig, lora: LoraSpec, where: str
) -> tuple[PeftSource, tuple[str, ...]]:
    """The logical tensors of a file's, and the names of those that have no place; ConversionError for what is missing
    or has another shape."""
    found: Arrays = {}
    left = dict(file)
    faults: list[str] = []
    missing: list[str] = []
    one_by_one = has_experts_one_by_one(file)
    for module in peft_modules(family, model, lora, one_by_one=one_by_one):
        keys = (*module.keys, module.magnitude_key) if lora.dora else module.keys
        if lacking := [key for key in keys if key not in left]:
            missing += lacking
            for key in keys:
                left.pop(key, None)
            continue
        a, b, *magnitudes = (left.pop(key) for key in keys)
        try:
            found |= _pairs_of_experts(module, a, b) if module.experts else _pairs(module, a, b)
            found |= {n: m for magnitude in magnitudes for n, m in _magnitudes(module, magnitude).items()}
        except ConversionError as error:
            faults.append(str(error))
    for name, key in judging_keys(family, model).items():
        if key in left:
            found[name] = left.pop(key)
        else:
            missing.append(key)
    if missing:
        unprefixed = any(key.removeprefix(PREFIX) in left for key in missing)
        hint = f" (names must begin with {PREFIX!r})" if unprefixed else ""
        faults.append(f"{summarise(missing, 'is', 'are')} missing{hint}")
    if faults:
        raise ConversionError(f"{where}: {'; '.join(faults[:8])}")
    arrays = {name: found[name] for name in adapter_tensors(model, lora, "F32")}
    return PeftSource(arrays, weight_rules(family, merged_model(model, lora), one_by_one=one_by_one)), tuple(left)


def _pairs(module: PeftModule, a: tuple[str, np.ndarray], b: tuple[str, np.ndarray]) -> Arrays:
    """Our pairs of one adapter: unstacked where it was stacked, else with A repeated for each projection."""
    rank = a[1].shape[0]
    if a[1].shape != (rank, module.inputs) or b[1].shape != (module.outputs, rank):
        raise ConversionError(
            f"{module.path}: A {list(a[1].shape)} and B {list(b[1].shape)} do not fit a module of {module.inputs} "
            f"inputs and {module.outputs} outputs"
        )
    found: Arrays = {}
    if set(module.ranks) == {rank}:
        for weight, rows in module.parts:
            a_name, b_name = factor_names(weight)
            found[a_name], found[b_name] = a, (b[0], b[1][rows])
        return found
    blocks, first = np.zeros_like(b[1]), 0
    for (weight, rows), r in zip(module.parts, module.ranks, strict=True):
        a_name, b_name = factor_names(weight)
        ranks = slice(first, first + r)
        found[a_name], found[b_name] = (a[0], a[1][ranks]), (b[0], b[1][rows, ranks])
        blocks[rows, ranks] = b[1][rows, ranks]
        first += r
    if rank != first or not np.array_equal(blocks, b[1]):
        raise ConversionError(f"{module.path}: has rank {rank}, and its configuration says {module.ranks[0]}")
    return found


def _pairs_of_experts(module: PeftModule, a: tuple[str, np.ndarray], b: tuple[str, np.ndarray]) -> Arrays:
    """Our pairs of one adapter of all experts: A has their rows one below the other, in B they are innermost."""
    count = len(module.experts)
    found: Arrays = {}
    if a[1].shape[0] % count or b[1].shape != (module.outputs, len(a[1])):
        raise ConversionError(f"{module.path}: A {list(a[1].shape)}, B {list(b[1].shape)} are not of {count} experts")
    of_b = b[1].reshape(module.outputs, -1, count)
    for number, (expert, own) in enumerate(zip(module.experts, np.split(a[1], count), strict=True)):
        found |= _pairs(expert, (a[0], own), (b[0], of_b[..., number]))
    return found


def _magnitudes(module: PeftModule, magnitude: tuple[str, np.ndarray]) -> Arrays:
    dtype, array = magnitude
    if array.shape != (module.outputs,):
        raise ConversionError(f"{module.path}: {list(array.shape)} magnitudes for {module.outputs} outputs")
    return {magnitude_name(weight): (dtype, array[rows]) for weight, rows in module.parts}


def to_file(logical: Arrays, modules: Sequence[PeftModule], judging: Mapping[str, str]) -> Arrays:
    """The tensors of adapter_model.safetensors, by name."""
    found: Arrays = {}
    for module in modules:
        dtype = logical[factor_names(module.weights[0])[0]][0]
        pairs = [_stacked(logical, own) for own in module.experts or (module,)]
        a, b = np.concatenate([a for a, _ in pairs]), np.stack([b for _, b in pairs], axis=-1)
        a_key, b_key = module.keys
        found[a_key], found[b_key] = (dtype, a), (dtype, b.reshape(len(b), -1))
        if magnitude_name(module.weights[0]) in logical:
            magnitudes = np.zeros(module.outputs, a.dtype)
            for weight, rows in module.parts:
                magnitudes[rows] = logical[magnitude_name(weight)][1]
            found[module.magnitude_key] = (dtype, magnitudes)
    return {**found, **{key: logical[name] for name, key in judging.items()}}


def _stacked(logical: Arrays, module: PeftModule) -> tuple[np.ndarray, np.ndarray]:
    """A and B of a module: those of its parts one below the other, and in blocks."""
    pairs = [tuple(logical[name][1] for name in factor_names(weight)) for weight, _ in module.parts]
    a = np.concatenate([a for a, _ in pairs])
    b, first = np.zeros((module.outputs, len(a)), a.dtype), 0
    for (_, rows), (_, block) in zip(module.parts, pairs, strict=True):
        b[rows, first : first + block.shape[1]] = block
        first += block.shape[1]
    return a, b
