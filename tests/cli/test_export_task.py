"""`wb export --task-config`: what is written scores on the task's rows as the engine does, or does not appear."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from converters.task_reference import score
from tests.cli.test_export_adapter import run
from tests.finetune.adapters import write_adapter, write_base
from tests.finetune.data import byte_tokenizer, letters, small_model, write_rows
from workbench.cli import _task_proof
from workbench.spec.lora import LoraSpec

pytestmark = pytest.mark.timeout(600)  # fresh processes that import transformers, on a busy machine
LABELLED = small_model(num_labels=2, pad_token_id=257)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter with a head of two labels, and the configurations of two tasks."""
    root = tmp_path_factory.mktemp("task")
    base = write_base(root / "base", small_model(), tokenizer=byte_tokenizer(root / "tokenizer"))
    write_adapter(root / "adapter", LABELLED, LoraSpec(r=3, alpha=24), base)
    write_rows(root / "labels.jsonl", letters(41))
    write_rows(root / "sft.jsonl", [{"prompt": f"{chr(97 + n % 5)}->", "completion": "AB"} for n in range(12)])
    for name, kind in (("labels", "classification"), ("sft", "sft")):
        rows = root / f"{name}.jsonl"
        (root / f"{name}.toml").write_text(
            f'base = "{base}"\ntokenizer = "{root}/tokenizer"\n[task]\nkind = "{kind}"\ntrain = "{rows}"\n'
            f'test = "{rows}"\n[method]\nkind = "lora"\n[batch]\nseq_len = 32\n[run]\nsteps = 1\n'
        )
    return root


@pytest.mark.slow
def test_an_adapter_scores_in_peft_as_in_the_engine(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--to", "peft", "--task-config", folder / "labels.toml")
    code, result = run(capsys, "export", folder / "adapter", tmp_path / "out", *words)
    assert code == 0, result
    assert result["task"]["against"] == "peft" and (tmp_path / "out").is_dir()
    assert set(result["task"]["metrics"]) == {"test/loss", "test/accuracy"}
    assert 0 < result["task"]["metrics"]["test/accuracy"] <= 1


@pytest.mark.slow
def test_a_model_scores_in_transformers_as_in_the_engine_or_is_not_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("export", folder / "base", tmp_path / "out", "--task-config", folder / "sft.toml")
    honest = _task_proof._reference_metrics

    def other(*args: Any) -> dict[str, float]:
        found = honest(*args)
        return {**found, "loss": found["loss"] + 1e-2, "exact_match": found["exact_match"] + found["near_rows"] + 0.1}

    with monkeypatch.context() as patch:
        patch.setattr(_task_proof, "_reference_metrics", other)
        code, result = run(capsys, *words)
    message = result["error"]["message"]
    assert code == 4 and "test/loss is" in message and "test/exact_match is 0.1 by transformers, and 0 by" in message
    assert not any(tmp_path.iterdir())
    code, result = run(capsys, *words)
    assert code == 0, result
    assert set(result["task"]["metrics"]) == {"test/loss", "test/token_accuracy", "test/exact_match"}


@pytest.mark.slow
def test_a_tokenizer_that_makes_other_ids_than_the_task_was_learned_with_is_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (other := tmp_path / "other").mkdir()
    described = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())
    vocabulary = described["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(described))
    text = (folder / "sft.toml").read_text().replace(f"{folder}/tokenizer", str(other))
    (tmp_path / "sft.toml").write_text(text)
    words = ("export", folder / "base", tmp_path / "out", "--task-config", tmp_path / "sft.toml")
    code, result = run(capsys, *words)
    assert code == 4 and not (tmp_path / "out").exists()
    message = result["error"]["message"]
    assert (
        "the text of held-out row 0: transformers makes 5 tokens of it" in message
        and "token 0 is [64] there and [65] here" in message
    )


def test_what_transformers_does_not_judge_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (folder / "labels.toml").read_text().replace('"classification"', '"regression"')
    (tmp_path / "other.toml").write_text(text)
    for words, message in (
        (("--task-config", tmp_path / "other.toml"), "is not asked for the metrics of task 'regression'"),
        (("--task-config", folder / "sft.toml", "--to", "dcp"), "use it --to hf or peft"),
        (("--task-config", folder / "sft.toml", "--verify", "full"), "with --verify logits"),
    ):
        code, result = run(capsys, "export", folder / "base", tmp_path / "out", *words)
        assert code == 2 and message in result["error"]["message"]


def test_labels_that_rounding_may_decide_are_counted() -> None:
    logits = torch.tensor([[1.0, 1.0 + 5e-5, 0.0], [3.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    rows = [{"inputs": {"input_ids": [1, 2, 3]}, "labels": labels} for labels in ([0, 0, -100], [-100, 0, 1])]
    found = score(lambda **inputs: {"logits": logits[None]}, rows, "logits", 1e-4)
    assert found["accuracy"] == 3 / 4 and found["exact_match"] == 1 / 2
    assert found["near_labels"] == 1 / 4 and found["near_rows"] == 1 / 2
    expected = torch.nn.functional.cross_entropy(logits[[0, 1, 1, 2]], torch.tensor([0, 0, 0, 1]))
    assert found["loss"] == pytest.approx(float(expected))
