"""Logits equal transformers', in both directions and by what `wb import` and `wb export` do themselves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from converters.formats.huggingface import FORMAT
from converters.job import JobOptions, make_job
from converters.logits import (
    compare_logits,
    engine_logits,
    judge,
    probe_sequences,
    reference_logits,
    reference_request,
)
from converters.open import get_format, open_checkpoint
from converters.reference import arrays, load
from tests.helpers.hf_models import CASES, save_model
from workbench.errors import CheckpointError, VerificationError
from workbench.spec.layout import ParallelLayout

PLAIN = "llama, tied, grouped, llama3 rope"
FUSED = "gpt2, untied, own width, exact gelu"
pytestmark = pytest.mark.timeout(600)  # fresh processes that import transformers, on a busy machine


def run_transformers(folder: Path, sequences: list[list[int]]) -> list[np.ndarray]:
    """Logits as transformers computes them, in this process."""
    request = reference_request(FORMAT.open(folder).model, folder, sequences)
    model, faults = load(request)
    assert not faults
    return arrays(model, request)


@pytest.mark.parametrize("case", sorted(CASES))
def test_logits_agree_from_transformers_and_back_to_it(tmp_path: Path, case: str) -> None:
    """Both ways over native checkpoints, and every byte and word comes back as it was."""
    source = save_model(case, tmp_path / f"{case}-in")
    opened = FORMAT.open(source)
    sequences = probe_sequences(opened.model)
    theirs = run_transformers(source, sequences)
    native = get_format("native")
    first = make_job(opened, native, tmp_path / "a", JobOptions(ParallelLayout(tp=2, pp=2)), operation="import")
    first.run()
    second = make_job(
        open_checkpoint(tmp_path / "a"),
        native,
        tmp_path / "b",
        JobOptions(ParallelLayout(tp=4, pp=1)),
        operation="reshard",
    )
    second.run()
    resharded = open_checkpoint(tmp_path / "b")
    ours = engine_logits(resharded.model, resharded.source, sequences)
    assert judge(ours, theirs, sequences, source).difference <= 1e-4
    out = tmp_path / f"{case}-out"
    make_job(resharded, FORMAT, out, JobOptions(ParallelLayout()), operation="export").run(verify="full")
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    for name in ("config.json", "generation_config.json"):
        if (source / name).exists():
            assert (out / name).read_text().split() == (source / name).read_text().split()
    back = run_transformers(out, sequences)
    assert max(np.abs(a - b).max() for a, b in zip(back, theirs, strict=True)) <= 1e-5


@pytest.mark.slow
def test_a_fresh_offline_process_computes_the_same_as_this_one(tmp_path: Path) -> None:
    source = save_model(FUSED, tmp_path / "in")
    model = FORMAT.open(source).model
    sequences = probe_sequences(model)
    for fresh, here in zip(
        reference_logits(model, source, sequences), run_transformers(source, sequences), strict=True
    ):
        assert np.abs(fresh - here).max() <= 1e-5


def test_probe_sequences_cover_the_ends_of_the_vocabulary_and_leave_padding_out(tmp_path: Path) -> None:
    model = FORMAT.open(save_model("gpt2 classifier", tmp_path / "in")).model
    sequences = probe_sequences(model)
    assert sequences == probe_sequences(model)
    assert [len(sequence) for sequence in sequences] == [1, 17, 48]
    used = {token for sequence in sequences for token in sequence}
    assert {1, model.vocab_size - 1} <= used and model.pad_token_id not in used


def swapped(source: Path, target: Path, pairs: dict[str, str]) -> Path:
    """A copy of a folder in which tensors of equal shape have changed places, in every layer."""
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    changed = dict(tensors)
    for layer in range(4):
        for one, other in pairs.items():
            a, b = one.format(i=layer), other.format(i=layer)
            changed[a], changed[b] = tensors[b].clone(), tensors[a].clone()
    save_file(changed, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("case", "pairs"),
    [
        (
            PLAIN,
            {"model.layers.{i}.input_layernorm.weight": "model.layers.{i}.post_attention_layernorm.weight"},
        ),
        (PLAIN, {"model.layers.{i}.mlp.gate_proj.weight": "model.layers.{i}.mlp.up_proj.weight"}),
        (PLAIN, {"model.layers.{i}.self_attn.k_proj.weight": "model.layers.{i}.self_attn.v_proj.weight"}),
        (
            "bert",
            {
                "bert.encoder.layer.{i}.attention.output.LayerNorm.weight": (
                    "bert.encoder.layer.{i}.output.LayerNorm.weight"
                )
            },
        ),
        (FUSED, {"transformer.h.{i}.ln_1.bias": "transformer.h.{i}.ln_2.bias"}),
        (FUSED, {"transformer.h.{i}.attn.c_proj.bias": "transformer.h.{i}.mlp.c_proj.bias"}),
    ],
)
def test_tensors_of_equal_shape_that_changed_places_are_seen_in_the_logits(
    tmp_path: Path, case: str, pairs: dict[str, str]
) -> None:
    source = save_model(case, tmp_path / "in")
    opened = FORMAT.open(swapped(source, tmp_path / "swapped", pairs))
    sequences = probe_sequences(opened.model)
    ours = engine_logits(opened.model, opened.source, sequences)
    with pytest.raises(VerificationError, match=r"logits differ from the source's by .* allowed; first in probe"):
        judge(ours, run_transformers(source, sequences), sequences, source)


@pytest.mark.parametrize(
    ("case", "change"),
    [
        (PLAIN, {"rope_scaling": None}),
        (PLAIN, {"rope_theta": 10000.0}),
        (PLAIN, {"norm_eps": 1e-2}),
        ("llama, biased, wide heads, linear rope", {"rope_scaling": None}),
        ("llama, biased, wide heads, linear rope", {"hidden_act": "silu"}),
        ("llama, biased, wide heads, linear rope", {"hidden_act": "gelu_tanh"}),
        (FUSED, {"hidden_act": "gelu_tanh"}),
        ("gpt2, wide epsilon", {"norm_eps": 1e-5}),
    ],
)
def test_a_setting_lost_on_the_way_is_seen_in_the_logits(tmp_path: Path, case: str, change: dict[str, object]) -> None:
    opened = FORMAT.open(save_model(case, tmp_path / "in"))
    sequences = probe_sequences(opened.model)
    right = engine_logits(opened.model, opened.source, sequences)
    wrong = engine_logits(opened.model.model_copy(update=change), opened.source, sequences)
    with pytest.raises(VerificationError, match="logits differ"):
        judge(wrong, right, sequences, tmp_path)


def test_logits_that_are_not_numbers_never_pass(tmp_path: Path) -> None:
    good = [np.zeros((3, 5), np.float32)]
    bad = [np.full((3, 5), np.nan, np.float32)]
    with pytest.raises(VerificationError, match="differ from the source's by inf"):
        judge(bad, good, [[1, 2, 3]], tmp_path)
    with pytest.raises(VerificationError, match="differ from the source's by inf"):
        judge(bad, bad, [[1, 2, 3]], tmp_path)


@pytest.mark.slow
def test_a_folder_that_transformers_cannot_fill_is_refused_with_its_words(tmp_path: Path) -> None:
    source = save_model(PLAIN, tmp_path / "in")
    opened = FORMAT.open(source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.normal.weight"] = tensors.pop("model.norm.weight")
    shutil.copytree(source, tmp_path / "odd")
    save_file(tensors, tmp_path / "odd/model.safetensors", {"format": "pt"})
    with pytest.raises(VerificationError, match=r"transformers cannot load it: .*model.norm.weight"):
        compare_logits(opened.model, opened.source, tmp_path / "odd")


def test_a_head_of_its_own_is_kept_apart_from_the_embedding(tmp_path: Path) -> None:
    """transformers ties the two unless the file has both."""
    source = save_model("t5, gated, not scaled, more layers that read", tmp_path / "in")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = 0.15 * torch.randn(tensors["shared.weight"].shape, generator=torch.Generator())
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' differs .* set tie_word_embeddings=false"):
        FORMAT.open(source)
    config = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": False}
    (source / "config.json").write_text(json.dumps(config))
    opened = FORMAT.open(source)
    assert not opened.model.tie_word_embeddings and opened.model.logit_scale == 1.0
    sequences = probe_sequences(opened.model)
    ours = engine_logits(opened.model, opened.source, sequences)
    assert judge(ours, run_transformers(source, sequences), sequences, source).difference <= 1e-4
