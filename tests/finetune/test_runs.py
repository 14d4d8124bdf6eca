"""Runs from a base: what a fresh adapter leaves alone, what is learned, what is saved, and how a run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from converters.job import JobOptions, make_job
from converters.merge import base_fingerprint
from converters.open import get_format, open_checkpoint
from finetune.config import FinetuneConfig
from finetune.run import Base, Finetuning, evaluate_model
from tests.finetune.adapters import write_base
from tests.finetune.data import byte_tokenizer, config_of, letters, small_model, write_rows
from tests.helpers.ranks import run_ranks
from workbench.checkpoint.reader import open_native
from workbench.errors import CheckpointError, ConfigError, DataError
from workbench.models.batch import Batch
from workbench.models.generate import load_model
from workbench.parallel.mesh import Mesh
from workbench.spec.geometry import Box
from workbench.spec.layout import ParallelLayout
from workbench.spec.lora import LoraSpec, adapter_tensors
from workbench.spec.model import ModelConfig
from workbench.spec.schema import logical_tensors

LORA = {"kind": "lora", "r": 3}
FULL = {"kind": "full"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a tokenizer, and rows of both tasks."""
    root = tmp_path_factory.mktemp("finetune")
    write_base(root / "base", small_model(), tokenizer=byte_tokenizer(root / "tokenizer"))
    write_rows(root / "train.jsonl", letters(48))
    write_rows(root / "test.jsonl", letters(21, start=100))
    write_rows(
        root / "sft.jsonl", [{"prompt": f"{chr(97 + n % 5)}->", "completion": chr(65 + n % 5)} for n in range(24)]
    )
    return root


def labels(folder: Path, method: dict[str, Any], place: Path, **tables: Any) -> FinetuneConfig:
    task = {"kind": "classification", "train": str(folder / "train.jsonl"), "test": str(folder / "test.jsonl")}
    return config_of(folder, task, method, run={"dir": str(place), **tables.pop("run", {})}, **tables)


def answers(folder: Path, method: dict[str, Any], place: Path, **tables: Any) -> FinetuneConfig:
    task = {"kind": "sft", "train": str(folder / "sft.jsonl"), "valid": str(folder / "sft.jsonl")}
    return config_of(folder, task, method, run={"dir": str(place), **tables.pop("run", {})}, **tables)


def base_of(folder: Path, path: str = "base") -> Base:
    opened = open_checkpoint(folder / path)
    fingerprint = base_fingerprint(opened)
    return Base(opened.model, opened.source, folder / "tokenizer", str(folder / path), fingerprint)


def arrays(path: str | Path) -> dict[str, np.ndarray]:
    source = open_native(Path(path))
    return {name: source.read(name, Box.whole(tensor.shape)) for name, tensor in source.schema.items()}


def test_a_fresh_adapter_leaves_the_logits_as_they_were(folder: Path, tmp_path: Path) -> None:
    run = Finetuning(answers(folder, LORA, tmp_path), base_of(folder), Mesh.single())
    base = open_checkpoint(folder / "base")
    ids = Batch(torch.arange(20).view(2, 10))
    with torch.no_grad():
        expected = load_model(base.model, base.source)(None, ids, "logits")
        assert torch.equal(run.trainer.built.module(None, ids, "logits"), expected)


