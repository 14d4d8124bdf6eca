"""Faults that converters have made elsewhere, planted in one of two checkpoints: `wb verify` finds and names each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.checkpoints import MemorySource, random_source, write_native
from tests.helpers.models import sparse_model
from workbench.cli.main import main
from workbench.spec.layout import ParallelLayout

Tensors = dict[str, Any]
MODEL = sparse_model(qk_norm="head", moe={"mlp_only_layers": ()})
LAYER = "layers.2."


@dataclass(frozen=True)
class Fault:
    """A fault as a change of all tensors by name, `{p}` the prefix of names in the folder; and what must be said."""

    plant: Callable[[Tensors, str], None]
    says: tuple[str, ...]


def swap(one: str, other: str) -> Callable[[Tensors, str], None]:
    def plant(tensors: Tensors, prefix: str) -> None:
        names = prefix + one, prefix + other
        tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]

    return plant


def change(name: str, how: Callable[[Any], Any]) -> Callable[[Tensors, str], None]:
    def plant(tensors: Tensors, prefix: str) -> None:
        tensors[prefix + name] = how(tensors[prefix + name])

    return plant


def next_layer(tensors: Tensors, prefix: str) -> None:
    """Layers 1 and 2 hold what 2 and 3 should."""
    before = dict(tensors)
    for name in before:
        for layer in (1, 2):
            start = f"{prefix}layers.{layer}."
            if name.startswith(start):
                tensors[name] = before[name.replace(start, f"{prefix}layers.{layer + 1}.")]


def next_expert(tensors: Tensors, prefix: str) -> None:
    """Expert 1 of a layer was lost, and those behind it moved up."""
    for leaf in ("gate_proj", "up_proj", "down_proj"):
        for expert in (1, 2):
            name = f"{prefix}{LAYER}mlp.experts.{{}}.{leaf}.weight"
            tensors[name.format(expert)] = tensors[name.format(expert + 1)]


def zeroed(rows: slice) -> Callable[[Any], Any]:
    def how(array: Any) -> Any:
        array = array.clone() if isinstance(array, torch.Tensor) else array.copy()
        array[rows] = 0
        return array

    return how


def rolled(array: Any, by: int) -> Any:
    return torch.roll(array, by, 0) if isinstance(array, torch.Tensor) else np.roll(array, by, 0)


def flipped(array: Any) -> Any:
    bits = array.numpy().copy() if isinstance(array, torch.Tensor) else array.copy()
    bits.view(np.uint32)[3, 5] ^= 1 << 7
    return torch.from_numpy(bits) if isinstance(array, torch.Tensor) else bits


def interleaved(array: Any) -> Any:
    """Rotary halves of each head of 8 as pairs."""
    order = [head * 8 + i for head in range(array.shape[0] // 8) for pair in range(4) for i in (pair, pair + 4)]
    return array[order]


K, UP, GATE = (f"{LAYER}{n}.weight" for n in ("self_attn.k_proj", "mlp.experts.1.up_proj", "mlp.experts.1.gate_proj"))
NORMS = (f"{LAYER}input_layernorm.weight", f"{LAYER}post_attention_layernorm.weight")
FAULTS = {
    "gate and up swapped": Fault(swap(GATE, UP), (f"{GATE} is swapped with {UP}", f"{UP} is swapped with {GATE}")),
    "norms swapped": Fault(swap(*NORMS), (f"{NORMS[0]} is swapped with {NORMS[1]}",)),
    "groups of keys rotated": Fault(
        change(K, lambda array: rolled(array, 8)), (f"{K} has its rows in another order: rotated by 8 of 16",)
    ),
    "rotary halves interleaved": Fault(
        change(K, interleaved), (f"{K} has its rows in another order: 1 to 1 are 4 to 4",)
    ),
    "layers off by one": Fault(
        next_layer,
        (
            "layer 1 holds what layer 2 holds in the first",
            "layer 2 holds what layer 3 holds in the first",
            "layers.1.self_attn.q_proj.weight holds what layers.2.self_attn.q_proj.weight holds in the first",
        ),
    ),
    "an expert lost, the others moved up": Fault(
        next_expert,
        (
            "expert 1 of layer 2 holds what expert 2 of layer 2 holds in the first",
            "expert 2 of layer 2 holds what expert 3 of layer 2 holds in the first",
        ),
    ),
    "a zeroed shard": Fault(
        change("embed_tokens.weight", zeroed(slice(51, 101))),
        ("embed_tokens.weight is zero from [51, 0] to [100, 31]",),
    ),
    "a zeroed tensor": Fault(change(K, zeroed(slice(None))), (f"{K} is all zero",)),
    "one flipped bit": Fault(change(UP, flipped), (f"{UP} has one other bit; the first at [3, 5]",)),
    "square and transposed": Fault(
        change(
            f"{LAYER}self_attn.o_proj.weight",
            lambda array: array.T.copy() if isinstance(array, np.ndarray) else array.T.contiguous(),
        ),
        ("o_proj.weight is transposed",),
    ),
    "columns of heads rotated": Fault(
        change(
            f"{LAYER}self_attn.o_proj.weight",
            lambda a: np.roll(a, 8, 1) if isinstance(a, np.ndarray) else torch.roll(a, 8, 1),
        ),
        ("o_proj.weight has its columns in another order: rotated by 24 of 32",),
    ),
    "noise": Fault(change(K, lambda array: array * 1.5), (f"{K} differs in 512 of 512 elements; the first at [0, 0]",)),
}


def assert_named(first: Path, second: Path, fault: Fault, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["verify", str(first), str(second)]) == 4
    said = capsys.readouterr().out
    for words in fault.says:
        assert words in said, said
    assert main(["verify", str(first), str(second), "--json"]) == 4
    found = json.loads(capsys.readouterr().out)
    assert not found["equal"] and found["different"] == list(found["diagnosis"]["tensors"])


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MemorySource]:
    folder = tmp_path_factory.mktemp("native") / "a"
    source = random_source(MODEL, "F32", optimizer=False)
    write_native(folder, source, MODEL, ParallelLayout(tp=2, pp=2))
    return folder, source


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_in_a_native_checkpoint_is_named(
    native: tuple[Path, MemorySource], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    folder, source = native
    tensors = dict(source.arrays)
    FAULTS[kind].plant(tensors, "")
    write_native(tmp_path / "b", MemorySource(source.schema, tensors), MODEL, ParallelLayout(tp=4))
    assert_named(folder, tmp_path / "b", FAULTS[kind], capsys)


@pytest.fixture(scope="module")
def hugging_face(native: tuple[Path, MemorySource], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("hf") / "a"
    assert main(["export", str(native[0]), str(folder), "--verify", "none", "-q"]) == 0
    return folder


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_in_a_hugging_face_folder_is_named(
    native: tuple[Path, MemorySource],
    hugging_face: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    shutil.copytree(hugging_face, tmp_path / "b")
    file = tmp_path / "b" / "model.safetensors"
    tensors: Tensors = load_file(file)
    FAULTS[kind].plant(tensors, "model.")
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, file, {"format": "pt"})
    assert_named(native[0], tmp_path / "b", FAULTS[kind], capsys)


def test_what_is_missing_is_named_as_a_whole(
    native: tuple[Path, MemorySource], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, source = native
    schema = {n: t for n, t in source.schema.items() if f"{LAYER}mlp.experts.3." not in n and "layers.0." not in n}
    write_native(tmp_path / "b", MemorySource(schema, source.arrays), MODEL, ParallelLayout(tp=4))
    assert main(["verify", str(folder), str(tmp_path / "b")]) == 4
    said = capsys.readouterr().out
    assert "expert 3 of layer 2 is missing in the second" in said and "  layer 0 is missing in the second" in said


def test_models_that_compute_otherwise_are_not_equal_although_their_tensors_are(
    native: tuple[Path, MemorySource], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, source = native
    write_native(tmp_path / "b", source, MODEL.model_copy(update={"rope_theta": 5e5}), ParallelLayout(tp=4))
    assert main(["verify", str(folder), str(tmp_path / "b")]) == 4
    assert "  model.rope_theta: 10000.0 and 500000.0" in capsys.readouterr().out
    assert MODEL.moe is not None
    other = {"hidden_dropout": 0.1, "moe": MODEL.moe.model_copy(update={"router_z_loss_coef": 0.0})}
    write_native(tmp_path / "c", source, MODEL.model_copy(update=other))
    assert main(["verify", str(folder), str(tmp_path / "c")]) == 0
    assert "  model.moe.router_z_loss_coef: 0.02 and 0.0" in capsys.readouterr().out
