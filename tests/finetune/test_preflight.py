"""What is suspicious in the data is said before any rank starts, with the rows and the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune.pieces import pieces_of_example, pieces_of_row, shortened
from finetune.preflight import Survey, survey
from finetune.rows import Row
from finetune.tasks.classification import TASK as CLASSIFICATION
from finetune.tasks.classification import ClassificationTable
from finetune.tasks.preference import TASK as PREFERENCE
from finetune.tasks.preference import PreferenceTable
from finetune.tasks.sft import TASK as SFT
from finetune.tasks.sft import SftTable
from tests.finetune.data import byte_tokenizer, small_model, write_rows
from workbench.tokenizer import Tokenizer

ANSWERS = [{"prompt": "p", "completion": "x" * n} for n in (1, 2, 3, 2, 5)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(byte_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def sft(folder: Path, tokenizer: Tokenizer, packed_tokens: int | None = None, **tables: Any) -> Survey:
    files = {name: write_rows(folder / f"{name}.jsonl", rows) for name, rows in {"train": ANSWERS, **tables}.items()}
    prepared = SFT.prepare(SftTable.model_validate(files), tokenizer, model=small_model(), max_tokens=5)
    return survey(prepared, seed=1, packed_tokens=packed_tokens)


def test_it_says_what_was_recognised_and_how_much_is_learned(tokenizer: Tokenizer, tmp_path: Path) -> None:
    found = sft(tmp_path, tokenizer, packed_tokens=8, valid=[{"instruction": "i", "output": "a"}])
    assert found.facts["rows"] == {"train": 5, "valid": 1}
    assert found.facts["supervised_tokens"] == {"min": 2, "median": 3.0, "max": 5}
    assert found.facts["row_tokens"] == {"min": 2, "median": 3.0, "max": 5} and found.facts["packed_rows"] == 3
    assert found.told[0] == "train      5 rows of prompts (prompt, completion)"
    assert found.told[1] == "valid      1 rows of alpaca (instruction, output, input or not)"
    assert found.told[3] == "supervised 2 to 5, median 3, tokens a row of train"
    assert found.told[4] == "packing    5 examples in 3 rows, 71% full"


def test_it_names_rows_that_are_cut_repeated_or_judged_by_what_they_were_learned_from(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    cut, again, leaked = sft(tmp_path, tokenizer, test=[ANSWERS[0], {"prompt": "p", "completion": "z"}]).warnings
    assert "1 rows are longer than 5 tokens" in cut and "train.jsonl:5" in cut
    assert again.startswith("1 rows of train are there before") and "train.jsonl:4" in again and "remove them" in again
    assert leaked.startswith("1 of 2 rows of test are rows of train") and "test.jsonl:1" in leaked


def test_it_shows_how_labels_are_balanced_and_which_are_not_there(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [{"text": "t" * n, "label": "a" if n % 4 else "b"} for n in range(1, 9)]
    table = ClassificationTable(train=(write_rows(tmp_path / "train.jsonl", rows),), labels=("a", "b", "c"))
    found = survey(CLASSIFICATION.prepare(table, tokenizer, model=small_model(), max_tokens=9), seed=1)
    assert found.facts["labels"] == {"a": 6, "b": 2, "c": 0}
    assert found.told[2] == "labels     a 6 (75%), b 2 (25%), c 0 (0%)"
    assert list(found.warnings) == ["no row of train has the label c; add some, or take it out of task.labels"]


def test_rows_with_several_labels_count_for_each(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [{"text": "t", "labels": ["a", "b"]}, {"text": "u", "labels": ["b"]}, {"text": "v", "labels": []}]
    train = (write_rows(tmp_path / "train.jsonl", rows),)
    table = ClassificationTable(train=train, labels=("a", "b", "c"))
    found = survey(CLASSIFICATION.prepare(table, tokenizer, model=small_model(), max_tokens=9), seed=1)
    assert found.facts["labels"] == {"a": 1, "b": 2, "c": 0}


def test_rows_of_several_texts_are_repeated_where_all_of_these_are(tokenizer: Tokenizer, tmp_path: Path) -> None:
    pairs = [{"chosen": "yes", "rejected": other} for other in ("no", "never", "no")]
    table = PreferenceTable(train=(write_rows(tmp_path / "train.jsonl", pairs),))
    found = survey(PREFERENCE.prepare(table, tokenizer, model=small_model(), max_tokens=30), seed=1)
    [again] = found.warnings
    assert again.startswith("1 rows of train are there before") and "train.jsonl:3" in again
    assert found.told[0].endswith("3 rows of preferences (chosen, rejected, prompt or not, margin or not)")


def test_an_example_is_shown_as_the_model_sees_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    table = SftTable(train=(write_rows(tmp_path / "train.jsonl", [{"prompt": "two? ", "completion": "four"}]),))
    [example] = SFT.prepare(table, tokenizer, model=small_model(), max_tokens=40).train
    pieces = pieces_of_example(example, tokenizer)
    assert pieces == [("two? ", False), ("four<|endoftext|>", True)]
    assert shortened(pieces, 7) == [("two? ", False), ("fo", True)]
    assert shortened(pieces, 5) == [("two? ", False)]


@pytest.mark.parametrize(
    ("values", "learned"),
    [
        ({"prompt": "p", "completion": "c"}, ["c"]),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, ["a"]),
        (
            {"prompt": "p", "chosen": [{"role": "assistant", "content": "é"}], "rejected": "r"},
            ['[{"role": "assistant", "content": "é"}]'],
        ),
        ({"text": "t", "label": 1}, ["1"]),
    ],
    ids=["prompts", "messages", "preferences", "labels"],
)
def test_a_row_is_shown_by_its_shape(values: dict[str, Any], learned: list[str]) -> None:
    pieces = pieces_of_row(Row("a.jsonl", 1, values))
    assert [text for text, flag in pieces if flag] == learned
