"""Tensors of a torch_dist folder are found by any of their names, and cut out of stacks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from converters.megatron.distributed import one_by_one, stored_now, whole_model
from converters.megatron.pieces import ForeignTensor, PieceSource, PlacedPiece, match_pieces
from converters.megatron.table import RENAMED, Table, make_table, spelling_of
from converters.rules import pull
from converters.untrusted.torch_file import StridedTensor
from workbench.errors import ConversionError
from workbench.spec.geometry import Box
from workbench.spec.model import ModelConfig
from workbench.spec.schema import logical_tensors

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
MODEL = ModelConfig.model_validate(
    {
        "vocab_size": 10,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "moe": EXPERTS,
    }
)


@dataclass
class Disk:
    """A file that arrays are appended to."""

    path: Path
    end: int = 0

    def store(self, array: np.ndarray, cuts: int = 1) -> ForeignTensor:
        """The array as a tensor in so many pieces along its first dimension."""
        pieces, start = [], 0
        for part in np.array_split(array, cuts):
            with self.path.open("ab") as file:
                file.write(part.tobytes())
            strides = tuple(int(np.prod(part.shape[d + 1 :])) for d in range(part.ndim))
            place = StridedTensor(self.path, self.end, "F32", part.shape, strides)
            pieces.append(PlacedPiece(Box((start, *(0 for _ in part.shape[1:])), part.shape), place))
            self.end += part.nbytes
            start += part.shape[0]
        return ForeignTensor(array.shape, "F32", pieces)


def values(table: Table) -> dict[str, np.ndarray]:
    """Random numbers for every tensor of the whole model."""
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(t.shape).astype(np.float32) for name, t in table.tensors.items()}


def stacked(table: Table, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays as Megatron stores them."""
    found: dict[str, np.ndarray] = {}
    for name, tensor in table.tensors.items():
        place = stored_now(tensor, MODEL)
        stack = found.setdefault(place.name, np.empty((*place.outer, *tensor.shape), np.float32))
        stack[place.at] = arrays[name]
    return found


def apart(table: Table, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays with a name for each layer and expert, gate and up apart (singleton_local_shards)."""
    found = {}
    for name, array in arrays.items():
        key = name.replace(".local_experts.", ".experts.")
        if table.tensors[name].halves:
            found[f"{key}_w"], found[f"{key}_v"] = np.split(array, 2)
        else:
            found[key] = array
    return found


def compare(stored: dict[str, ForeignTensor], arrays: dict[str, np.ndarray]) -> None:
    """Reads every logical tensor and compares it with the same rule applied to the arrays in memory."""
    table = make_table(MODEL, spelling_of(one_by_one(stored, MODEL), MODEL))
    foreign, used = whole_model(table, MODEL, stored, "there")
    assert used == stored.keys()
    shapes = {name: tensor.shape for name, tensor in logical_tensors(MODEL, "F32").items()}
    found = PieceSource(match_pieces(shapes, table.rules, foreign, "there"), table.rules, foreign)
    for name, shape in shapes.items():
        box, rule = Box.whole(shape), table.rules[name]
        expected = pull(rule.view, box, lambda part, rule=rule: arrays[rule.foreign][part.slices])
        assert np.array_equal(found.read(name, box), expected), name
        assert sum(chunk.numel for chunk in found.chunks(name)) == box.numel, name


@pytest.mark.parametrize("cuts", [1, 2, 3])
def test_layers_and_experts_come_out_of_stacks_however_these_are_cut(tmp_path: Path, cuts: int) -> None:
    table = make_table(MODEL, RENAMED)
    arrays, disk = values(table), Disk(tmp_path / "file")
    compare({name: disk.store(array, cuts) for name, array in stacked(table, arrays).items()}, arrays)


def test_layers_experts_gate_and_up_with_names_of_their_own_are_found(tmp_path: Path) -> None:
    table = make_table(MODEL, RENAMED)
    arrays, disk = values(table), Disk(tmp_path / "file")
    compare({name: disk.store(array) for name, array in apart(table, arrays).items()}, arrays)


def test_a_stack_of_other_layers_than_the_arguments_say_is_refused(tmp_path: Path) -> None:
    table = make_table(MODEL, RENAMED)
    arrays, disk = values(table), Disk(tmp_path / "file")
    stored = {name: disk.store(array) for name, array in stacked(table, arrays).items()}
    longer = MODEL.model_copy(update={"num_hidden_layers": 4})
    with pytest.raises(ConversionError, match=r"has shape \[3, .*\], but the arguments say \[4\]"):
        whole_model(make_table(longer, RENAMED), longer, stored, "there")


def test_missing_tensors_and_those_of_another_shape_are_named() -> None:
    table = make_table(MODEL, RENAMED)
    shapes = {name: tensor.shape for name, tensor in logical_tensors(MODEL, "F32").items()}
    foreign = {name: ForeignTensor(t.shape, "F32", []) for name, t in table.tensors.items()}
    del foreign["decoder.layers.2.mlp.router.weight"]
    foreign["output_layer.weight"] = ForeignTensor((7, 8), "F32", [])
    with pytest.raises(ConversionError, match=r"output_layer.weight' has shape \[7, 8\].*router.weight' is missing"):
        match_pieces(shapes, table.rules, foreign, "there")
