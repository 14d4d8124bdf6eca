"""Conversations as pieces of text: which of them the model is to learn to say, found with the tokenizer's own template.

No generation markers are needed: what an assistant turn adds is the difference between the conversation rendered with
and without it. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from finetune.jsonl import Row
from workbench.errors import DataError

if TYPE_CHECKING:
    from workbench.tokenizer import Tokenizer

Piece = tuple[str, bool]
"""Text, and whether it is to be learned."""


class ChatTemplate:
    """The Jinja template of a tokenizer's folder, run in a sandbox as transformers runs it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        from jinja2.exceptions import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        source = tokenizer.chat_template
        if source is None:
            raise DataError(
                f"{tokenizer.path}: the tokenizer has no chat template, so rows of messages cannot be rendered; "
                "save one there as chat_template.jinja, or give rows of prompt and completion"
            )
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
        environment.globals["raise_exception"] = _refuse
        self._errors = TemplateError
        self._template = environment.from_string(source)
        special = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        self._words = {name: _text(tokenizer, token) for name, token in special.items()}

    def pieces(self, row: Row) -> list[Piece]:
        """The conversation of a row cut into pieces; DataError when it has no answer or the template refuses it."""
        messages = _messages(row)
        found: list[Piece] = []
        done = ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(row, messages[:index], prompt=True)
            after = self._render(row, messages[: index + 1], prompt=False)
            if not (before.startswith(done) and after.startswith(before)):
                raise DataError(
                    f"{row.place}: the chat template changes earlier turns when a later one is added, so the answers "
                    "cannot be told apart; give rows of prompt and completion"
                )
            found += [(before[len(done) :], False), (after[len(before) :], True)]
            done = after
        last = next(message for message in reversed(messages) if message["role"] == "assistant")
        if found[-1][0].rstrip().endswith(last["content"].rstrip()):
            found.append((self._words["eos_token"], True))  # the template does not end a turn: teach the model to stop
        return found

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The conversation so far as text that asks for the next answer; DataError when the template refuses it."""
        return self._rendered(messages, prompt=True)

    def ending(self) -> str:
        """What the template puts after an answer."""
        question, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "answer"}
        return self._rendered([question, answer], prompt=False).rpartition(answer["content"])[2]

    def _rendered(self, messages: Sequence[Mapping[str, str]], *, prompt: bool) -> str:
        try:
            return self._template.render(messages=messages, add_generation_prompt=prompt, tools=None, **self._words)
        except self._errors as error:
            raise DataError(f"the chat template refuses these messages: {error}") from error

    def _render(self, row: Row, messages: Sequence[Mapping[str, str]], *, prompt: bool) -> str:
        try:
            return self._rendered(messages, prompt=prompt)
        except DataError as error:
            raise DataError(f"{row.place}: {error}") from None


def _messages(row: Row) -> list[dict[str, str]]:
    messages = row.values["messages"]
    valid = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not valid:
        raise DataError(f'{row.place}: messages must be a list of {{"role": ..., "content": text}}')
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{row.place}: none of the {len(messages)} messages has the role 'assistant'; nothing to learn")
    return messages


def _refuse(message: str) -> None:
    from jinja2.exceptions import TemplateError

    raise TemplateError(message)


def _text(tokenizer: Tokenizer, token: int | None) -> str:
    return "" if token is None else tokenizer.decode([token], skip_special_tokens=False)
