"""The embedded corpus and the two tasks made of it."""

import ast
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.baseline import accuracy_of, bag_of_tokens
from pretrain.data.pyblimp import minimal_pairs
from pretrain.data.pycola import pycola
from pretrain.data.sources import text_source
from pretrain.data.statements import StatementPool, corrupt, parses, statement_pool, statements
from pretrain.data.stdlib import SPLITS, StdlibDocument, StdlibSource, split_of, stdlib_documents
from workbench.errors import DataError


@pytest.fixture(scope="module")
def documents() -> list[StdlibDocument]:
    return stdlib_documents()


@pytest.fixture(scope="module")
def pool(documents: list[StdlibDocument]) -> StatementPool:
    """Statements of the test files and of every sixth training file."""
    training = [document for document in documents if split_of(document.name) == "train"]
    held_out = [document for document in documents if split_of(document.name) == "test"]
    return statement_pool([*training[::6], *held_out])


def test_the_corpus_has_the_size_the_documentation_says(documents: list[StdlibDocument]) -> None:
    assert 400 <= len(documents) <= 1000
    assert 7e6 <= sum(document.num_bytes() for document in documents) <= 14e6
    names = [document.name for document in documents]
    assert names == sorted(set(names)) and "json/decoder.py" in names and "pydoc_data/topics/assert" in names
    assert not any(part in ("test", "tests", "site-packages") for name in names for part in name.split("/"))


def test_the_splits_divide_the_files_and_each_is_large_enough(documents: list[StdlibDocument]) -> None:
    by_split = {split: {part.name for part in StdlibSource(split).parts()} for split in SPLITS}
    assert set().union(*by_split.values()) == {document.name for document in documents}
    assert sum(map(len, by_split.values())) == len(documents)
    assert len(by_split["train"]) > 0.85 * len(documents) and min(map(len, by_split.values())) >= 10


def test_the_split_of_a_file_is_the_same_on_every_machine() -> None:
    names = ["json/decoder.py", "asyncio/base_events.py", "functools.py", "pickle.py", "ast.py"]
    assert [split_of(name) for name in names] == ["train", "test", "valid", "test", "train"]


def test_the_word_stdlib_names_the_corpus_unless_a_file_has_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert text_source("stdlib:valid").label == "stdlib:valid"
    with pytest.raises(DataError, match="stdlib:dev: no such split; the standard library has train, valid, test"):
        text_source("stdlib:dev")
    (tmp_path / "stdlib").mkdir()
    (tmp_path / "stdlib" / "mine.txt").write_text("mine")
    assert [part.name for part in text_source("stdlib").parts()] == ["mine.txt"]


def test_statements_are_as_the_task_describes_them(pool: StatementPool) -> None:
    forbidden = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)
    assert len(pool.held_out) > 2500
    for statement in pool.held_out:
        assert 20 <= len(statement.text) <= 220 and statement.text.count("\n") <= 5
        (node,) = ast.parse(statement.text).body
        assert not any(isinstance(inner, forbidden) for inner in ast.walk(node))
        assert not any(isinstance(inner, ast.Expr) and _is_text(inner.value) for inner in ast.walk(node))
        assert split_of(statement.file) == "test"
    assert not {statement.text for statement in pool.train} & {statement.text for statement in pool.held_out}


def test_a_statement_is_cut_from_its_file_with_its_indentation_taken_off() -> None:
    text = 'class A:\n    """no"""\n    def f(self):\n        if self.known:\n'
    text += '            return "żółw", \\\n                1\n'
    found = statements([StdlibDocument("a.py", text)])
    assert [(one.text, one.line) for one in found] == [
        ('if self.known:\n    return "żółw", \\\n        1', 4),
        ('return "żółw", \\\n    1', 5),
    ]


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


@settings(max_examples=60, deadline=None)
@given(key=st.text(max_size=6))
def test_a_corruption_moves_one_token_and_does_not_parse(key: str) -> None:
    text = "self.values[key] = compute(one, two)"
    corruption = corrupt(text, key=key)
    assert corruption is not None and not parses(corruption.text) and corruption == corrupt(text, key=key)
    before, after = Counter(text.replace(" ", "")), Counter(corruption.text.replace(" ", ""))
    if corruption.kind == "delete":
        assert not after - before and before - after
    elif corruption.kind == "duplicate":
        assert not before - after and after - before
    else:
        assert before == after


def test_minimal_pairs_are_valid_against_invalid_and_the_same_for_a_seed(pool: StatementPool) -> None:
    pairs = minimal_pairs(pool)
    assert len(pairs) == 1000 == len({pair.good for pair in pairs})
    assert all(parses(pair.good) and not parses(pair.bad) for pair in pairs)
    assert min(Counter(pair.kind for pair in pairs).values()) > 150
    assert pairs == minimal_pairs(pool) and pairs != minimal_pairs(pool, seed=1)
    with pytest.raises(DataError, match=r"yield \d+ minimal pairs, not 1000000"):
        minimal_pairs(pool, count=10**6)


def test_pycola_is_balanced_divided_by_file_and_shows_each_statement_once(pool: StatementPool) -> None:
    task = pycola(pool, num_train=3000, num_test=1000)
    for half, size in ((task.train, 3000), (task.test, 1000)):
        assert len(half) == size and sum(example.label for example in half) == size // 2
        assert all(parses(example.text) == bool(example.label) for example in half)
        assert len({(example.file, example.line, example.text) for example in half}) == size
    assert not {example.file for example in task.train} & {example.file for example in task.test}
    assert task == pycola(pool, num_train=3000, num_test=1000)


def test_a_bag_of_tokens_learns_counts_and_nothing_from_order() -> None:
    counted = [[number % 7 + 2] * 3 + [number % 2] for number in range(400)]
    labels = [number % 2 for number in range(400)]
    score = bag_of_tokens(counted[:300], labels[:300], test_ids=counted[300:], test_labels=labels[300:], vocab_size=10)
    assert score.accuracy == 1.0 and score.num_examples == 100
    ordered = [[2, 3] if label else [3, 2] for label in labels]
    score = bag_of_tokens(ordered[:300], labels[:300], test_ids=ordered[300:], test_labels=labels[300:], vocab_size=10)
    assert score.accuracy == 0.5


def test_the_standard_error_is_that_of_a_binomial_share() -> None:
    score = accuracy_of(1400, 2000)
    assert (score.accuracy, round(score.standard_error, 6)) == (0.7, 0.010247)
