"""Faults planted in the files of Megatron's ranks: `wb verify` names each, and the second reader sees the same ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from converters.independent.megatron import MegatronFiles
from converters.open import open_checkpoint
from tests.converters.test_verifier_mutations import MODEL
from tests.helpers.checkpoints import RUN, MemorySource, random_source, write_native
from workbench.cli.main import main

Ranks = dict[str, dict[str, Any]]
"""What ranks at tp=2 pp=2 ep=2 saved, by name of their folder; layers 2 and 3 are 0 and 1 of the second stage."""
LAYER = "decoder.layers.0."


def of_stage(ranks: Ranks, stage: int = 1) -> Iterator[dict[str, torch.Tensor]]:
    return (state["model"] for name, state in ranks.items() if name.split("_")[3] == f"{stage:03d}")


def of_experts(ranks: Ranks, ep_rank: int) -> list[dict[str, torch.Tensor]]:
    """The second stage's tensors of both tensor ranks."""
    return [ranks[f"mp_rank_{tp_rank:02d}_001_{ep_rank:03d}"]["model"] for tp_rank in range(2)]


def swap_gate_and_up(ranks: Ranks) -> None:
    for model in of_experts(ranks, 0):
        fc1 = model[f"{LAYER}mlp.experts.local_experts.1.linear_fc1.weight"]
        fc1.copy_(torch.cat(fc1.chunk(2)[::-1]))


def rotate_groups(ranks: Ranks) -> None:
    """Each tensor rank has one group of heads: they take each other's."""
    for ep_rank in range(2):
        one, other = (model[f"{LAYER}self_attention.linear_qkv.weight"] for model in of_experts(ranks, ep_rank))
        both = one.clone(), other.clone()
        one.copy_(both[1])
        other.copy_(both[0])


def swap_norms(ranks: Ranks) -> None:
    names = f"{LAYER}self_attention.linear_qkv.layer_norm_weight", f"{LAYER}pre_mlp_layernorm.weight"
    for model in of_stage(ranks):
        model[names[0]], model[names[1]] = model[names[1]], model[names[0]]


def next_layer(ranks: Ranks) -> None:
    for model in of_stage(ranks):
        for name in model:
            if name.startswith(LAYER):
                model[name] = model[name.replace(LAYER, "decoder.layers.1.")]


def drop_expert(ranks: Ranks) -> None:
    """Expert 1 is lost, and those behind it moved up."""
    for here, there in zip(of_experts(ranks, 0), of_experts(ranks, 1), strict=True):
        for matrix in ("linear_fc1.weight", "linear_fc2.weight"):
            first, second = (f"{LAYER}mlp.experts.local_experts.{e}.{matrix}" for e in range(2))
            here[second], there[first] = there[first], there[second]


def zero_shard(ranks: Ranks) -> None:
    for ep_rank in range(2):
        of_experts(ranks, ep_rank)[1][f"{LAYER}self_attention.linear_proj.weight"].zero_()


def flip_bit(ranks: Ranks) -> None:
    model = of_experts(ranks, 0)[1]
    model[f"{LAYER}mlp.experts.local_experts.1.linear_fc2.weight"].view(torch.int32)[3, 5] ^= 1 << 7


E1 = "layers.2.mlp.experts.1."
ATTENTION = "layers.2.self_attn."
FAULTS: dict[Callable[[Ranks], None], tuple[str, ...]] = {
    swap_gate_and_up: (f"{E1}gate_proj.weight is swapped with {E1}up_proj.weight",),
    rotate_groups: (
        f"{ATTENTION}k_proj.weight has its rows in another order: rotated by 8 of 16",
        f"{ATTENTION}q_proj.weight has its rows in another order: rotated by 16 of 32",
    ),
    swap_norms: ("layers.2.input_layernorm.weight is swapped with layers.2.post_attention_layernorm.weight",),
    next_layer: ("layer 2 holds what layer 3 holds in the first",),
    drop_expert: (
        "expert 1 of layer 2 holds what expert 2 of layer 2 holds in the first",
        "expert 2 of layer 2 holds what expert 3 of layer 2 holds in the first",
    ),
    zero_shard: (f"{ATTENTION}o_proj.weight is zero from [0, 16] to [31, 31]",),
    flip_bit: (f"{E1}down_proj.weight has one other bit; the first at [3, 17]",),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[MemorySource, Path, Path]:
    """A model, as a native checkpoint and in rank folders."""
    root, source = tmp_path_factory.mktemp("megatron"), random_source(MODEL, "F32")
    write_native(root / "native", source, MODEL, training=RUN)
    words = ["export", str(root / "native"), str(root / "ranks"), "--to", "megatron", "--tp", "2", "--pp", "2"]
    assert main([*words, "--ep", "2", "--verify", "full", "-q"]) == 0
    return source, root / "native", root / "ranks"


def damaged(ranks: Path, copy: Path, plant: Callable[[Ranks], None]) -> Path:
    """A copy of rank folders with a fault."""
    shutil.copytree(ranks, copy)
    paths = {path.parent.name: path for path in copy.glob("iter_*/mp_rank_*/model_optim_rng.pt")}
    states = {name: torch.load(path, weights_only=False) for name, path in paths.items()}
    plant(states)
    for name, path in paths.items():
        torch.save(states[name], path)
    return copy


@pytest.mark.parametrize("plant", FAULTS)
def test_a_fault_in_rank_folders_is_named_and_both_readers_see_it(
    folders: tuple[MemorySource, Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    plant: Callable[[Ranks], None],
) -> None:
    source, native, ranks = folders
    copy = damaged(ranks, tmp_path / "b", plant)
    capsys.readouterr()
    assert main(["verify", str(native), str(copy)]) == 4
    said = capsys.readouterr().out
    for words in FAULTS[plant]:
        assert words in said, said
    assert main(["verify", str(native), str(copy), "--json"]) == 4
    found = json.loads(capsys.readouterr().out)
    reader = MegatronFiles(copy, open_checkpoint(copy).source)
    read = {name: reader.read(tensor, slice(0, tensor.shape[0])) for name, tensor in source.schema.items()}
    unequal = {name for name, array in source.arrays.items() if not np.array_equal(read[name], array)}
    assert unequal == set(found["different"])
