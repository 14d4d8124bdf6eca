"""Tasks of rows and tokens: what their rows become, what right and empty answers score, and the same at any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from converters.merge import base_fingerprint
from converters.open import open_checkpoint
from finetune.config import FinetuneConfig
from finetune.objective import evaluations
from finetune.run import Base, Finetuning
from finetune.spans import spans
from finetune.task import IGNORE, Prepared, tasks
from pretrain.engine import Share, to_batch
from tests.finetune.adapters import write_base
from tests.finetune.data import byte_tokenizer, config_of, letters, small_model, write_rows
from tests.helpers.models import masked_model
from tests.helpers.ranks import run_ranks
from workbench.checkpoint.reader import open_native
from workbench.errors import ConfigError, DataError, LayoutError
from workbench.models.batch import Batch
from workbench.parallel.mesh import Mesh
from workbench.spec.geometry import Box
from workbench.spec.layout import ParallelLayout
from workbench.tokenizer import Tokenizer

KINDS = ("x", "y", "z")


def row_of(kind: str, n: int) -> dict[str, Any]:
    """The n-th row of a task, as one line of its file."""
    text = letters(1, start=n)[0]["text"]
    odd = "z" in text
    words = [*text, "bb"]
    return {
        "lm": {"text": text * 3},
        "masked_lm": {"text": " ".join(text * 2)},
        "classification": {"text": text, "label": int(odd)},
        "several": {"text": text, "labels": [k for k in KINDS if k == "x" or ((k == "z") == odd and n % 2)]},
        "pair": {"text": text, "text_pair": text[::-1], "label": "odd" if odd else "even"},
        "regression": {"text": text, "text_pair": "c", "label": n % 5 + odd},
        "multiple_choice": {"text": text, "choices": ["z", "b", "q"][: 2 + n % 2], "label": 1 - odd},
        "embedding": {"query": text, "positive": chr(97 + n % 20) + text, "negative": "q"},
        "token_classification": {"tokens": words, "labels": ["B-Z" if w == "z" else "O" for w in words]},
    }[kind]


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lm": ("lm", {}),
    "lm, packed": ("lm", {}),
    "masked_lm": ("masked_lm", {}),
    "classification": ("classification", {"class_weights": "balanced", "label_smoothing": 0.1}),
    "several labels": ("several", {"class_weights": [1, 2, 3], "label_smoothing": 0.1}),
    "pair": ("pair", {}),
    "regression": ("regression", {}),
    "multiple_choice": ("multiple_choice", {}),
    "embedding": ("embedding", {}),
    "embedding, last": ("embedding", {"pooling": "last"}),
    "token_classification": ("token_classification", {}),
}
BASES = {"causal": small_model(vocab_size=263), "masked": masked_model(vocab_size=270, num_hidden_layers=2)}


def bases_of(case: str) -> list[str]:
    return ["masked"] if case == "masked_lm" else ["causal"] if case.startswith("lm") else ["causal", "masked"]


RUNS = [(base, case) for case in CASES for base in bases_of(case)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both bases, and train and test rows of every task."""
    root = tmp_path_factory.mktemp("rows")
    tokenizer = byte_tokenizer(root / "tokenizer")
    for name, model in BASES.items():
        write_base(root / name, model, tokenizer=tokenizer)
    for kind, _ in CASES.values():
        write_rows(root / f"{kind}-train.jsonl", [row_of(kind, n) for n in range(16)])
        write_rows(root / f"{kind}-test.jsonl", [row_of(kind, n) for n in range(50, 57)])
    return root


def config(folder: Path, case: str, base: str, place: Path, dp: int = 1, **run: Any) -> FinetuneConfig:
    kind, table = CASES[case]
    task = {"kind": "classification" if kind == "several" else kind, **table}
    files = {name: str(folder / f"{kind}-{name}.jsonl") for name in ("train", "test")}
    micro = 8 // dp if kind == "embedding" else 2
    batch = {"micro_size": micro, "packing": case == "lm, packed"}
    tables: dict[str, Any] = {"batch": batch, "run": {"dir": str(place), "steps": 3, **run}}
    return config_of(folder, {**task, **files}, {"kind": "full"}, **tables)


