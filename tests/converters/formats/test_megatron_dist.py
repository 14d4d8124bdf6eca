"""torch_dist folders that megatron-core wrote are read; those that are written, megatron-core reads.

One process with four ranks writes all folders (`tests.helpers.megatron_writer`), once for the session.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from converters.containers.dcp import GlobalTensor, lay_out_dcp
from converters.format import OpenedCheckpoint, WriteRequest
from converters.job import JobOptions, make_job
from converters.logits import engine_logits
from converters.megatron.saved_args import saved_args
from converters.open import get_format, open_checkpoint
from converters.untrusted.dcp import DcpTensor, read_dcp
from tests.helpers.megatron_writer import ITERATION, PROBE, Fixture, load_all, logits_of, value_of, write_all
from workbench.errors import CheckpointError, ConversionError
from workbench.spec.geometry import Box, coverage_fault
from workbench.spec.layout import ParallelLayout

pytest.importorskip("megatron.core")

_SIZES = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_GPT = {
    "num_key_value_heads": 4,
    "norm": "layernorm",
    "gated_mlp": False,
    "hidden_act": "gelu_tanh",
    "position_embedding": "learned",
    "attention_bias": True,
    "attention_output_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": True,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_CHOSEN = {"scoring": "sigmoid", "e_score_correction_bias": True, "shared_expert_intermediate_size": 24}
FIXTURES = {
    fixture.name: fixture
    for fixture in (
        Fixture("dense", {**_SIZES, "attention_bias": True, "qk_norm": "head"}, {"tp": 2, "pp": 2}),
        Fixture("gpt2", {**_SIZES, **_GPT}, {"tp": 2, "pp": 2, "vpp": 2}),
        Fixture("moe", {**_SIZES, "moe": {**_EXPERTS, **_CHOSEN}}, {"tp": 2, "dp": 2, "ep": 2}),
        Fixture("mixed", {**_SIZES, "moe": {**_EXPERTS, "mlp_only_layers": (0, 2)}}, {"tp": 2, "pp": 2}, apart=True),
    )
}
EVERY = pytest.mark.parametrize("name", FIXTURES)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of each fixture, written by megatron-core."""
    return write_all(list(FIXTURES.values()), tmp_path_factory.mktemp("torch_dist"))


@pytest.fixture(scope="module")
def opened(folders: dict[str, Path]) -> Iterator[dict[str, OpenedCheckpoint]]:
    yield {name: open_checkpoint(folder) for name, folder in folders.items()}


def whole(checkpoint: OpenedCheckpoint, name: str) -> np.ndarray:
    return checkpoint.source.read(name, Box.whole(checkpoint.source.schema[name].shape))


@EVERY
def test_a_folder_says_its_model_its_layout_and_where_the_run_stood(
    opened: dict[str, OpenedCheckpoint], name: str
) -> None:
    found, fixture = opened[name], FIXTURES[name]
    told = {"scale_residual_init", "bos_token_id", "eos_token_id", "pad_token_id"}
    assert found.model.model_dump(exclude=told) == fixture.features.model_dump(exclude=told)
    assert found.layout is not None and found.training is not None
    axes = ("tp", "pp", "vpp", "ep")
    assert [getattr(found.layout, axis) for axis in axes] == [getattr(fixture.degrees, axis) for axis in axes]
    assert (found.training.step, found.training.samples) == (ITERATION, 112)
    assert "fp8" in found.info["left out: entries"]


@EVERY
def test_its_weights_give_the_logits_of_megatron_core(
    opened: dict[str, OpenedCheckpoint], folders: dict[str, Path], name: str
) -> None:
    found = opened[name]
    (ours,) = engine_logits(found.model, found.source, [PROBE])
    theirs = logits_of(folders[name])[:, : found.model.vocab_size].numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@EVERY
def test_chunks_cover_each_tensor_once(opened: dict[str, OpenedCheckpoint], name: str) -> None:
    source = opened[name].source
    faults = {key: coverage_fault(tensor.shape, source.chunks(key)) for key, tensor in source.schema.items()}
    assert {key: fault for key, fault in faults.items() if fault} == {}


def test_queries_of_a_group_and_the_gate_are_where_megatron_core_puts_them(opened: dict[str, OpenedCheckpoint]) -> None:
    groups = value_of("decoder.layers.self_attention.linear_qkv.weight", (4, 64, 32))[2].reshape(2, 4, 8, 32).numpy()
    halves = value_of("decoder.layers.mlp.linear_fc1.weight", (4, 96, 32))[3].numpy()
    assert np.array_equal(whole(opened["dense"], "layers.2.self_attn.q_proj.weight"), groups[:, :2].reshape(32, 32))
    assert np.array_equal(whole(opened["dense"], "layers.2.self_attn.v_proj.weight"), groups[:, 3].reshape(16, 32))
    assert np.array_equal(whole(opened["dense"], "layers.3.mlp.gate_proj.weight"), halves[:48])
    assert np.array_equal(whole(opened["dense"], "layers.3.mlp.up_proj.weight"), halves[48:])


