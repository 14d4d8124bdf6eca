"""Of a conversation the model learns what the template generates: by its markers, or by what an answer adds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune.chat import ChatTemplate, Piece
from finetune.rows import Row
from finetune.tasks.sft import TASK, SftTable
from tests.finetune.data import byte_tokenizer, small_model, write_rows
from tests.finetune.test_tasks import CHATML
from workbench.errors import DataError
from workbench.tokenizer import Tokenizer

MARKED = (
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n"
    "{%- if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}<|im_end|>{% endgeneration %}"
    "{%- else %}{{ m.content }}<|im_end|>{% endif %}\n{%- endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Hides what earlier answers thought, so that no prefix is a prefix.
FORGETFUL = (
    "{% for m in messages %}{{ m.role }}: "
    "{% if loop.last %}{{ m.content }}{% else %}{{ m.content.split('</think>') | last }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TALK = [("system", "S"), ("user", "u1"), ("assistant", "<think>t</think>a1"), ("user", "u2"), ("assistant", "a2")]
MESSAGES = [{"role": role, "content": content} for role, content in TALK]


def pieces(folder: Path, template: str, messages: list[dict[str, str]] = MESSAGES) -> list[Piece]:
    tokenizer = Tokenizer.load(byte_tokenizer(folder, chat_template=template))
    return ChatTemplate(tokenizer).pieces(Row("a.jsonl", 1, {"messages": messages}))


def learned(found: list[Piece]) -> list[str]:
    return [text for text, flag in found if flag]


def test_markers_of_the_template_say_what_is_learned(tmp_path: Path) -> None:
    assert learned(pieces(tmp_path, MARKED)) == ["<think>t</think>a1<|im_end|>", "a2<|im_end|>"]


def test_without_markers_the_same_is_learned_from_what_answers_add(tmp_path: Path) -> None:
    assert learned(pieces(tmp_path, CHATML)) == ["<think>t</think>a1<|im_end|>\n", "a2<|im_end|>\n"]


def test_markers_mask_the_tokens_that_transformers_masks(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = byte_tokenizer(tmp_path, chat_template=MARKED)
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        MESSAGES, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    tokenizer = Tokenizer.load(folder)
    ours = [(token, flag) for text, flag in pieces(tmp_path, MARKED) for token in tokenizer.encode(text)]
    assert [token for token, _ in ours] == theirs["input_ids"]
    assert [int(flag) for _, flag in ours] == theirs["assistant_masks"]


def test_a_template_that_rewrites_earlier_turns_is_refused_unless_it_marks_its_answers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a.jsonl:1: the chat template changes earlier turns .*put {% generation %}"):
        pieces(tmp_path, FORGETFUL)
    marked = FORGETFUL.replace("{% if loop.last %}", "{% generation %}{% if loop.last %}")
    marked = marked.replace("{% endif %}\n{% endfor %}", "{% endif %}{% endgeneration %}\n{% endfor %}")
    assert "a2" in learned(pieces(tmp_path, marked))


def test_a_template_may_leave_loops_and_write_json(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m | tojson(indent=1) }}{% if loop.last %}{% break %}{% endif %}{% endfor %}"
    [(text, flag), *_] = pieces(tmp_path, template + "{% generation %}x{% endgeneration %}")
    assert '"role": "system"' in text and not flag


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}", r"the chat template is not one that Jinja reads \(Unexpected end"),
        ("{{ raise_exception('no system role') }}", r"a.jsonl:1: the chat template refuses these messages: no system"),
    ],
)
def test_a_broken_template_is_named(template: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        pieces(tmp_path, template)


def notes(folder: Path, template: str | None, row: dict[str, Any]) -> list[str]:
    tokenizer = Tokenizer.load(byte_tokenizer(folder, chat_template=template, pad=None))
    table = SftTable(train=(write_rows(folder / "train.jsonl", [row]),))
    return list(TASK.prepare(table, tokenizer, model=small_model(), max_tokens=200).notes)


def test_answers_that_never_teach_the_model_to_stop_are_warned_of(tmp_path: Path) -> None:
    [note] = notes(tmp_path / "a", MARKED, {"messages": MESSAGES})
    assert "no row teaches the end of text '<|endoftext|>': answers end with 'a2<|im_end|>'" in note
    assert "make eos_token in tokenizer_config.json what the chat template ends a turn with" in note
    assert notes(tmp_path / "b", MARKED.replace("<|im_end|>", "<|endoftext|>"), {"messages": MESSAGES}) == []


def test_padding_with_the_end_of_text_takes_no_answer_its_end(tmp_path: Path) -> None:
    assert notes(tmp_path, None, {"prompt": "p", "completion": "a"}) == []