def finetuning(folder: Path, case: str, base: str, place: Path, mesh: Mesh, **run: Any) -> Finetuning:
    opened = open_checkpoint(folder / base)
    given = Base(opened.model, opened.source, folder / "tokenizer", str(folder / base), base_fingerprint(opened))
    return Finetuning(config(folder, case, base, place, mesh.dp.size, **run), given, mesh, dtype=torch.float64)


def metrics_at(folder: Path, case: str, base: str, place: Path, layout: ParallelLayout) -> dict[str, float]:
    mesh = Mesh.create(layout, torch.device("cpu"))
    return dict(finetuning(folder, case, base, place, mesh).run().metrics)


def weights(place: Path) -> dict[str, np.ndarray]:
    source = open_native(place / "checkpoints" / "step-00000003")
    return {name: source.read(name, Box.whole(tensor.shape)) for name, tensor in source.schema.items()}


@pytest.fixture(scope="module")
def alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The metrics and the place of a run on one process, made when first asked for."""
    made: dict[tuple[str, str], tuple[dict[str, float], Path]] = {}

    def run(base: str, case: str) -> tuple[dict[str, float], Path]:
        if (base, case) not in made:
            place = tmp_path_factory.mktemp("alone")
            made[base, case] = metrics_at(folder, case, base, place, ParallelLayout()), place
        return made[base, case]

    return run


TWO = [ParallelLayout(tp=2, sequence_parallel=True), ParallelLayout(pp=2), ParallelLayout(dp=2), ParallelLayout(cp=2)]


QUICK = {("causal", "embedding", 2), ("masked", "token_classification", 0), ("causal", "multiple_choice", 1)}
QUICK |= {
    ("masked", "embedding", 3),
    ("masked", "several labels", 2),
    ("causal", "lm, packed", 3),
    ("masked", "masked_lm", 2),
    ("causal", "regression", 0),
}
LAYOUTS = [
    pytest.param(base, case, layout, marks=() if (base, case, at) in QUICK else pytest.mark.exhaustive)
    for base, case in RUNS
    for at, layout in enumerate(TWO)
]


@pytest.mark.parity
@pytest.mark.parametrize(("base", "case", "layout"), LAYOUTS, ids=str)
def test_a_run_at_any_layout_is_that_of_one_process(
    base: str, case: str, layout: ParallelLayout, folder: Path, alone: Any, tmp_path: Path
) -> None:
    expected, place = alone(base, case)
    for found in run_ranks(2, metrics_at, folder, case, base, tmp_path, layout):
        assert found == pytest.approx(expected, rel=1e-10, abs=1e-10)
    there = weights(tmp_path)
    for name, values in weights(place).items():
        if case == "multiple_choice" and name.endswith("score.bias"):
            continue  # it moves all choices alike, so its gradient is rounding alone, which the optimizer scales up
        # A moment that is zero but for rounding is measured against the others.
        np.testing.assert_allclose(there[name], values, rtol=0, atol=1e-10 * max(float(np.abs(values).max()), 1e-6))


def prepared(folder: Path, case: str, base: str = "causal", **changes: Any) -> Prepared:
    kind, table = CASES[case]
    files = {name: str(folder / f"{kind}-{name}.jsonl") for name in ("train", "test")}
    task = tasks()["classification" if kind == "several" else kind]
    given = task.table.model_validate({**files, **table, **changes})
    tokenizer = Tokenizer.load(folder / "tokenizer")
    found: Prepared = task.prepare(given, tokenizer, model=BASES[base], max_tokens=32)
    return found


def score(found: Prepared, answer: Any, micro: int = 2, dp: int = 1) -> dict[str, float]:
    """The metrics of what `answer` gives for each batch of the test rows."""
    [evaluation] = evaluations(found, ("test",))
    tallies = []
    for rank in range(dp):
        for [rows] in evaluation.batches(Share(micro, rank, dp), num_microbatches=1, max_samples=None):
            batch = to_batch(rows, torch.device("cpu"))
            tallies.append(evaluation.tally(batch, answer(batch)))
    total = torch.cat(tallies).flatten() if tallies[0].dim() == 2 else torch.stack(tallies).sum(dim=0)
    return evaluation.metrics(total.tolist())


def right_labels(width: int) -> Any:
    return lambda batch: 50.0 * torch.nn.functional.one_hot(batch.labels.clamp(min=0), width)


def right_choices(batch: Batch) -> torch.Tensor:
    scores = torch.zeros(len(batch.input_ids), 1)
    for row, label in enumerate(batch.labels.tolist()):
        if label != IGNORE:
            scores[row + label] = 9.0
    return scores


def own_vectors(batch: Batch) -> torch.Tensor:
    """One direction for each sample, known by its first row's tokens, and another for negatives."""
    found = torch.zeros(len(batch.input_ids), 400)
    for row in range(0, len(found), 3):
        found[row : row + 2, int(batch.input_ids[row].sum()) % 397] = 1.0
        found[row + 2, 399] = 1.0
    return found


