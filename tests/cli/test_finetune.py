"""wb finetune, eval and merge, from the words of the command line to what lies on the disk."""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.finetune.adapters import write_base
from tests.finetune.data import byte_tokenizer, letters, small_model, write_rows
from workbench.cli.main import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, rows, and a configuration that trains a LoRA classifier on one process."""
    root = tmp_path_factory.mktemp("cli")
    write_base(root / "base", small_model(), tokenizer=byte_tokenizer(root / "tokenizer"))
    train = write_rows(root / "train.jsonl", letters(48))
    test = write_rows(root / "test.jsonl", letters(21, start=100))
    (root / "lora.toml").write_text(
        f"""base = "{root}/base"
[task]
kind = "classification"
train = "{train}"
test = "{test}"
[method]
kind = "lora"
r = 4
[batch]
global_size = 8
micro_size = 4
seq_len = 32
[optim]
lr = 5e-3
schedule = "constant"
[run]
dir = "{root}/run"
steps = 30
"""
    )
    return root


def answer(words: list[str], capsys: pytest.CaptureFixture[str], *, code: int = 0) -> Any:
    capsys.readouterr()
    assert main([*words, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_a_lora_run_is_judged_merged_and_judged_again_alike(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(folder / "lora.toml")
    trained = answer(["finetune", config], capsys)
    scores = {name: value for name, value in trained["metrics"].items() if name.startswith("test/")}
    assert scores["test/accuracy"] > scores["test/majority"] and trained["trained_parameters"] < trained["parameters"]
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["test/accuracy"] == scores["test/accuracy"] and (folder / "run" / "DONE").exists()

    attached = answer(["eval", str(folder / "run"), "--task-config", config], capsys)["metrics"]
    assert attached == pytest.approx(scores, rel=1e-4)
    answer(["merge", str(folder / "run"), str(folder / "merged"), "--tp", "2", "--verify", "full"], capsys)
    merged = answer(["eval", str(folder / "merged"), "--task-config", config], capsys)["metrics"]
    assert merged == attached

    named = ["--adapter", f"ours={folder / 'run'}"]
    switched = answer(["eval", str(folder / "base"), *named, "--task-config", config], capsys)["metrics"]
    assert switched == {f"ours/{name}": value for name, value in attached.items()}
    untrained = answer(["eval", str(folder / "base"), "--task-config", config], capsys, code=2)["error"]["message"]
    assert "has the language-model head, but the task 'classification' needs a head of 2 labels" in untrained
    again = answer(["merge", str(folder / "merged"), str(folder / "twice")], capsys, code=3)["error"]["message"]
    assert "is a whole model, so there is nothing to merge" in again


def test_the_best_checkpoint_of_a_run_is_named_and_can_be_judged(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = str(folder / "lora.toml"), str(folder / "kept")
    words = [f"task.valid={folder}/test.jsonl", "task.test=[]", f"run.dir={run}", "run.steps=40", "optim.lr=2e-2"]
    words += ["eval.every=4", "eval.metric=valid/accuracy", "eval.patience=2", "checkpoint.keep_best=true"]
    found = answer(["finetune", config, *words, "checkpoint.keep=1"], capsys)
    assert found["ended_by"] == "patience" and found["step"] == found["best"]["step"] + 8
    scores = answer(["eval", run, "--task-config", config, *words, "--best"], capsys)
    assert scores["checkpoint"].endswith(f"step-{found['best']['step']:08d}")
    assert scores["metrics"]["valid/accuracy"] == found["best"]["value"]
    assert answer(["runs", run], capsys)["runs"][0]["best_step"] == found["best"]["step"]


def test_public_benchmarks_are_run_on_an_export_and_refused_without_the_harness(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    export = str(folder / "hf")
    answer(["export", str(folder / "base"), export], capsys)
    for words, message in (
        ([str(folder / "base")], f"`wb export {folder}/base DST` writes one"),
        ([export], "pip install 'workbench[harness]'"),
        ([export, "--task-config", "x.toml"], "not both"),
    ):
        assert message in answer(["eval", *words, "--harness", "arc_easy"], capsys, code=2)["error"]["message"]
    asked: dict[str, Any] = {}

    def simple_evaluate(**given: Any) -> dict[str, Any]:
        asked.update(given)
        return {"results": {"arc_easy": {"alias": "arc_easy", "acc,none": 0.5, "acc_stderr,none": 0.1}}}

    harness = ModuleType("lm_eval")
    harness.simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    harness.__spec__ = ModuleSpec("lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval", harness)
    found = answer(["eval", export, "--harness", "arc_easy,piqa", "--limit", "5"], capsys)
    assert found["metrics"] == {"arc_easy/acc": 0.5, "arc_easy/acc_stderr": 0.1}
    assert asked == {"model": "hf", "model_args": {"pretrained": export}, "tasks": ["arc_easy", "piqa"], "limit": 5}


def test_a_dry_run_reads_everything_and_starts_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["finetune", str(folder / "lora.toml"), f"run.dir={folder}/dry", "--dry-run"]
    found = answer(words, capsys)
    assert found["rows"] == {"train": 48, "test": 21} and not (folder / "dry").exists()


def test_rows_of_other_columns_are_surveyed_before_any_rank_starts(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"sentence": row["text"], "kind": row["label"]} for row in letters(8)]
    train = write_rows(folder / "other.jsonl", [*rows, rows[0]])
    maps = ["--map", "text=sentence", "--map", "label=kind"]
    words = ["finetune", str(folder / "lora.toml"), f"task.train={train}", "task.test=[]", *maps, "--dry-run"]
    assert main(words) == 0
    captured = capsys.readouterr()
    assert "train      9 rows of labels (text, label)" in captured.out and "labels     even " in captured.out
    assert "warning: 1 rows of train are there before" in captured.err and "other.jsonl:9)" in captured.err


@pytest.mark.parametrize(
    ("overrides", "code", "message"),
    [
        (["base=nowhere"], 5, "nowhere: no such checkpoint"),
        (['method.targets=["q_prj"]'], 2, "no projection 'q_prj'; did you mean 'q_proj'?"),
        (["task.train=gone.jsonl"], 5, "gone.jsonl: no such file"),
        (["batch.packing=true"], 2, "examples of task 'classification' cannot share a row"),
        (["parallel.tp=3", "--nproc", "3"], 3, "num_attention_heads=4 cannot be split over tp=3"),
        (["method.rr=3"], 2, "method.rr: unknown key"),
    ],
)
def test_faults_have_a_sentence_and_an_exit_code(
    overrides: list[str], code: int, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["finetune", str(folder / "lora.toml"), f"run.dir={folder}/faults", *overrides]
    assert message in answer(words, capsys, code=code)["error"]["message"]
