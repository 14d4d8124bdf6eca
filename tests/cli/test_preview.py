"""`wb data preview` of rows: what a run would learn, marked, from a configuration or straight from a file."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from tests.finetune.adapters import write_base
from tests.finetune.data import byte_tokenizer, small_model, write_rows
from tests.finetune.test_chat import MARKED
from workbench.cli._preview import preview_rows
from workbench.cli.common import Output
from workbench.cli.main import main

TALK = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
SFT = """base = "base"
[task]
kind = "sft"
train = ["talks.jsonl", "answers.csv"]
[task.columns]
[method]
kind = "full"
[batch]
seq_len = 64
packing = true
[run]
steps = 1
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_base(Path("base"), small_model(), tokenizer=byte_tokenizer(Path("tokenizer"), chat_template=MARKED))
    write_rows(Path("talks.jsonl"), [TALK, TALK | {"system": "s"}])
    Path("questions.csv").write_text("question,answer\ntwo and two?,four\nthree?,3\n")
    Path("answers.csv").write_text("prompt,completion\ntwo and two?,four\n")
    Path("sft.toml").write_text(SFT)


def answer(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> Any:
    capsys.readouterr()
    assert main([*words, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_a_configuration_shows_spans_and_the_survey(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "data", "preview", "sft.toml", "-n", "2")
    assert [one["place"] for one in found["samples"]] == ["talks.jsonl:1", "talks.jsonl:2"]
    assert found["samples"][0]["spans"] == [
        {"text": "<|im_start|>userq<|im_end|><|im_start|>assistant", "supervised": False},
        {"text": "a<|im_end|>", "supervised": True},
    ]
    assert found["rows"] == {"train": 3} and found["packed_rows"] == 1 and found["supervised_tokens"]["max"] == 5


def test_a_file_shows_its_shape_without_a_tokenizer(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "data", "preview", "questions.csv", "--map", "prompt=question", "--map", "completion=answer")
    assert found["read_as"] == "2 rows of prompts (prompt, completion)"
    assert [s["text"] for s in found["samples"][0]["spans"] if s["supervised"]] == ["four"]
    assert main(["data", "preview", "talks.jsonl", "-n", "1"]) == 0
    shown = capsys.readouterr().out
    assert "--- talks.jsonl:1\nuser: q\nassistant: [a]" in shown and "2 rows of sharegpt" in shown


def test_a_file_shows_its_tokens_with_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "preview", "answers.csv", "--tokenizer", "tokenizer"]) == 0
    assert "tokens 16, supervised 5\ntwo and two?[four<|endoftext|>]" in capsys.readouterr().out


def test_a_terminal_shows_colours_in_place_of_brackets() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Output(stdout=Terminal())
    preview_rows(out, "answers.csv", tokenizer=None, maps=(), seq_len=0, count=1, chars=400)
    shown = out.stdout.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[1;32mfour\x1b[0m" in shown and "[four]" not in shown


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["questions.csv"], 5, "has question, answer; recognised would be"),
        (["questions.csv", "--map", "prompt"], 2, "--map prompt: write --map NAME=COLUMN"),
        (["questions.csv", "--map", "prompt=qestion"], 5, "no column 'qestion'; did you mean 'question'?"),
        (["sft.toml", "--map", "promt=question"], 5, "no column 'question'"),
        (["tokens", "--map", "prompt=question"], 2, "tokens is a token file, which has no columns"),
        (["sft.toml", "--seq-len", "4"], 5, "rows have no token to learn within 4 tokens"),
    ],
)
def test_faults_have_a_sentence_and_an_exit_code(
    words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in answer(capsys, "data", "preview", *words, code=code)["error"]["message"]