PERFECT: dict[str, tuple[Any, tuple[str, ...]]] = {
    "classification": (right_labels(2), ("accuracy", "f1", "f1_macro", "mcc")),
    "pair": (right_labels(2), ("accuracy", "mcc")),
    "several labels": (lambda batch: 9 * (batch.values["target"] - 0.5), ("accuracy", "f1_micro")),
    "regression": (lambda batch: batch.values["target"], ("pearson", "spearman")),
    "multiple_choice": (right_choices, ("accuracy",)),
    "token_classification": (right_labels(2), ("accuracy", "precision", "recall", "f1")),
    "lm": (lambda batch: torch.zeros(()), ("perplexity",)),
    "masked_lm": (lambda batch: torch.zeros(()), ("perplexity",)),
}


@pytest.mark.parametrize("case", sorted(PERFECT))
@pytest.mark.parametrize(("micro", "dp"), [(2, 1), (3, 2)])
def test_perfect_answers_score_one_however_ranks_divide_them(case: str, micro: int, dp: int, folder: Path) -> None:
    answer, names = PERFECT[case]
    found = score(prepared(folder, case, "masked" if case == "masked_lm" else "causal"), answer, micro, dp)
    assert {name: found[name] for name in names} == pytest.approx(dict.fromkeys(names, 1.0))


def test_answers_that_say_nothing_score_what_guessing_does(folder: Path) -> None:
    same = score(prepared(folder, "regression"), lambda batch: torch.zeros(len(batch.input_ids), 1))
    assert same["pearson"] == same["spearman"] == 0.0 and same["mse"] > same["mse_of_mean"]
    always = score(
        prepared(folder, "classification"), lambda batch: torch.tensor([[1.0, 0.0]]).repeat(len(batch.input_ids), 1)
    )
    assert always["accuracy"] == always["majority"] and always["mcc"] == always["f1"] == 0.0
    silent = score(
        prepared(folder, "token_classification"), lambda b: torch.tensor([0.0, 1.0]).repeat(*b.labels.shape, 1)
    )
    assert (
        silent["precision"] == silent["recall"] == silent["f1"] == 0.0
        and silent["accuracy"] == silent["majority"] > 0.5
    )
    blind = score(prepared(folder, "multiple_choice"), lambda batch: torch.zeros(len(batch.input_ids), 1))
    assert 0.3 < blind["chance"] < 0.5


def test_a_query_finds_its_own_text_among_all_held_out_ones(folder: Path) -> None:
    found = prepared(folder, "embedding")
    apart = score(found, own_vectors)
    assert apart["rows"] == 7 and apart == score(found, own_vectors, micro=1, dp=3)
    alike = score(found, lambda batch: torch.ones(len(batch.input_ids), 4))
    assert alike["recall_at_1"] == pytest.approx(1 / 14) and alike["mrr"] < 0.2 < apart["recall_at_1"]


