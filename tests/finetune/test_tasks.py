"""Rows become examples with the right tokens supervised; what is wrong with a file is said with its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finetune.judges import AnswerJudge, LabelJudge, TextLoss
from finetune.objective import TaskEvaluation, TaskObjective, pad
from finetune.task import IGNORE, Example, Prepared
from finetune.tasks.classification import TASK as CLASSIFICATION
from finetune.tasks.classification import ClassificationTable
from finetune.tasks.sft import TASK as SFT
from finetune.tasks.sft import SftTable
from pretrain.engine import Share, to_batch
from tests.finetune.data import byte_tokenizer, small_model, write_rows
from workbench.errors import DataError
from workbench.tokenizer import Tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN_CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(byte_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def sft(
    path: Path, rows: list[dict[str, Any]], tokenizer: Tokenizer, *, max_tokens: int = 40, **table: Any
) -> Prepared:
    file = write_rows(path / "train.jsonl", rows)
    return SFT.prepare(
        SftTable.model_validate({"train": file, **table}), tokenizer, model=small_model(), max_tokens=max_tokens
    )


def labels_of(path: Path, rows: list[dict[str, Any]], tokenizer: Tokenizer, **more: Any) -> Prepared:
    file = write_rows(path / "train.jsonl", rows)
    table = ClassificationTable.model_validate({"train": file, **more})
    return CLASSIFICATION.prepare(table, tokenizer, model=small_model(), max_tokens=8)


def supervised(example: Example, tokenizer: Tokenizer) -> str:
    """The text of the labels that count."""
    return tokenizer.decode(example.labels[example.labels != IGNORE], skip_special_tokens=False)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"prompt": "two and two? ", "completion": "four"}, "two and two? four<|endoftext|>"),
        ({"instruction": "Add.", "input": "2 2", "output": "four"}, "Add.\n\n2 2\n\nfour<|endoftext|>"),
        ({"instruction": "Say four.", "input": "", "output": "four"}, "Say four.\n\nfour<|endoftext|>"),
    ],
)
def test_only_the_answer_and_its_end_are_supervised(
    row: dict[str, Any], text: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    [example] = sft(tmp_path, [row], tokenizer).train
    whole = tokenizer.encode(text)
    assert example.input_ids.tolist() == whole[:-1]
    assert supervised(example, tokenizer) == "four<|endoftext|>"
    assert example.labels[-5:].tolist() == whole[-5:]


def test_where_padding_is_the_end_of_text_the_end_is_still_learned_and_padding_is_not(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(byte_tokenizer(tmp_path, pad=None))
    rows = [{"prompt": "p", "completion": "a"}, {"prompt": "p", "completion": "a" * 9}]
    prepared = sft(tmp_path, rows, tokenizer)
    assert prepared.pad_id == tokenizer.eos_id
    batch = pad(prepared.train, range(2), prepared.pad_id)
    assert tokenizer.eos_id is not None and batch.lengths is not None
    assert batch.labels[0].tolist() == [*tokenizer.encode("a"), tokenizer.eos_id] + [IGNORE] * 8
    assert batch.lengths.tolist() == [2, 10] and batch.num_labels == 12


def test_every_assistant_turn_of_a_conversation_is_supervised_with_its_end(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(byte_tokenizer(tmp_path, chat_template=CHATML))
    words = [("system", "S"), ("user", "u1"), ("assistant", "a1"), ("user", "u2"), ("assistant", "a2")]
    row = {"messages": [{"role": role, "content": content} for role, content in words]}
    [example] = sft(tmp_path, [row], tokenizer, max_tokens=200).train
    assert supervised(example, tokenizer) == "a1<|im_end|>\na2<|im_end|>\n"


def test_a_template_that_does_not_end_a_turn_gets_an_end_of_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(byte_tokenizer(tmp_path, chat_template=PLAIN_CHAT))
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    [example] = sft(tmp_path, [row], tokenizer).train
    assert supervised(example, tokenizer) == "a\n<|endoftext|>"


def test_rows_that_are_too_long_are_cut_dropped_or_refused_and_always_counted(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    rows = [{"prompt": "p", "completion": "x" * 20}, {"prompt": "p", "completion": "y"}]
    cut = sft(tmp_path, rows, tokenizer, max_tokens=10)
    assert [len(example.input_ids) for example in cut.train] == [10, 2]
    assert supervised(cut.train[0], tokenizer) == "x" * 10
    assert "1 rows are longer than 10 tokens" in cut.notes[0] and "train.jsonl:1" in cut.notes[0]
    assert len(sft(tmp_path, rows, tokenizer, max_tokens=10, too_long="drop").train) == 1
    with pytest.raises(DataError, match=r"1 rows are longer than 10 tokens .*train.jsonl:1\); raise batch.seq_len"):
        sft(tmp_path, rows, tokenizer, max_tokens=10, too_long="error")


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [{"prompt": "p", "completion": "y"}, {"prompt": "p" * 30, "completion": "x"}]
    with pytest.raises(DataError, match=r"1 rows have no token to learn within 10 tokens.*train.jsonl:2"):
        sft(tmp_path, rows, tokenizer, max_tokens=10)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"prompt": "a"}', r"train.jsonl:1\): the first has prompt; recognised .*--map completion=NAME"),
        ('{"prompt": "a", "completion": 3}', r"train.jsonl:1: needs text under 'completion', but it is 3"),
        ('{"prompt": "a", "completion": ""}', r"1 rows have an empty answer, nothing to learn \(.*train.jsonl:1\)"),
        ('{"prompt": "a", "completion": "b"}\nnonsense', r"train.jsonl:2: not JSON"),
        ("\n\n[1]", r"train.jsonl:3: \[1\] is not an object"),
        ("", r"train.jsonl: no rows"),
        ('{"messages": [{"role": "user", "content": "x"}]}', r"has no chat template"),
    ],
)
def test_a_bad_row_is_named_by_its_line(lines: str, message: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text(lines)
    with pytest.raises(DataError, match=message):
        SFT.prepare(SftTable(train=(str(file),)), tokenizer, model=small_model(), max_tokens=20)


def test_a_missing_file_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone.jsonl: no such file"):
        SFT.prepare(SftTable(train=(str(tmp_path / "gone.jsonl"),)), tokenizer, model=small_model(), max_tokens=20)


def test_labels_are_numbered_in_order_and_majority_is_that_of_the_training_rows(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    rows = [{"text": "a", "label": label} for label in ("no", "yes", "no", "maybe")]
    valid = write_rows(tmp_path / "valid.jsonl", [{"text": "b", "label": "yes"}, {"text": "c", "label": "no"}])
    prepared = labels_of(tmp_path, rows, tokenizer, valid=valid)
    assert prepared.identity["labels"] == ["maybe", "no", "yes"] and prepared.num_labels == 3
    assert [int(example.labels) for example in prepared.train] == [1, 2, 1, 0]
    assert score(prepared, "valid", right=True)["majority"] == 0.5


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        ([{"text": "a", "label": "x"}, {"text": "b", "label": "x"}], {}, "only the label 'x' occurs in 2 rows"),
        ([{"text": "a", "label": "x"}], {"labels": ["y", "z"]}, r"train.jsonl:1: label 'x' is not known"),
        ([{"text": "a", "label": 0.5}], {}, r"train.jsonl:1: needs a label, text or a whole number.*not 0.5"),
        ([{"text": "", "label": 0}, {"text": "a", "label": 1}], {}, r"1 rows have an empty text \(.*train.jsonl:1\)"),
    ],
)
def test_bad_labels_are_named_by_their_line(
    rows: list[dict[str, Any]], more: dict[str, Any], message: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        labels_of(tmp_path, rows, tokenizer, **more)


def test_a_label_of_the_held_out_rows_that_training_does_not_have_is_refused(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    test = write_rows(tmp_path / "test.jsonl", [{"text": "a", "label": "yse"}])
    rows = [{"text": "a", "label": "yes"}, {"text": "b", "label": "no"}]
    with pytest.raises(DataError, match=r"test.jsonl:1: label 'yse' is not known; did you mean 'yes'"):
        labels_of(tmp_path, rows, tokenizer, test=test)


def score(prepared: Prepared, name: str, *, right: bool, share: Share | None = None) -> dict[str, float]:
    """The metrics of outputs that are all right, or all wrong."""
    evaluation = TaskEvaluation(name, prepared.held_out[name], prepared)
    total = torch.zeros(())
    share = share or Share(2, 0, 1)
    for rank in range(share.dp_size):
        for rows in evaluation.batches(
            Share(share.micro_size, rank, share.dp_size), num_microbatches=1, max_samples=None
        ):
            batch = to_batch(rows[0], torch.device("cpu"))
            assert batch.labels is not None
            answers = batch.labels.clamp(min=0) if right else (batch.labels.clamp(min=0) + 1) % 2
            width = max(prepared.num_labels, 300)
            logits = torch.nn.functional.one_hot(answers, width).float() * 50
            total = total + evaluation.tally(batch, logits)
    return evaluation.metrics(total.tolist())


@pytest.mark.parametrize("share", [Share(2, 0, 1), Share(3, 0, 2), Share(8, 0, 4)], ids=str)
def test_perfect_answers_score_one_and_wrong_ones_nothing_however_ranks_divide_them(
    share: Share, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    answers = write_rows(tmp_path / "valid.jsonl", [{"prompt": "p" * n, "completion": "c" * (1 + n)} for n in range(5)])
    prepared = sft(tmp_path, [{"prompt": "a", "completion": "b"}], tokenizer, valid=answers)
    perfect, wrong = (score(prepared, "valid", right=right, share=share) for right in (True, False))
    assert (perfect["exact_match"], perfect["token_accuracy"], perfect["answers"]) == (1.0, 1.0, 5.0)
    assert (wrong["exact_match"], wrong["token_accuracy"]) == (0.0, 0.0)
    # The first token of the first answer has nothing before it, so nothing predicts it.
    assert perfect["tokens"] == sum(n + 2 for n in range(5)) - 1
    texts = write_rows(tmp_path / "valid.jsonl", [{"text": "t" * (n + 1), "label": n % 2} for n in range(5)])
    labels = labels_of(tmp_path, [{"text": "a", "label": 0}, {"text": "b", "label": 1}], tokenizer, valid=texts)
    assert score(labels, "valid", right=True, share=share)["accuracy"] == 1.0
    assert score(labels, "valid", right=False, share=share)["accuracy"] == 0.0
    assert score(labels, "valid", right=True, share=share)["rows"] == 5


def test_one_wrong_token_spoils_the_answer_and_only_that_one() -> None:
    rows = [Example(np.arange(3), np.array([IGNORE, 4, 5])), Example(np.arange(3), np.array([6, 7, IGNORE]))]
    batch = to_batch(pad(rows, range(2), 0), torch.device("cpu"))
    assert batch.labels is not None
    logits = torch.nn.functional.one_hot(batch.labels.clamp(min=0), 10).float()
    logits[0, 2] = 0
    judge = AnswerJudge()
    found = judge.metrics(judge.tally(batch, logits).tolist())
    assert (found["exact_match"], found["token_accuracy"], found["answers"]) == (0.5, 0.75, 2.0)


def test_the_loss_alone_is_the_same_loss(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [Example(np.arange(3), np.array([IGNORE, 4, 5]))]
    batch = to_batch(pad(rows, range(1), 0), torch.device("cpu"))
    logits = torch.randn(1, 3, 10, generator=torch.Generator().manual_seed(0))
    full = AnswerJudge().metrics(AnswerJudge().tally(batch, logits).tolist())
    assert batch.labels is not None
    loss = torch.nn.functional.cross_entropy(logits[0], batch.labels[0], ignore_index=IGNORE, reduction="sum")
    assert TextLoss().metrics(TextLoss().tally(batch, loss).tolist())["loss"] == pytest.approx(full["loss"])


def test_a_row_without_labels_adds_nothing_to_a_score() -> None:
    judge = LabelJudge(0)
    rows = [Example(np.arange(2), np.array(1)), Example(np.arange(1), np.array(IGNORE))]
    batch = to_batch(pad(rows, range(2), 0), torch.device("cpu"))
    found = judge.metrics(judge.tally(batch, torch.tensor([[0.0, 9.0], [9.0, 0.0]])).tolist())
    assert (found["rows"], found["accuracy"], found["majority"]) == (1.0, 1.0, 0.0)


def test_the_order_of_rows_depends_on_the_seed_alone_and_each_epoch_shows_every_row() -> None:
    examples = [Example(np.array([n]), np.array([n])) for n in range(12)]
    prepared = Prepared(examples, {}, TextLoss(), num_labels=0, pad_id=0)

    def seen(seed: int, micro: int, dp: int) -> list[int]:
        objective = TaskObjective(prepared, seed=seed)
        steps = []
        for step in range(6):
            rows = [
                row
                for rank in range(dp)
                for row in objective.train_rows(Share(micro, rank, dp), step=step, first_sample=4 * step, global_size=4)
            ]
            steps += sorted(
                (int(i), int(token))
                for row in rows
                for i, token in zip(row.sample_ids, row.input_ids[:, 0], strict=True)
            )
        return [token for _, token in steps]

    order = seen(1, 1, 1)
    assert order == seen(1, 2, 2) == seen(1, 2, 1) != seen(2, 1, 1)
    assert sorted(order[:12]) == sorted(order[12:]) == list(range(12)) and order[:12] != order[12:]


def test_rows_of_like_length_share_a_microbatch_so_that_little_is_padded() -> None:
    lengths = [1, 9, 2, 8, 1, 9, 2, 8]
    examples = [Example(np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64)) for n in lengths]
    objective = TaskObjective(Prepared(examples, {}, TextLoss(), num_labels=0, pad_id=0), seed=1)
    for dp in (1, 2):
        shapes = [
            rows.input_ids.shape[1]
            for rank in range(dp)
            for rows in objective.train_rows(Share(2, rank, dp), step=0, first_sample=0, global_size=8)
        ]
        assert sorted(shapes) == [1, 2, 8, 9]
