"""Data is read as it comes, its shape is recognised, and what is wrong with it is said with its place."""

from __future__ import annotations

import csv
import json
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.rows import Row, read_rows
from finetune.shapes import ANSWERS, LABELS, PREFERENCES, SHAPES, recognise
from workbench.errors import DataError

ROWS = [{"prompt": 'two\nlines, and "more"', "completion": "é\u2028ü"}, {"prompt": "", "completion": "x"}]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows in the format that the name asks for."""
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return path


def values(rows: list[Row]) -> list[dict[str, Any]]:
    return [dict(row.values) for row in rows]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_a_file_needs_no_registration_to_be_read(suffix: str, tmp_path: Path) -> None:
    file = write(tmp_path / f"mine{suffix}", ROWS)
    found = read_rows([file])
    assert values(found) == ROWS and found[0].place.startswith(f"{file}:")


def test_json_lines_in_a_file_called_json_are_read_too(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", ROWS).rename(tmp_path / "rows.json")
    assert values(read_rows([file])) == ROWS


def test_a_folder_is_the_data_files_in_it_in_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".cache").mkdir()
    for name, number in (("b/1.csv", 2), ("a.jsonl", 1), (".cache/z.jsonl", 9)):
        write(tmp_path / name, [{"n": str(number)}])
    (tmp_path / "README.md").write_text("not data")
    assert values(read_rows([tmp_path])) == [{"n": "1"}, {"n": "2"}]


def test_places_are_lines_even_behind_cells_of_several_lines(tmp_path: Path) -> None:
    found = read_rows([write(tmp_path / "a.csv", ROWS)])
    assert [row.number for row in found] == [2, 4]


TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@given(st.lists(st.fixed_dictionaries({"prompt": TEXT, "completion": TEXT}), min_size=1, max_size=4))
def test_any_text_comes_back_from_csv_as_it_was(rows: list[dict[str, str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert values(read_rows([write(Path(folder) / "a.csv", rows)])) == rows


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "prompt,completion\n1,2,3\n", r"a.csv:2: has 3 cells, but the header has 2 \(prompt, completion\)"),
        ("a.csv", "prompt\n" + "x" * 200_000, r"a.csv:2: not CSV \(field larger than field limit"),
        ("a.json", '[{"a": 1}, 3]', r"a.json:2: element 3 is not an object"),
        ("a.json", '[{"a": 1}', r"a.json: not JSON"),
        ("a.xlsx", "", r"'.xlsx' is not a kind of file that is read; give .jsonl, .json, .csv, .tsv, .parquet"),
        ("a.csv", "prompt,completion\n", r"a.csv: no rows"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_rows([tmp_path / name])


def test_a_folder_without_data_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(DataError, match=r"a folder without data files \(.jsonl, .*\); it holds notes.txt"):
        read_rows([tmp_path])


def test_what_needs_an_extra_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    for module, source, extra in (
        ("pyarrow", str(tmp_path / "a.parquet"), "parquet"),
        ("datasets", "hf:a/b", "datasets"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(DataError, match=rf"needs .*{module}; pip install 'workbench\[{extra}\]'"):
            read_rows([source])


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("hf:org/name", ("org/name", None, "train")),
        ("hf:org/name:test", ("org/name", None, "test")),
        ("hf:glue:sst2:validation", ("glue", "sst2", "validation")),
    ],
)
def test_a_dataset_is_asked_for_by_name_configuration_and_split(
    source: str, asked: tuple[str, str | None, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(name: str, config: str | None, *, split: str) -> list[dict[str, Any]]:
        assert (name, config, split) == asked
        return ROWS

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    found = read_rows([source])
    assert values(found) == ROWS and found[1].place == f"{source}:2"


def test_a_dataset_that_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("no such dataset")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError, match=r"hf:gone: datasets cannot load it \(no such dataset\)"):
        read_rows(["hf:gone"])
    with pytest.raises(DataError, match=r"hf:a:b:c:d: write hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT"):
        read_rows(["hf:a:b:c:d"])


def test_columns_are_called_as_the_user_says(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"question": "q", "answer": "a", "id": 3}])
    columns = {"prompt": "question", "completion": "answer"}
    found = recognise(read_rows([file], columns=columns), ANSWERS, columns=columns)
    assert values(found.rows) == [{"prompt": "q", "completion": "a", "id": 3}]
    with pytest.raises(DataError, match=r"a.jsonl:1: has no column 'qestion'; did you mean 'question'\?"):
        read_rows([file], columns={"prompt": "qestion"})
    with pytest.raises(DataError, match=r"task.columns names 'pormpt', which no row needs; did you mean 'prompt'\?"):
        recognise(read_rows([file]), ANSWERS, columns={"pormpt": "question"})


def row(**columns: Any) -> Row:
    return Row("a.jsonl", 1, columns)


SAID = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("given_row", "shape", "plain"),
    [
        (row(prompt="q", completion="a"), "prompts", {"prompt": "q", "completion": "a"}),
        (row(instruction="i", input="c", output="a"), "alpaca", {"prompt": "i\n\nc\n\n", "completion": "a"}),
        (row(instruction="i", output="a"), "alpaca", {"prompt": "i\n\n", "completion": "a"}),
        (row(messages=SAID), "messages", {"messages": SAID}),
        (
            row(conversations=[{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]),
            "sharegpt",
            {"messages": SAID},
        ),
        (
            row(system="s", conversations=[{"from": "user", "value": "q"}]),
            "sharegpt",
            {"messages": [{"role": "system", "content": "s"}, SAID[0]]},
        ),
        (row(prompt="q", chosen="a", rejected="b"), "preferences", {"prompt": "q", "chosen": "a", "rejected": "b"}),
        (row(chosen="a", rejected="b"), "preferences", {"chosen": "a", "rejected": "b"}),
        (row(text="t", label=1), "labels", {"text": "t", "label": 1}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_usual_shapes_are_recognised_and_told(given_row: Row, shape: str, plain: dict[str, Any]) -> None:
    found = recognise([given_row], SHAPES)
    assert values(found.rows) == [plain] and found.told.startswith(f"1 rows of {shape} (")


def test_a_file_of_several_shapes_says_how_many_of_each() -> None:
    found = recognise([row(prompt="q", completion="a"), row(messages=SAID), row(messages=SAID)], ANSWERS)
    assert found.told == "1 rows of prompts (prompt, completion), 2 rows of messages (messages)"


def test_a_shape_that_is_not_recognised_names_what_was_found_and_what_would_be() -> None:
    with pytest.raises(DataError) as caught:
        recognise([row(prompt="q", completion="a"), Row("a.jsonl", 2, {"question": "q", "answer": "a"})], ANSWERS)
    assert str(caught.value) == (
        "1 rows have no columns that are recognised (a.jsonl:2): the first has question, answer; recognised would be "
        "messages (messages); sharegpt (conversations, system or not); alpaca (instruction, output, input or not); "
        'prompts (prompt, completion). Name columns by task.columns = {prompt = "question"} or --map prompt=question'
    )
    with pytest.raises(DataError, match=r"has prompt, response; .* or --map completion=response"):
        recognise([row(prompt="q", response="a")], ANSWERS)
    with pytest.raises(
        DataError, match=r"recognised would be preferences \(chosen, rejected, prompt or not, margin or not\)"
    ):
        recognise([row(text="t", label=1)], (PREFERENCES,))
    with pytest.raises(DataError, match=r"--map label=sentiment"):
        recognise([row(text="t", sentiment=1)], (LABELS,))


@pytest.mark.parametrize("turns", ["hello", [{"from": "human"}], [3]], ids=str)
def test_conversations_of_another_form_are_named_by_their_line(turns: Any) -> None:
    with pytest.raises(DataError, match=r'a.jsonl:1: conversations must be a list of {"from": ..., "value": text}'):
        recognise([row(conversations=turns)], ANSWERS)