def test_hidden_words_are_drawn_anew_each_time_and_held_out_ones_never(folder: Path) -> None:
    found = prepared(folder, "masked_lm", "masked")
    assert found.vary is not None
    first, again, later = (found.vary(found.train[0], n) for n in (0, 0, 16))
    assert np.array_equal(first.labels, again.labels) and not np.array_equal(first.labels, later.labels)
    held_out = [prepared(folder, "masked_lm", "masked").held_out["test"][3].labels.tolist() for _ in range(2)]
    assert held_out[0] == held_out[1]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ("O B-A I-A O", [("A", 1, 3)]),
        ("B-A B-A I-B", [("A", 0, 1), ("A", 1, 2), ("B", 2, 3)]),
        ("I-A I-A O I-A", [("A", 0, 2), ("A", 3, 4)]),
        ("O O", []),
    ],
)
def test_entities_are_those_that_conlleval_counts(labels: str, expected: list[tuple[str, int, int]]) -> None:
    assert list(spans(labels.split())) == expected


def test_one_token_of_a_word_carries_its_label(folder: Path) -> None:
    """The first of "bb" where all tokens see each other, the last where they see what came before."""
    for base, place in (("masked", -2), ("causal", -1)):
        example = prepared(folder, "token_classification", base).train[0]
        assert example.num_labels == len(row_of("token_classification", 0)["tokens"])
        assert example.labels[place] != IGNORE and example.labels[-3 - place] == IGNORE


BAD = [
    ("regression", {"text": "a", "label": "much"}, "needs a number under 'label', not 'much'"),
    ("multiple_choice", {"text": "a", "choices": ["b"], "label": 0}, "two texts or more under 'choices'"),
    ("multiple_choice", {"text": "a", "choices": ["b", "c"], "label": 2}, "0 to 1, not 2"),
    ("pair", {"text": "a", "label": 0}, r"the first has text, label; .*--map text_pair="),
    ("embedding", {"query": "a"}, r"the first has query; .*--map positive="),
    ("token_classification", {"tokens": ["a", "b"], "labels": ["O"]}, "has 2 words, but 1 labels"),
    ("lm", {"text": ""}, "1 rows have an empty text"),
]


@pytest.mark.parametrize(("case", "row", "message"), BAD)
def test_a_bad_row_is_named_by_its_line(
    case: str, row: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    file = write_rows(tmp_path / "train.jsonl", [row_of(case, 0), row_of(case, 1), row])
    with pytest.raises(DataError, match=message) as caught:
        prepared(folder, case, train=file)
    assert "train.jsonl:3" in str(caught.value)


def test_microbatches_that_do_not_see_each_other_are_refused(folder: Path, tmp_path: Path) -> None:
    wrong = config(folder, "embedding", "causal", tmp_path, dp=2)
    with pytest.raises(LayoutError, match=r"2 microbatches of micro_size=4 .* set batch.micro_size = 8"):
        wrong.resolve_layout(BASES["causal"], 1)


def test_a_base_that_cannot_do_the_task_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\(causal=true\) and cannot tell hidden words"):
        finetuning(folder, "masked_lm", "causal", tmp_path, Mesh.single())
    with pytest.raises(ConfigError, match=r"\(causal=false\) and cannot learn to go on"):
        finetuning(folder, "lm", "masked", tmp_path, Mesh.single())


def test_the_control_is_the_same_model_from_scratch(folder: Path, tmp_path: Path) -> None:
    CASES["controlled"] = ("classification", {"controls": True})
    found = finetuning(folder, "controlled", "causal", tmp_path, Mesh.single()).run().metrics
    assert {"test/accuracy_error", "test/majority_error", "from_scratch/test/accuracy_error"} <= set(found)
    assert found["from_scratch/test/loss"] != found["test/loss"]
    assert (tmp_path / "from-scratch" / "checkpoints").is_dir()
