"""A base whose tokens see all others learns to label texts by its first token; what it cannot do is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from converters.merge import base_fingerprint, open_merged
from converters.open import open_checkpoint
from finetune.config import FinetuneConfig
from finetune.run import Base, Finetuning, evaluate_model
from tests.finetune.adapters import write_base
from tests.finetune.data import byte_tokenizer, config_of, letters, write_rows
from tests.helpers.models import answering_model, masked_model
from tests.helpers.ranks import run_ranks
from workbench.checkpoint.reader import open_native
from workbench.errors import ConfigError
from workbench.parallel.mesh import Mesh
from workbench.spec.layout import ParallelLayout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("first-token")
    write_base(root / "base", masked_model(vocab_size=261), tokenizer=byte_tokenizer(root / "tokenizer"))
    write_rows(root / "train.jsonl", letters(48))
    write_rows(root / "test.jsonl", letters(21, start=100))
    return root


def config(folder: Path, place: Path, kind: str = "full", steps: int = 4) -> FinetuneConfig:
    files = {name: str(folder / f"{name}.jsonl") for name in ("train", "test")}
    values = {"kind": "classification", **files}
    return config_of(folder, values, {"kind": kind}, run={"dir": str(place), "steps": steps, "seed": 5})


def base_of(folder: Path) -> Base:
    opened = open_checkpoint(folder / "base")
    return Base(opened.model, opened.source, folder / "tokenizer", str(folder / "base"), base_fingerprint(opened))


def metrics(config: FinetuneConfig, folder: Path, layout: ParallelLayout) -> dict[str, float]:
    mesh = Mesh.create(layout, torch.device("cpu"))
    return dict(Finetuning(config, base_of(folder), mesh, dtype=torch.float64).run().metrics)


def test_it_learns_and_keeps_the_pooler_of_its_base(folder: Path, tmp_path: Path) -> None:
    run = Finetuning(config(folder, tmp_path, steps=40), base_of(folder), Mesh.single())
    assert run.model.pooler and not run.model.head_transform and run.model.num_labels == 2
    found = run.run()
    assert found.metrics["test/accuracy"] > 0.9 > found.metrics["test/majority"]
    names = set(open_native(Path(found.checkpoint)).manifest.tensors)
    assert {"pooler.weight", "score.weight", "score.bias"} <= names and "lm_head.bias" not in names


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_two_layouts_see_the_same(kind: str, folder: Path, tmp_path: Path) -> None:
    expected = metrics(config(folder, tmp_path / "one", kind), folder, ParallelLayout())
    layout = ParallelLayout(tp=2, pp=2, sequence_parallel=True)
    for found in run_ranks(4, metrics, config(folder, tmp_path / "four", kind), folder, layout):
        assert found == pytest.approx(expected, rel=1e-9)


def test_an_adapter_carries_the_whole_of_its_head(folder: Path, tmp_path: Path) -> None:
    run = Finetuning(config(folder, tmp_path, "lora", steps=40), base_of(folder), Mesh.single())
    found = run.run()
    assert found.metrics["test/accuracy"] > 0.9 > found.metrics["test/majority"]
    names = {name for name in open_native(Path(found.checkpoint)).manifest.tensors if not name.startswith("optim.")}
    assert {"pooler.weight", "pooler.bias", "score.weight", "score.bias"} <= names
    assert all(name.startswith(("pooler.", "score.")) or ".lora_" in name for name in names)
    merged = open_merged(tmp_path)
    again = evaluate_model(run.config, merged.model, merged.source, folder / "tokenizer", Mesh.single())
    assert again == pytest.approx({name: found.metrics[name] for name in again}, rel=1e-4)


def test_a_task_of_text_to_go_on_with_is_refused(folder: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "sft.jsonl", [{"prompt": "a", "completion": "b"}])
    task = {"kind": "sft", "train": rows}
    wrong = config_of(folder, task, {"kind": "full"}, run={"dir": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"causal=false\) and cannot learn to go on with a text"):
        Finetuning(wrong, base_of(folder), Mesh.single())


def test_a_base_with_an_encoder_of_its_own_is_refused(folder: Path, tmp_path: Path) -> None:
    write_base(tmp_path / "base", answering_model(vocab_size=261))
    opened = open_checkpoint(tmp_path / "base")
    base = Base(opened.model, opened.source, folder / "tokenizer", str(tmp_path / "base"), base_fingerprint(opened))
    with pytest.raises(ConfigError, match=r"num_encoder_layers=2\), for which no task makes rows yet"):
        Finetuning(config(folder, tmp_path), base, Mesh.single())
