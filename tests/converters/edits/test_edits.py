"""Edits while streaming equal the same done by hand on whole arrays, bit for bit, and models change with them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from converters.cast import from_float64
from converters.logits import engine_logits, probe_sequences
from converters.open import open_checkpoint
from tests.helpers.checkpoints import random_native, read_all, tiny_model
from tests.helpers.models import sparse_model
from workbench.cli.main import main
from workbench.parallel.initial import normal
from workbench.spec.geometry import Box
from workbench.spec.layout import ParallelLayout
from workbench.spec.schema import logical_tensors

TP2PP2 = ParallelLayout(tp=2, pp=2)
Arrays = dict[str, np.ndarray]


def as_float(array: np.ndarray) -> np.ndarray:
    """BF16 bits as float64."""
    return (array.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def run(*words: object, code: int = 0) -> None:
    assert main([*map(str, words), "-q"]) == code


def same(found: Arrays, expected: Arrays) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and np.array_equal(found[name], array), name


@pytest.mark.parametrize("verify", ["full", "logits"])
def test_layers_are_taken_with_their_moments_and_renumbered(tmp_path: Path, verify: str) -> None:
    before = random_native(tmp_path / "a", layout=TP2PP2).arrays
    run("edit", tmp_path / "a", tmp_path / "b", "--layers", "0,2-3,3", "--verify", verify)
    expected: Arrays = {}
    for name, array in before.items():
        start, layers, rest = name.partition("layers.")
        old, _, leaf = rest.partition(".")
        if not layers:
            expected[name] = array
        for new, chosen in enumerate((0, 2, 3, 3)):
            if layers and int(old) == chosen:
                expected[f"{start}layers.{new}.{leaf}"] = array
    same(read_all(tmp_path / "b"), expected)
    found = open_checkpoint(tmp_path / "b")
    assert found.model == tiny_model(num_hidden_layers=4) and found.training == open_checkpoint(tmp_path / "a").training
    entry = found.lineage[-1]
    assert entry["edits"] == ["layers 0,2,3,3 of 4 taken, renumbered from 0"]
    assert entry["dropped"]["layer 1 is not among the layers taken"][0] == "layers.*.input_layernorm.weight"


def test_fields_that_speak_of_layers_follow(tmp_path: Path) -> None:
    kinds = ("sliding_attention", "full_attention", "full_attention", "sliding_attention")
    random_native(tmp_path / "a", tiny_model(layer_types=kinds, sliding_window=4), optimizer=False)
    run("edit", tmp_path / "a", tmp_path / "b", "--layers", "1-3")
    assert open_checkpoint(tmp_path / "b").model.layer_types == kinds[1:]
    run("edit", tmp_path / "a", tmp_path / "c", "--layers", "1-2")
    assert open_checkpoint(tmp_path / "c").model.sliding_window is None
    random_native(tmp_path / "moe", sparse_model(moe={"mlp_only_layers": (0, 2)}), optimizer=False)
    run("edit", tmp_path / "moe", tmp_path / "d", "--layers", "1-3")
    moe = open_checkpoint(tmp_path / "d").model.moe
    assert moe is not None and (moe.mlp_only_layers, moe.decoder_sparse_step) == ((1,), 1)
    run("edit", tmp_path / "moe", tmp_path / "e", "--layers", "0,2")
    assert open_checkpoint(tmp_path / "e").model.moe is None


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", ["zero", "mean"])
def test_a_larger_vocabulary_has_new_rows_and_moments_of_zero(tmp_path: Path, tied: bool, rows: str) -> None:
    before = random_native(tmp_path / "a", tiny_model(tie_word_embeddings=tied), TP2PP2).arrays
    run("edit", tmp_path / "a", tmp_path / "b", "--vocab-size", 64, "--new-rows", rows, "--tp", 4, "--pp", 1)
    expected = dict(before)
    for name, array in before.items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            new = np.zeros((11, 16), array.dtype)
            if rows == "mean" and not name.startswith("optim."):
                new[:] = from_float64(as_float(array).sum(axis=0) / 53, "BF16")
            expected[name] = np.concatenate((array, new))
    same(read_all(tmp_path / "b"), expected)
    assert open_checkpoint(tmp_path / "b").model == tiny_model(tie_word_embeddings=tied, vocab_size=64)
    assert len([name for name in expected if expected[name] is not before[name]]) == (3 if tied else 6)


def test_a_smaller_vocabulary_is_cut_and_keeps_its_special_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = random_native(tmp_path / "a", tiny_model(eos_token_id=30), TP2PP2).arrays
    run("edit", tmp_path / "a", tmp_path / "b", "--vocab-size", 31)
    expected = {n: a[:31] if n.endswith("embed_tokens.weight") else a for n, a in before.items()}
    same(read_all(tmp_path / "b"), expected)
    run("edit", tmp_path / "a", tmp_path / "c", "--vocab-size", 30, code=3)
    assert "a vocabulary of 30 has no place for eos_token_id=30" in capsys.readouterr().err


@pytest.mark.parametrize("gated", [True, False])
def test_a_dense_model_becomes_one_of_equal_experts_with_the_same_logits(tmp_path: Path, gated: bool) -> None:
    before = random_native(tmp_path / "a", tiny_model(gated_mlp=gated), TP2PP2, dtype="F32").arrays
    run("edit", tmp_path / "a", tmp_path / "b", "--upcycle-experts", 3, "--top-k", 2, "--seed", 5)
    opened = open_checkpoint(tmp_path / "b")
    expected: Arrays = {}
    for name in logical_tensors(opened.model, "F32"):
        if name.endswith("mlp.gate.weight"):
            expected[name] = normal(name, (3, 16), Box.whole((3, 16)), seed=5, std=0.02).numpy()
        else:
            words = [word for word in name.split(".") if word != "experts"]
            expected[name] = before[".".join(words[:3] + words[4:] if "experts" in name else words)]
    same(read_all(tmp_path / "b"), expected)
    assert len([name for name in expected if ".experts." in name]) == 4 * 3 * (3 if gated else 2)
    assert opened.training is None
    why = "a new router has no optimizer state, and a run needs that of all weights"
    assert "optim.exp_avg/layers.*.mlp.down_proj.weight" in opened.lineage[-1]["dropped"][why]
    dense = open_checkpoint(tmp_path / "a")
    sequences = probe_sequences(dense.model)
    ours = engine_logits(opened.model, opened.source, sequences)
    theirs = engine_logits(dense.model, dense.source, sequences)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5 * np.abs(other).max())


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_the_mean_is_summed_in_float64_and_rounded_once(tmp_path: Path, dtype: str) -> None:
    layouts = (TP2PP2, ParallelLayout(tp=4), ParallelLayout(pp=4))
    held = [
        random_native(tmp_path / str(i), layout=layout, dtype=dtype, seed=i).arrays for i, layout in enumerate(layouts)
    ]
    words = ("--average", tmp_path / "1", "--average", tmp_path / "2")
    run("merge", tmp_path / "0", tmp_path / "b", *words, "--weights", "2,1,1", "--verify", "full")
    wide = as_float if dtype == "BF16" else lambda array: array.astype(np.float64)
    expected = {}
    for name, array in held[0].items():
        if not name.startswith("optim."):
            total = 0.5 * wide(array) + 0.25 * wide(held[1][name]) + 0.25 * wide(held[2][name])
            if dtype == "BF16":  # the bits above the cut, plus one where PyTorch rounds up
                expected[name] = torch.from_numpy(total).bfloat16().view(torch.int16).numpy().view(np.uint16)
            else:
                expected[name] = total.astype(array.dtype)
    found = read_all(tmp_path / "b")
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        if dtype == "BF16":  # PyTorch rounds twice on the way from float64
            assert (np.abs(found[name].astype(int) - array) <= 1).all()
            assert (np.abs(as_float(found[name]) - as_float(array)) <= np.abs(as_float(array)) * 2**-7).all()
        else:
            assert np.array_equal(found[name], array), name


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=64), min_size=1))
def test_a_float64_is_rounded_to_the_nearest_bf16(values: list[float]) -> None:
    array = np.array([v for v in values if abs(v) < 3.3e38] or [0.0])
    found = as_float(from_float64(array, "BF16"))
    bits = from_float64(array, "BF16").astype(np.int64)
    for step in (-1, 1):
        neighbour = as_float((bits + step).clip(0, 0xFFFF).astype(np.uint16))
        finite = np.isfinite(neighbour) & (np.sign(neighbour) * np.sign(array) >= 0)
        assert (np.abs(found - array)[finite] <= np.abs(neighbour - array)[finite]).all()


REFUSED = {
    "nothing to do": ((), 2, "nothing to edit"),
    "a layer that is not there": (("--layers", "0-4"), 2, "the model has layers 0 to 3, and no layer 4"),
    "a range backwards": (("--layers", "3-1"), 2, "'3-1' is not a layer or a range"),
    "too many experts for a token": (("--upcycle-experts", 2, "--top-k", 3), 3, "num_experts_per_tok=3 is more than"),
    "other rows": (("--vocab-size", 60, "--new-rows", "random"), 2, "--new-rows 'random' is not known"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_edited_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    random_native(tmp_path / "a")
    words, code, message = REFUSED[kind]
    run("edit", tmp_path / "a", tmp_path / "b", *words, code=code)
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("b*"))


def test_checkpoints_of_other_models_have_no_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random_native(tmp_path / "a")
    random_native(tmp_path / "b", tiny_model(rope_theta=1e6))
    run("merge", tmp_path / "a", tmp_path / "c", "--average", tmp_path / "b", code=3)
    assert "are other models: rope_theta=10000.0 and 1000000.0" in capsys.readouterr().err
    run("merge", tmp_path / "a", tmp_path / "c", "--average", tmp_path / "a", "--weights", "1,2,3", code=2)
    assert "2 checkpoints are averaged" in capsys.readouterr().err


def test_a_plan_tells_of_edits_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random_native(tmp_path / "a", layout=TP2PP2)
    words = ["edit", str(tmp_path / "a"), str(tmp_path / "b"), "--layers", "0-1", "--upcycle-experts", "2", "--dry-run"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "edit  layers 0,1 of 4 taken" in said and "edit  each MLP copied to 2 experts" in said
    assert "layer 3 is not among the layers taken" in said
    assert main([*words, "--json"]) == 0
    assert "layers.3.mlp.down_proj.weight" in json.loads(capsys.readouterr().out)["dropped"]
