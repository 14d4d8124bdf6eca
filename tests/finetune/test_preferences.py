"""Rows of preferences become groups of examples; what is wrong with a file or a setting is said where it stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from finetune.adapters._lora_layers import switched_off
from finetune.objective import TaskObjective
from finetune.task import IGNORE, Example, Prepared
from finetune.tasks._preference_loss import RewardJudge
from finetune.tasks.preference import TASK as PREFERENCE
from finetune.tasks.preference import PreferenceTable
from finetune.tasks.reward import TASK as REWARD
from finetune.tasks.reward import RewardTable
from pretrain.engine import Share
from tests.finetune.adapters import adapted_stage
from tests.finetune.data import byte_tokenizer, small_model, write_rows
from tests.finetune.test_tasks import CHATML
from tests.helpers.models import gated_model, sparse_model
from workbench.errors import DataError
from workbench.models.batch import Batch
from workbench.models.build import build_stage
from workbench.parallel.mesh import Mesh
from workbench.spec.lora import LoraSpec
from workbench.tokenizer import Tokenizer

PAIR = {"prompt": "2+2=", "chosen": "4", "rejected": "five"}
ANSWERS = [{"prompt": f"{n}:", "completion": chr(97 + n), "label": n % 2 == 0} for n in range(5)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(byte_tokenizer(tmp_path_factory.mktemp("tokenizer"), chat_template=CHATML))


def prepared(
    path: Path, rows: list[dict[str, Any]], tokenizer: Tokenizer, *, tokens: int = 60, **table: Any
) -> Prepared:
    file = write_rows(path / "train.jsonl", rows)
    return PREFERENCE.prepare(
        PreferenceTable.model_validate({"train": file, **table}), tokenizer, model=small_model(), max_tokens=tokens
    )


def rewards(path: Path, rows: list[dict[str, Any]], tokenizer: Tokenizer, *, tokens: int = 60) -> Prepared:
    file = write_rows(path / "train.jsonl", rows)
    return REWARD.prepare(
        RewardTable.model_validate({"train": file}), tokenizer, model=small_model(), max_tokens=tokens
    )


def texts(example: Example, tokenizer: Tokenizer) -> tuple[str, str]:
    """What is read, and what of it is judged."""
    judged = example.labels[example.labels != IGNORE]
    read, answer = (tokenizer.decode(list(ids), skip_special_tokens=False) for ids in (example.input_ids, judged))
    return read, answer


def test_a_pair_is_the_preferred_answer_and_the_other_with_their_ends(tokenizer: Tokenizer, tmp_path: Path) -> None:
    found = prepared(tmp_path, [PAIR], tokenizer)
    assert found.group == 2 and found.reference
    assert [texts(example, tokenizer) for example in found.train] == [
        ("2+2=4", "4<|endoftext|>"),
        ("2+2=five", "five<|endoftext|>"),
    ]


def test_of_messages_the_last_turn_is_judged_with_a_prompt_of_its_own_or_without(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    before = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    good, bad = ([{"role": "assistant", "content": content}] for content in ("yes", "no"))
    rows = [
        {"chosen": before + good, "rejected": before + bad},
        {"prompt": before, "chosen": good, "rejected": bad},
    ]
    found = [texts(example, tokenizer)[1] for example in prepared(tmp_path, rows, tokenizer, tokens=200).train]
    assert found == 2 * ["yes<|im_end|>\n", "no<|im_end|>\n"]


def test_a_labelled_answer_comes_with_its_prompt_and_the_answer_to_another(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    found = prepared(tmp_path, ANSWERS, tokenizer, loss="kto")
    matched, others = found.train[::2], found.train[1::2]
    assert [texts(one, tokenizer)[0] for one in matched] == [f"{n}:{chr(97 + n)}" for n in range(5)]
    assert [one.values["desirable"] for one in matched] == [1, 0, 1, 0, 1]
    prompts, answers = zip(*(texts(one, tokenizer)[0].split(":") for one in others), strict=True)
    assert list(prompts) == [str(n) for n in range(5)] and sorted(answers) == list("abcde")
    assert all(answer != chr(97 + n) for n, answer in enumerate(answers))
    pairs = prepared(tmp_path, [PAIR, {**PAIR, "prompt": "1+3="}], tokenizer, loss="kto")
    assert [one.values["desirable"] for one in pairs.train[::2]] == [1, 0, 1, 0]


def test_a_row_to_be_rewarded_is_read_to_its_end_and_has_its_margin(tokenizer: Tokenizer, tmp_path: Path) -> None:
    found = rewards(tmp_path, [{**PAIR, "margin": 2}, {"chosen": "good", "rejected": "bad"}], tokenizer)
    read = [tokenizer.decode(list(one.input_ids), skip_special_tokens=False) for one in found.train]
    assert read == ["2+2=4<|endoftext|>", "2+2=five<|endoftext|>", "good<|endoftext|>", "bad<|endoftext|>"]
    assert [one.values["margin"] for one in found.train] == [2, 2, 0, 0] and found.num_labels == 1


def test_a_pair_of_which_one_answer_is_too_long_is_left_out_or_cut_as_one(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [PAIR, {**PAIR, "rejected": "x" * 90}]
    dropped = prepared(tmp_path, rows, tokenizer, too_long="drop")
    assert len(dropped.train) == 2 and "1 rows are longer than 61 tokens" in dropped.notes[0]
    cut = prepared(tmp_path, rows, tokenizer)
    assert [len(example.input_ids) for example in cut.train] == [5, 8, 5, 60]
    with pytest.raises(DataError, match=r"train.jsonl:2\); raise batch.seq_len, or set task.too_long"):
        prepared(tmp_path, rows, tokenizer, too_long="error")
    with pytest.raises(DataError, match=r"no token of an answer within 61 tokens: .*train.jsonl:1"):
        prepared(tmp_path, [{**PAIR, "prompt": "p" * 70}], tokenizer)


@pytest.mark.parametrize(
    ("row", "table", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, {}, r"train.jsonl:1\): the first has prompt, chosen; .*--map rejected="),
        ({**PAIR, "chosen": ""}, {}, r"train.jsonl:1: 'chosen' is empty"),
        ({"prompt": "a", "completion": "b"}, {"loss": "kto"}, r"judged answers \(completion, label, .*--map label="),
        ({"prompt": "a", "completion": "b", "label": 1}, {"loss": "kto"}, r"under 'label' beside 'completion', not 1"),
        (ANSWERS[0], {"loss": "kto"}, r"train.jsonl:1: is the only answer"),
        ({**PAIR, "chosen": [{"role": "assistant", "content": "b"}]}, {}, "so 'prompt' must be one as well"),
    ],
)
def test_what_is_wrong_with_a_row_is_said_with_its_place(
    row: dict[str, Any], table: dict[str, Any], message: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        prepared(tmp_path, [row], tokenizer, **table)


def test_a_margin_that_is_no_number_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train.jsonl:1: needs a number under 'margin', not 'much'"):
        rewards(tmp_path, [{**PAIR, "margin": "much"}], tokenizer)


def test_a_setting_of_another_loss_is_refused() -> None:
    with pytest.raises(ValidationError, match="label_smoothing is for loss = 'dpo', not 'ipo'"):
        PreferenceTable.model_validate({"train": "x", "loss": "ipo", "label_smoothing": 0.1})
    with pytest.raises(ValidationError, match="desirable_weight is for loss = 'kto', not 'dpo'"):
        PreferenceTable.model_validate({"train": "x", "desirable_weight": 2.0})


@given(group=st.integers(1, 4), micro=st.integers(1, 3), dp=st.integers(1, 3), first=st.integers(0, 40))
def test_groups_stay_in_one_microbatch_and_each_is_seen_once(group: int, micro: int, dp: int, first: int) -> None:
    rows = [Example(np.full(1 + n * 7 % 5, n // group), np.full(1 + n * 7 % 5, n % group)) for n in range(9 * group)]
    objective = TaskObjective(Prepared(rows, {}, RewardJudge(0.0), num_labels=0, pad_id=0, group=group), seed=2)
    size = 2 * micro * dp
    seen = []
    for rank in range(dp):
        share = Share(micro, rank, dp)
        for some in objective.train_rows(share, step=0, first_sample=first, global_size=size):
            assert some.num_labels == (micro if group > 1 else np.count_nonzero(some.labels != IGNORE))
            assert some.labels[:, 0].tolist() == list(range(group)) * micro
            assert all(
                len(set(some.input_ids[at : at + group, 0].tolist())) == 1 for at in range(0, micro * group, group)
            )
            seen += some.sample_ids.tolist()
    assert sorted(seen) == list(range(first * group, (first + size) * group))


ADAPTERS = {
    "low rank": (small_model(), LoraSpec(r=3)),
    "magnitudes": (small_model(), LoraSpec(r=3, dora=True)),
    "embedding and head": (gated_model(), LoraSpec(r=3, targets=("embed_tokens", "lm_head", "q_proj"))),
    "experts": (sparse_model(), LoraSpec(r=3, targets=("*.mlp.*", "q_proj"))),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_that_is_switched_off_leaves_the_base_and_comes_back(name: str) -> None:
    model, lora = ADAPTERS[name]
    ids = Batch(torch.arange(20).view(2, 10))
    adapted, base = adapted_stage(model, lora, Mesh.single()).module, build_stage(model, Mesh.single())
    names = dict(adapted.named_parameters())
    with torch.no_grad():
        for one in base.parameters:
            one.data.copy_(names[one.path])
        expected, changed = base.module(None, ids, "logits"), adapted(None, ids, "logits")
        with switched_off(adapted):
            assert torch.equal(adapted(None, ids, "logits"), expected)
        assert not torch.equal(changed, expected)
        assert torch.equal(adapted(None, ids, "logits"), changed)
