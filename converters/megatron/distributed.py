"""What torch_dist folders call the tensors of a model, and how they stack those of all layers, or experts. No torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Final, Protocol

from converters.megatron.pieces import ForeignTensor, Piece, within
from converters.megatron.table import LAYERS, McoreTensor, Table
from converters.untrusted.torch_file import StridedTensor
from workbench.errors import ConversionError
from workbench.spec.geometry import Box
from workbench.spec.model import ModelConfig

_LAYER: Final = re.compile(rf"{re.escape(LAYERS)}\.(\d+)\.(.*)")
_EXPERT: Final = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(.*)")
_HALVES: Final = ("_w", "_v")
"""What ends the names of gate and up that are stored apart (`singleton_local_shards`)."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor lies: in the one called `name`, at index `at` of as many leading dimensions, which are `outer`."""

    name: str
    at: tuple[int, ...] = ()
    outer: tuple[int, ...] = ()


class Stack(Protocol):
    """A tensor of a folder."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str: ...

    @property
    def pieces(self) -> Iterable[Piece]: ...


def one_by_one(names: Collection[str], model: ModelConfig) -> set[str]:
    """`names` of a folder, those of stacked layers replaced by one for each layer."""
    found = set()
    for name in names:
        rest = name.removeprefix(f"{LAYERS}.")
        if rest == name or rest[0].isdigit():
            found.add(name)
        else:
            found |= {f"{LAYERS}.{layer}.{rest}" for layer in range(model.num_hidden_layers)}
    return found


def stored_now(tensor: McoreTensor, model: ModelConfig) -> Stored:
    """Where Megatron stores a tensor of `model`: all layers stacked if they are alike, and all experts."""
    alike = model.moe is None or all(map(model.has_experts, range(model.num_hidden_layers)))
    return next(_places(tensor, model, stacked=alike))


def _places(tensor: McoreTensor, model: ModelConfig, *, stacked: bool) -> Iterator[Stored]:
    """The places that a tensor, with experts spelled one by one, may have; stacked: with its layers in one."""
    inside = _LAYER.fullmatch(tensor.name)
    if inside is None:
        yield Stored(tensor.name)
        return
    layer, name = int(inside[1]), inside[2]
    base, at, outer = (LAYERS, (layer,), (model.num_hidden_layers,)) if stacked else (f"{LAYERS}.{layer}", (), ())
    expert = _EXPERT.fullmatch(name)
    if expert is None:
        yield Stored(f"{base}.{name}", at, outer)
        return
    number, name = int(expert[1]), f"{expert[2]}"
    yield Stored(f"{base}.mlp.experts.experts.{name}", (*at, number), (*outer, tensor.num_experts))
    yield Stored(f"{base}.mlp.experts.experts.{number}.{name}", at, outer)


def whole_model(
    table: Table, model: ModelConfig, stored: Mapping[str, Stack], where: str
) -> tuple[dict[str, ForeignTensor], set[str]]:
    """The tensors of `table` that a folder holds, and the names of the folder's tensors that they lie in.

    ConversionError when a stack is not of as many layers or experts as the model has.
    """
    found: dict[str, ForeignTensor] = {}
    used: set[str] = set()
    stacks: dict[str, _Layers] = {}
    for name, tensor in table.tensors.items():
        for place in (p for stacked in (True, False) for p in _places(tensor, model, stacked=stacked)):
            names = [place.name] if place.name in stored else []
            if not names and tensor.halves:
                names = [n for n in (place.name + half for half in _HALVES) if n in stored]
            if not names:
                continue
            for key in names:
                if key not in stacks:
                    stacks[key] = _Layers(key, stored[key], place.outer, where)
            found[name] = _joined([stacks[key] for key in names], place.at)
            used.update(names)
            break
    return found, used


class _Layers:
    """The pieces of a stack, by index in its leading dimensions."""

    def __init__(self, name: str, stack: Stack, outer: tuple[int, ...], where: str) -> None:
        depth = len(outer)
        if stack.shape[:depth] != outer:
            raise ConversionError(
                f"{where}: {name!r} has shape {list(stack.shape)}, but the arguments say {list(outer)} for the first "
                f"{depth} dimensions (layers, experts)"
            )
        self.shape, self.dtype = stack.shape[depth:], stack.dtype
        self.pieces: dict[tuple[int, ...], list[Piece]] = {}
        for piece in stack.pieces:
            ranges = [range(piece.box.offset[dim], piece.box.end[dim]) for dim in range(depth)]
            for at in product(*ranges):
                self.pieces.setdefault(at, []).append(_Layer(piece, at) if at else piece)


@dataclass(frozen=True, slots=True)
class _Layer:
    """What a piece of a stack has of the tensor at one index."""

    piece: Piece
    at: tuple[int, ...]

    @property
    def box(self) -> Box:
        depth, box = len(self.at), self.piece.box
        return Box(box.offset[depth:], box.size[depth:])

    def locate(self) -> StridedTensor:
        place, depth, box = self.piece.locate(), len(self.at), self.piece.box
        corner = (*(a - o for a, o in zip(self.at, box.offset, strict=False)), *(0 for _ in box.size[depth:]))
        found = within(place, Box(corner, (*(1 for _ in self.at), *box.size[depth:])))
        return StridedTensor(found.file, found.start, found.dtype, found.shape[depth:], found.strides[depth:])


@dataclass(frozen=True, slots=True)
class _Half:
    """A piece of a tensor that lies behind others in one tensor."""

    piece: Piece
    row: int

    @property
    def box(self) -> Box:
        return self.piece.box.shift((self.row, *(0 for _ in self.piece.box.size[1:])))

    def locate(self) -> StridedTensor:
        return self.piece.locate()


def _joined(layers: list[_Layers], at: tuple[int, ...]) -> ForeignTensor:
    """The tensors at one index of one stack, or of several one below the other."""
    first = layers[0]
    if len(layers) == 1:
        return ForeignTensor(first.shape, first.dtype, first.pieces.get(at, []))
    pieces: list[Piece] = []
    rows = 0
    for layer in layers:
        pieces += [_Half(piece, rows) for piece in layer.pieces.get(at, [])]
        rows += layer.shape[0]
    return ForeignTensor((rows, *first.shape[1:]), first.dtype, pieces)