LAYOUTS = {
    "dense": ParallelLayout(tp=4, pp=2, vpp=2, vocab_multiple=8),
    "gpt2": ParallelLayout(pp=3, pp_layout=(1, 1, 2)),
    "moe": ParallelLayout(tp=2, dp=4, ep=4),
    "mixed": ParallelLayout(pp=2, dp=2, ep=2),
}


@pytest.fixture(scope="module")
def exported(
    opened: dict[str, OpenedCheckpoint], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, OpenedCheckpoint]:
    """Each fixture written again, at another layout."""
    folder = tmp_path_factory.mktemp("exported")
    for name, found in opened.items():
        options = JobOptions(layout=LAYOUTS[name], optimizer="drop")
        make_job(found, get_format("megatron_dist"), folder / name, options, operation="export").run(verify="full")
    return {name: open_checkpoint(folder / name) for name in opened}


@EVERY
def test_what_is_written_reads_back_bit_for_bit(
    opened: dict[str, OpenedCheckpoint], exported: dict[str, OpenedCheckpoint], name: str
) -> None:
    before, after = opened[name], exported[name]
    assert after.model == before.model
    assert after.source.schema == before.source.schema
    for key in before.source.schema:
        assert np.array_equal(whole(before, key), whole(after, key)), key


def test_megatron_core_loads_what_is_written(exported: dict[str, OpenedCheckpoint]) -> None:
    load_all(list(FIXTURES.values()), exported["dense"].path.parent)


def test_arguments_are_found_among_the_tensors_where_version_0_19_keeps_them(
    exported: dict[str, OpenedCheckpoint], tmp_path: Path
) -> None:
    before = exported["dense"]
    folder = read_dcp(before.path / "release")
    tensors = {
        name: GlobalTensor(tensor.dtype, tensor.shape, ((Box.whole(tensor.shape), "__0_0.distcp"),), _bytes(tensor))
        for name, tensor in folder.tensors.items()
    }
    args = saved_args(WriteRequest(tmp_path, before.source.schema, before.model), None, ckpt_format="torch_dist")
    common = {"args": args, "iteration": 9}
    laid = lay_out_dcp(tensors, {"common_state/shard_0_1": ("__0_0.distcp", [common])})
    for file, content in laid.files.items():
        data = bytearray(content.num_bytes)
        for start, known in content.known:
            data[start : start + len(known)] = known
        (tmp_path / file).write_bytes(data)
    (tmp_path / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    after = open_checkpoint(tmp_path)
    assert after.model == before.model and after.training is not None and after.training.step == 9
    assert all(np.array_equal(whole(before, name), whole(after, name)) for name in before.source.schema)


def _bytes(tensor: DcpTensor) -> bytes:
    array = np.empty(tensor.shape, np.float32)
    for piece in tensor.pieces:
        array[piece.box.slices] = piece.locate().read(Box.whole(piece.box.size))
    return array.tobytes()


def test_a_tensor_without_a_place_is_refused_by_name(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(folders["gpt2"] / f"iter_{ITERATION:07d}", folder)
    metadata = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(
        metadata.replace(b"decoder.final_layernorm.bias", b"decoder.final_layernorm.bios")
    )
    with pytest.raises(ConversionError, match=r"decoder\.final_layernorm\.bias' is missing"):
        open_checkpoint(folder)


def test_a_tracker_that_names_no_folder_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("12")
    assert not get_format("megatron_dist").recognises(tmp_path)
    with pytest.raises(CheckpointError, match=r"names iteration 12, but there is no iter_0000012"):
        get_format("megatron_dist").open(tmp_path)


def test_a_checksum_that_does_not_fit_is_told(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(folders["dense"] / f"iter_{ITERATION:07d}", folder)
    files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
    (folder / "integrity.json").write_text(json.dumps({"algorithm": "sha256", "files": files}))
    check = open_checkpoint(folder).check
    assert check is not None
    check(lambda _: None)
    data = bytearray((folder / "__0_0.distcp").read_bytes())
    data[-3000] ^= 1
    (folder / "__0_0.distcp").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"__0_0.distcp: sha256"):
        check(lambda _: None)