@pytest.mark.parametrize("method", [LORA, FULL], ids=lambda method: method["kind"])
def test_a_run_learns_its_task_and_says_how_well(method: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    found = Finetuning(labels(folder, method, tmp_path / "c", run={"steps": 30}), base_of(folder), Mesh.single()).run()
    assert found.metrics["test/accuracy"] > 0.9 > found.metrics["test/majority"]
    assert found.metrics["test/rows"] == 21
    found = Finetuning(answers(folder, method, tmp_path / "s", run={"steps": 40}), base_of(folder), Mesh.single()).run()
    assert found.metrics["valid/exact_match"] == 1.0


def test_an_adapter_checkpoint_holds_pairs_head_and_moments_and_names_its_base(folder: Path, tmp_path: Path) -> None:
    base = base_of(folder)
    result = Finetuning(labels(folder, LORA, tmp_path), base, Mesh.single()).run()
    manifest = open_native(Path(result.checkpoint)).manifest
    trained = adapter_tensors(manifest.model, LoraSpec(r=3), "F32")
    assert "score.weight" in trained and manifest.model.num_labels == 2
    moments = {f"optim.{kind}/{name}" for kind in ("exp_avg", "exp_avg_sq") for name in trained}
    assert set(manifest.tensors) == set(trained) | moments
    assert manifest.adapter is not None and manifest.adapter.lora == LoraSpec(r=3)
    assert (manifest.adapter.base, manifest.adapter.base_fingerprint) == (base.path, base.fingerprint)
    assert "tokenizer.json" in manifest.tokenizer


def test_a_full_run_saves_an_ordinary_checkpoint(folder: Path, tmp_path: Path) -> None:
    result = Finetuning(answers(folder, FULL, tmp_path), base_of(folder), Mesh.single()).run()
    manifest = open_native(Path(result.checkpoint)).manifest
    weights = [name for name in manifest.tensors if not name.startswith("optim.")]
    assert manifest.adapter is None and set(weights) == set(logical_tensors(small_model(), "F32"))


@pytest.mark.parametrize("method", [LORA, FULL], ids=lambda method: method["kind"])
def test_a_run_that_goes_on_ends_as_one_that_never_stopped(
    method: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    whole = Finetuning(labels(folder, method, tmp_path / "a", run={"steps": 6}), base_of(folder), Mesh.single()).run()
    for steps in (3, 6):
        config = labels(folder, method, tmp_path / "b", run={"steps": steps})
        parts = Finetuning(config, base_of(folder), Mesh.single()).run()
    expected, found = arrays(whole.checkpoint), arrays(parts.checkpoint)
    assert set(found) == set(expected)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def train_at(config: FinetuneConfig, folder: Path, layout: ParallelLayout) -> dict[str, float]:
    mesh = Mesh.create(layout, torch.device("cpu"))
    result = Finetuning(config, base_of(folder), mesh, dtype=torch.float64).run()
    return dict(result.metrics)


@pytest.mark.parity
@pytest.mark.parametrize("method", [LORA, FULL], ids=lambda method: method["kind"])
@pytest.mark.parametrize(
    "layout",
    [
        ParallelLayout(tp=2, dp=2),
        ParallelLayout(tp=2, pp=2),
        ParallelLayout(dp=2, shard="zero3"),
        ParallelLayout(tp=2, cp=2, sequence_parallel=True),
    ],
    ids=str,
)
def test_a_run_at_any_layout_is_the_run_of_one_process(
    layout: ParallelLayout, method: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    one = Finetuning(labels(folder, method, tmp_path / "a"), base_of(folder), Mesh.single(), dtype=torch.float64).run()
    config = labels(folder, method, tmp_path / "b")
    for found in run_ranks(layout.world_size, train_at, config, folder, layout):
        assert found == pytest.approx(dict(one.metrics), rel=1e-9)
    expected = arrays(one.checkpoint)
    there = arrays(tmp_path / "b" / "checkpoints" / Path(one.checkpoint).name)
    assert set(there) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(there[name], values, rtol=0, atol=1e-9 * max(np.abs(values).max(), 1e-30))


def test_a_run_goes_on_at_another_layout(folder: Path, tmp_path: Path) -> None:
    whole = labels(folder, LORA, tmp_path / "a", run={"steps": 6})
    expected = arrays(Finetuning(whole, base_of(folder), Mesh.single(), dtype=torch.float64).run().checkpoint)
    run_ranks(2, train_at, labels(folder, LORA, tmp_path / "b", run={"steps": 3}), folder, ParallelLayout(tp=2))
    rest = labels(folder, LORA, tmp_path / "b", run={"steps": 6})
    found = arrays(Finetuning(rest, base_of(folder), Mesh.single(), dtype=torch.float64).run().checkpoint)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=0, atol=1e-9 * max(np.abs(values).max(), 1e-30))


def test_answers_are_judged_alike_where_ranks_share_tokens(folder: Path, tmp_path: Path) -> None:
    one = Finetuning(answers(folder, LORA, tmp_path / "a"), base_of(folder), Mesh.single(), dtype=torch.float64).run()
    config, layout = answers(folder, LORA, tmp_path / "b"), ParallelLayout(cp=2, context="ring")
    for found in run_ranks(2, train_at, config, folder, layout):
        assert found == pytest.approx(dict(one.metrics), rel=1e-9)


def test_the_score_of_a_saved_model_is_the_score_of_its_run(folder: Path, tmp_path: Path) -> None:
    config = labels(folder, FULL, tmp_path)
    result = Finetuning(config, base_of(folder), Mesh.single()).run()
    saved = open_checkpoint(Path(result.checkpoint))
    found = evaluate_model(config, saved.model, saved.source, saved.tokenizer, Mesh.single())
    assert found == {name: value for name, value in result.metrics.items() if name.startswith("test/")}


def test_a_changed_adapter_or_base_is_not_gone_on_with(folder: Path, tmp_path: Path) -> None:
    Finetuning(answers(folder, LORA, tmp_path), base_of(folder), Mesh.single()).run()
    with pytest.raises(ConfigError, match=r"method.r is 4, was 3"):
        Finetuning(answers(folder, {**LORA, "r": 4}, tmp_path), base_of(folder), Mesh.single())
    with pytest.raises(ConfigError, match="holds an adapter, not a whole model"):
        Finetuning(answers(folder, FULL, tmp_path), base_of(folder), Mesh.single())
    base = base_of(folder)
    other = Base(base.model, base.source, base.tokenizer, "other", "0" * 16)
    with pytest.raises(ConfigError, match="the base other holds other weights than"):
        Finetuning(answers(folder, LORA, tmp_path), other, Mesh.single())


def test_a_target_that_the_model_does_not_have_is_refused_with_the_nearest(folder: Path, tmp_path: Path) -> None:
    config = answers(folder, {**LORA, "targets": ["q_porj", "v_proj"]}, tmp_path)
    with pytest.raises(ConfigError, match=r"no projection 'q_porj'; did you mean 'q_proj'\? \(it has embed_tokens,"):
        Finetuning(config, base_of(folder), Mesh.single())


def test_rows_longer_than_the_model_and_foreign_tokenizers_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"batch.seq_len=65 is longer than model.max_position_embeddings=64"):
        Finetuning(answers(folder, FULL, tmp_path, batch={"seq_len": 65}), base_of(folder), Mesh.single())
    base = base_of(folder)
    small = Base(base.model.model_copy(update={"vocab_size": 100}), base.source, base.tokenizer, "base", "")
    with pytest.raises(DataError, match=r"gives ids up to 259, but the model's vocab_size is 100"):
        Finetuning(answers(folder, FULL, tmp_path), small, Mesh.single())


def test_a_base_without_its_language_head_cannot_learn_answers(folder: Path, tmp_path: Path) -> None:
    base = base_of(folder)
    classifier = Base(base.model.model_copy(update={"num_labels": 2}), base.source, base.tokenizer, "base", "")
    with pytest.raises(ConfigError, match="head of 2 labels in place of its language-model head"):
        Finetuning(answers(folder, FULL, tmp_path), classifier, Mesh.single())


def test_a_base_that_lacks_a_weight_is_refused(folder: Path, tmp_path: Path) -> None:
    base = base_of(folder)
    model: ModelConfig = base.model.model_copy(update={"num_hidden_layers": 3})
    with pytest.raises(CheckpointError, match=r"layers.2.self_attn.q_proj.weight is missing"):
        Finetuning(answers(folder, LORA, tmp_path), Base(model, base.source, base.tokenizer, "base", ""), Mesh.single())


def test_a_base_is_the_same_in_any_format_and_at_any_layout(folder: Path, tmp_path: Path) -> None:
    native = open_checkpoint(folder / "base")
    for name, path, layout in (
        ("native", tmp_path / "cut", ParallelLayout(tp=4, pp=2)),
        ("huggingface", tmp_path / "hf", ParallelLayout()),
    ):
        options = JobOptions(layout=layout, optimizer="drop")
        make_job(native, get_format(name), path, options, operation="export").run()
    results = {}
    for path in (folder / "base", tmp_path / "cut", tmp_path / "hf"):
        opened = open_checkpoint(path)
        base = Base(opened.model, opened.source, folder / "tokenizer", str(path), base_fingerprint(opened))
        run = Finetuning(labels(folder, LORA, tmp_path / "run" / path.name), base, Mesh.single()).run()
        manifest = open_native(Path(run.checkpoint)).manifest
        assert manifest.adapter is not None
        tensors = {name: stored.fingerprint for name, stored in manifest.tensors.items()}
        results[path.name] = (dict(run.metrics), tensors, manifest.adapter.base_fingerprint)
    assert results["cut"] == results["hf"] == results["base"]
