"""What a run may ask for besides: smoothed labels, noise, microbatches of any size; the same at every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from converters.merge import base_fingerprint
from converters.open import open_checkpoint
from finetune.config import FinetuneConfig
from finetune.run import Base, Finetuning
from tests.finetune.adapters import write_base
from tests.finetune.data import byte_tokenizer, config_of, letters, small_model, write_rows
from tests.helpers.ranks import run_ranks
from workbench.models.batch import Batch
from workbench.parallel.mesh import Mesh
from workbench.spec.layout import ParallelLayout

KINDS = ["sft", "classification"]
METHODS = [{"kind": "lora", "r": 3}, {"kind": "full"}]
Trace = tuple[list[float], list[float], dict[str, float]]
"""Loss and gradient norm of each step, and the metrics at the end."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("comforts")
    write_base(root / "base", small_model(), tokenizer=byte_tokenizer(root / "tokenizer"))
    write_rows(root / "classification.jsonl", letters(24))
    answers = [{"prompt": "a" * (n % 5), "completion": chr(65 + n % 5) * (1 + n % 4)} for n in range(24)]
    write_rows(root / "sft.jsonl", answers)
    return root


class Recorder:
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []

    def started(self, facts: Any) -> None: ...
    def stepped(self, done: int, total: int | None) -> None: ...
    def saved(self, checkpoint: Path) -> None: ...

    def measured(self, row: Any) -> None:
        if "loss" in row:
            self.losses.append(row["loss"])
            self.norms.append(row["grad_norm"])


def config(folder: Path, place: Path, kind: str, method: dict[str, Any], **tables: Any) -> FinetuneConfig:
    rows = str(folder / f"{kind}.jsonl")
    task = {"kind": kind, "train": rows, "valid": rows, **tables.pop("task", {})}
    return config_of(folder, task, method, run={"dir": str(place)}, **tables)


def trace(config: FinetuneConfig, folder: Path, layout: ParallelLayout) -> Trace:
    opened = open_checkpoint(folder / "base")
    base = Base(opened.model, opened.source, folder / "tokenizer", str(folder / "base"), base_fingerprint(opened))
    mesh = Mesh.single() if layout.world_size == 1 else Mesh.create(layout, torch.device("cpu"))
    recorder = Recorder()
    result = Finetuning(config, base, mesh, watcher=recorder, dtype=torch.float64).run()
    return recorder.losses, recorder.norms, dict(result.metrics)


def assert_same(found: Trace, expected: Trace) -> None:
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-10)
    assert found[2] == pytest.approx(expected[2], rel=1e-10)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["kind"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_size_of_microbatches_changes_neither_loss_nor_update(
    kind: str, method: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    """Rows have unequal numbers of labels, so a mean of means would differ."""
    traces = {
        size: trace(
            config(folder, tmp_path / str(size), kind, method, batch={"micro_size": size}), folder, ParallelLayout()
        )
        for size in (1, 2, 8)
    }
    assert len(traces[8][0]) == 4
    assert_same(traces[1], traces[8])
    assert_same(traces[2], traces[8])


@pytest.mark.parity
@pytest.mark.parametrize("layout", [ParallelLayout(tp=2, pp=2), ParallelLayout(tp=2, cp=2)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_smoothing_and_noise_are_the_same_at_every_layout(
    kind: str, layout: ParallelLayout, folder: Path, tmp_path: Path
) -> None:
    method, asked = METHODS[0], {"label_smoothing": 0.1, "neftune_alpha": 5.0}
    plain = trace(config(folder, tmp_path / "plain", kind, method), folder, ParallelLayout())
    one = trace(config(folder, tmp_path / "one", kind, method, task=asked), folder, ParallelLayout())
    assert one[0][0] != pytest.approx(plain[0][0], rel=1e-3)
    four = config(folder, tmp_path / "four", kind, method, task=asked)
    assert_same(run_ranks(4, trace, four, folder, layout)[0], one)


@pytest.mark.parametrize("chunk", [0, 3])
def test_labels_are_smoothed_while_training_and_whole_when_judging(chunk: int, folder: Path, tmp_path: Path) -> None:
    settings = config(folder, tmp_path, "sft", METHODS[1], task={"label_smoothing": 0.2})
    settings = settings.model_copy(update={"kernels": settings.kernels.model_copy(update={"loss_chunk_tokens": chunk})})
    opened = open_checkpoint(folder / "base")
    base = Base(opened.model, opened.source, folder / "tokenizer", "base", base_fingerprint(opened))
    stage = Finetuning(settings, base, Mesh.single(), dtype=torch.float64).trainer.built.module
    ids, labels = torch.arange(20).view(2, 10), torch.arange(20, 40).view(2, 10)
    logits = stage(None, Batch(ids), "logits").flatten(0, 1)
    for smoothing, mode in ((0.2, stage.train), (0.0, stage.eval)):
        mode()
        expected = F.cross_entropy(logits, labels.flatten(), reduction="sum", label_smoothing=smoothing)
        torch.testing.assert_close(stage(None, Batch(ids, labels), "loss"), expected, rtol=1e-12, atol=0)


def test_noise_is_as_large_as_its_authors_say_and_never_there_when_judging(folder: Path, tmp_path: Path) -> None:
    """Each element is uniform in +-alpha / sqrt(T D), so its mean square is a third of the bound's."""
    from workbench.models.batch import local_batch
    from workbench.parallel.dropout import DropoutKey

    settings = config(folder, tmp_path, "sft", METHODS[1], task={"neftune_alpha": 5.0})
    opened = open_checkpoint(folder / "base")
    base = Base(opened.model, opened.source, folder / "tokenizer", "base", base_fingerprint(opened))
    stage = Finetuning(settings, base, Mesh.single(), dtype=torch.float64).trainer.built.module
    ids = torch.arange(60).view(2, 30)
    lengths = torch.tensor([30, 12])
    key = DropoutKey(1, 2, torch.tensor([3, 4]))
    with torch.no_grad():
        clean, noisy = (
            stage._embed(local_batch(Batch(ids, lengths=lengths, dropout=found), stage.mesh), "embed")
            for found in (None, key)
        )
    noise = noisy - clean
    for row, length in enumerate(lengths.tolist()):
        bound = 5.0 / (length * stage.model.hidden_size) ** 0.5
        assert noise[row].abs().max() <= bound
        assert noise[row].square().mean().item() == pytest.approx(bound**2 / 3, rel=0.15)
    assert torch.equal(stage(None, Batch(ids), "logits"), stage(None, Batch(ids), "logits"))
