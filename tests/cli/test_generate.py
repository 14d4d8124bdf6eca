"""wb generate with several prompts, stop strings, a chat, and ranks that share layers."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from tests.finetune.adapters import write_adapter, write_base
from tests.finetune.data import byte_tokenizer, small_model
from workbench.cli._speech import Spoken
from workbench.cli.main import main
from workbench.spec.lora import LoraSpec
from workbench.tokenizer import Tokenizer

TEMPLATE = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("generate")
    tokenizer = byte_tokenizer(root / "tokenizer", chat_template=TEMPLATE)
    write_base(root / "base", small_model(max_position_embeddings=256), tokenizer=tokenizer)
    return root


def answer(words: list[str], capsys: pytest.CaptureFixture[str], *, code: int = 0) -> Any:
    capsys.readouterr()
    assert main(["generate", *words, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_prompts_are_answered_together_as_each_is_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "prompts.jsonl").write_text('{"prompt": "a longer one"}\n{"prompt": "z"}\n')
    base = str(folder / "base")
    found = answer([base, "--prompt", "ab", "--prompts-file", str(folder / "prompts.jsonl")], capsys)["answers"]
    assert [one["prompt"] for one in found] == ["ab", "a longer one", "z"]
    for one in found:
        assert answer([base, "--prompt", one["prompt"]], capsys)["answers"] == [one]
    (folder / "prompts.txt").write_text("ab\na longer one\n")
    assert main(["generate", base, "--prompts-file", str(folder / "prompts.txt")]) == 0
    assert capsys.readouterr().out == "\n\n".join(one["prompt"] + one["text"] for one in found[:2]) + "\n"


def test_ranks_that_share_layers_say_the_same(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(folder / "base"), "--prompt", "ab", "--prompt", "c", "--temperature", "1", "--seed", "4"]
    one, *others = (answer([*words, *flags], capsys)["answers"] for flags in ([], ["--tp", "2"], ["--pp", "2"]))
    assert others == [one, one]


def test_an_adapter_speaks_in_place_of_the_checkpoint(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, lora = str(folder / "base"), LoraSpec(r=2, alpha=8.0)
    adapter = str(write_adapter(folder / "adapter", small_model(max_position_embeddings=256), lora, Path(base)))
    assert main(["merge", adapter, str(folder / "merged"), "-q"]) == 0
    words = ["--prompt", "ab", "--max-new-tokens", "12"]
    found = answer([base, "--adapter", adapter, *words], capsys)["answers"]
    assert found == answer([str(folder / "merged"), *words], capsys)["answers"]
    assert found != answer([base, *words], capsys)["answers"]
    wrong = answer([base, "--adapter", adapter, "--base", base, *words], capsys, code=2)
    assert "give one of the two" in wrong["error"]["message"]


def test_a_stop_string_ends_an_answer_and_is_never_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(folder / "base"), "--prompt", "ab", "--temperature", "1"]
    free = answer(words, capsys)["answers"][0]
    stop = free["text"][5:8]
    found = answer([*words, "--stop", stop], capsys)["answers"][0]
    assert found["text"] == free["text"][: free["text"].index(stop)] and len(found["tokens"]) < len(free["tokens"])
    assert main(["generate", *words, "--stop", stop, "-q"]) == 0
    assert capsys.readouterr().out == found["text"] + "\n"


def test_text_is_shown_when_it_is_certain(folder: Path) -> None:
    words = Tokenizer.load(folder / "tokenizer")
    spoken = Spoken(words, words.encode("a"), ("END", "é!"))
    pieces = [spoken.add(token) for token in words.encode("bEéENEND")]
    assert pieces == ["b", "", "", "E", "", "", "", "éEN", "", ""] or "".join(pieces) == "bEéEN"
    assert spoken.text == "bEéEN" and spoken.is_over and spoken.rest() == ""
    unfinished = Spoken(words, words.encode("a"), ("END",))
    assert [unfinished.add(token) for token in words.encode("xEN")] == ["x", "", ""] and unfinished.rest() == "EN"


@pytest.mark.parametrize("axis", ["--tp", "--pp", "none"])
def test_a_chat_remembers_its_turns_until_the_input_ends(
    axis: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\nand you?\n"))
    words = [str(folder / "base"), "--max-new-tokens", "5"]
    ranks = [] if axis == "none" else [axis, "2"]
    first, second = answer([*words, "--chat", "--system", "be kind", *ranks], capsys)["answers"]
    opening = "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    alone = answer([*words, "--prompt", opening], capsys)["answers"][0]
    assert (first["prompt"], first["tokens"]) == ("hello", alone["tokens"])
    more = f"{opening}{first['text'].strip()}<|im_end|>\n<|im_start|>user\nand you?<|im_end|>\n<|im_start|>assistant\n"
    assert second["tokens"] == answer([*words, "--prompt", more], capsys)["answers"][0]["tokens"]


def test_what_is_asked_wrongly_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = str(folder / "base")
    for words, message, code in (
        ([], "give --prompt or --prompts-file, or else --chat", 2),
        (["--chat", "--prompt", "a"], "not both", 2),
        (["--prompt", "a", "--tp", "3"], "num_attention_heads=4 cannot be split over tp=3", 3),
        (["--prompts-file", str(folder / "gone")], "cannot be read as text", 5),
    ):
        assert message in answer([base, *words], capsys, code=code)["error"]["message"]
