"""The buffers of a trained model's ranks, and the pieces of optimizer state that are found in them. Pure; no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from converters.megatron.buckets import FlatParameter
from converters.megatron.modules import LocalParameter, Modules, ranks_of_experts, ranks_of_the_rest
from converters.megatron.pieces import ForeignTensor, Piece
from converters.megatron.ranks import Rank
from workbench.errors import CheckpointError
from workbench.spec.geometry import coverage_fault

MOMENTS: Final = ("exp_avg", "exp_avg_sq")
MASTER: Final = "param"
"""The kind of the 32-bit weights that an optimizer keeps when the model has 16 bits."""
KINDS: Final = (MASTER, *MOMENTS)

State = Mapping[str, Mapping[str, ForeignTensor]]
"""By kind, then by name of the tensor of a whole model."""


class Found:
    """Pieces of optimizer state while they are collected from ranks."""

    def __init__(self, modules: Modules) -> None:
        self._modules = modules
        self._pieces: dict[tuple[str, str], list[Piece]] = {}
        self._dtypes: dict[str, set[str]] = {}

    def add(self, kind: str, dtype: str, pieces: Iterable[tuple[str, Piece]]) -> None:
        """Takes named pieces of one kind."""
        self._dtypes.setdefault(kind, set()).add(dtype)
        for name, piece in pieces:
            self._pieces.setdefault((kind, name), []).append(piece)

    def state(self, where: str) -> State:
        """All of it; CheckpointError unless each tensor is covered exactly once, in one type for each kind."""
        found: dict[str, dict[str, ForeignTensor]] = {}
        for (kind, name), pieces in self._pieces.items():
            shape = self._modules.tensors[name].shape
            fault = coverage_fault(shape, [piece.box for piece in pieces])
            if len(self._dtypes[kind]) > 1:
                fault = f"it is of types {', '.join(sorted(self._dtypes[kind]))}"
            if fault:
                raise CheckpointError(f"{where}: {kind} of {name!r}: {fault}")
            (dtype,) = self._dtypes[kind]
            found.setdefault(kind, {})[name] = ForeignTensor(shape, dtype, pieces)
        return found


BufferId = tuple[int, int, int]
"""Optimizer (1: of experts), index of the rank in its group, index of the buffer on the rank."""


def groups(modules: Modules) -> tuple[list[tuple[int, Rank]], list[tuple[int, Rank]]]:
    """The ranks that hold different parts for each optimizer, by index."""
    return list(ranks_of_the_rest(modules.grid)), list(ranks_of_experts(modules.grid))


def buffers(modules: Modules) -> dict[BufferId, tuple[int, list[LocalParameter]]]:
    """Chunk and parameters of every buffer: one for each chunk of a rank and each type."""
    found: dict[BufferId, tuple[int, list[LocalParameter]]] = {}
    for optimizer, ranks in enumerate(groups(modules)):
        for group, rank in ranks:
            for index, buffer in enumerate(buffers_of(modules, rank, experts=optimizer == 1)):
                found[optimizer, group, index] = buffer
    return found


def buffers_of(modules: Modules, rank: Rank, *, experts: bool) -> list[tuple[int, list[LocalParameter]]]:
    """Chunk and parameters of the buffers of one optimizer (of experts or of the rest) of a rank, in order."""
    by_type: dict[tuple[int, str], list[LocalParameter]] = {}
    for chunk in range(modules.num_chunks):
        for parameter in modules.parameters(rank, chunk, experts=experts):
            by_type.setdefault((chunk, parameter.dtype), []).append(parameter)
    return [(chunk, parameters) for (chunk, _), parameters in by_type.items()]


def line(parameters: Sequence[LocalParameter]) -> list[FlatParameter]:
    """The parameters as the arithmetic of buckets knows them."""
    return [FlatParameter(p.name, p.numel, p.alone) for p in parameters]
