"""`wb data` and `wb tokenizer` from the outside."""

import json
from pathlib import Path

import pytest

from tests.pretrain.data.helpers import TEXT, small_tokenizer, write_tokens
from workbench.cli.main import main


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with three documents in corpus.jsonl and a tokenizer of 290."""
    monkeypatch.chdir(tmp_path)
    small_tokenizer(tmp_path)
    lines = [json.dumps({"text": f"document {number}\n{TEXT}"}) for number in range(3)]
    Path("corpus.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_text_becomes_a_tokenizer_then_token_files_then_text_again(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = answer(capsys, "tokenizer", "train", "corpus.jsonl", "mine", "--vocab-size", "300")
    assert (trained["vocab_size"], trained["eos_id"], trained["pad_id"]) == (300, 0, 1)
    (built,) = answer(capsys, "data", "build", "corpus.jsonl", "out/corpus", "--tokenizer", "mine")["built"]
    assert (built["documents"], built["path"]) == (3, "out/corpus")
    info = answer(capsys, "data", "info", "out/corpus.bin", "--verify")
    assert (info["documents"], info["tokens"], info["dtype"]) == (3, built["tokens"], "uint16")
    assert info["tokenizer_sha256"] == trained["sha256"] and info["largest_id"] < 300
    shown = answer(capsys, "data", "preview", "out/corpus", "-n", "2")["documents"]
    assert [one["text"][:10] for one in shown] == ["document 0", "document 1"]


def test_a_preview_of_samples_shows_what_a_run_would_train_on(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pretrain.data.config import DataConfig, open_data
    from workbench.tokenizer import Tokenizer

    assert main(["data", "build", "corpus.jsonl", "a", "--tokenizer", "tokenizer"]) == 0
    capsys.readouterr()
    shown = answer(capsys, "data", "preview", "a", "--seq-len", "32", "--seed", "7", "-n", "4")["samples"]
    data = open_data(DataConfig.model_validate({"train": "a", "seed": 7}), seq_len=32)
    batch = data.train.batch(0, global_size=4, micro_size=4, dp_rank=0, dp_size=1)[0]
    decode = Tokenizer.load("tokenizer").decode
    assert [one["text"] for one in shown] == [decode(row, skip_special_tokens=False) for row in batch.input_ids]


def test_a_build_in_words_says_what_came_out_and_what_is_next(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "build", "corpus.jsonl", "a", "--tokenizer", "tokenizer"]) == 0
    assert "a: 3 documents" in capsys.readouterr().out
    assert main(["data", "preview", "a"]) == 0
    assert "--- document 0, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["data", "build", "corpus.jsonl", "a"], 2, "no tokenizer given; add --tokenizer FOLDER"),
        (["data", "build", "nowhere", "a", "--tokenizer", "tokenizer"], 5, "nowhere: no such file or folder"),
        (["data", "build", "corpus.jsonl", "a", "--tokenizer", "absent"], 5, "absent: no such tokenizer folder"),
        (["data", "build", "corpus.jsonl", "old", "--tokenizer", "tokenizer"], 5, "old.idx: exists already"),
        (
            ["data", "build", "corpus.jsonl", "a", "--tokenizer", "tokenizer", "--field", "body"],
            5,
            "corpus.jsonl:1: no",
        ),
        (["data", "info", "absent"], 5, "absent.idx: no such token file"),
        (["data", "preview", "old"], 5, "does not say what it was tokenized with"),
        (["tokenizer", "train", "corpus.jsonl", "tokenizer"], 5, "tokenizer: exists already"),
        (["tokenizer", "train", "corpus.jsonl", "new", "--vocab-size", "9"], 5, "vocab_size=9"),
    ],
)
def test_faults_end_with_their_exit_code_and_one_sentence(
    corpus: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, message: str
) -> None:
    write_tokens(Path("old"), [4, 5])
    before = sorted(path.name for path in corpus.iterdir())
    assert main(words) == code
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in corpus.iterdir()) == before
