"""Conversations as pieces of text: which of them the model is to learn to say, found with the tokenizer's own template.

Where the template marks what it generates, {% generation %}, that is learned. Markers are not needed: what an assistant
turn adds is the difference between the conversation rendered with and without it. No torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from finetune.rows import Row
from workbench.errors import DataError

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    from workbench.tokenizer import Tokenizer

Piece = tuple[str, bool]
"""Text, and whether it is to be learned."""

_TAG: Final = re.compile(r"{%-?\s*generation\s*-?%}")


class ChatTemplate:
    """The Jinja template of a tokenizer's folder, run in a sandbox as transformers runs it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        from jinja2.exceptions import TemplateError

        source = tokenizer.chat_template
        if source is None:
            raise DataError(
                f"{tokenizer.path}: the tokenizer has no chat template, so rows of messages cannot be rendered; "
                "save one there as chat_template.jinja, or give rows of prompt and completion"
            )
        self._errors = TemplateError
        try:
            self._template = _environment().from_string(source)
        except TemplateError as error:
            raise DataError(f"{tokenizer.path}: the chat template is not one that Jinja reads ({error})") from error
        self._marks = _TAG.search(source) is not None
        special = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        self._words = {name: _text(tokenizer, token) for name, token in special.items()}

    def pieces(self, row: Row) -> list[Piece]:
        """The conversation of a row cut into pieces; DataError when it has no answer or the template refuses it."""
        messages = _messages(row)
        return self._marked(row, messages) if self._marks else self._by_prefixes(row, messages)

    def _marked(self, row: Row, messages: Sequence[Mapping[str, str]]) -> list[Piece]:
        """What the template marks as generated. The marks decide, the end of a turn included."""
        from finetune._generation_tag import BEGIN, END

        parts = re.split(f"[{BEGIN}{END}]", self._render(row, messages, prompt=False))
        return [(text, index % 2 == 1) for index, text in enumerate(parts) if text]

    def _by_prefixes(self, row: Row, messages: Sequence[Mapping[str, str]]) -> list[Piece]:
        """What each answer adds to the text before it, which must be a beginning of the text with it."""
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
                    "cannot be told apart; put {% generation %} around what it generates, or give rows of prompt and "
                    "completion"
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


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up for chat templates, without the clock: rows must not depend on the day."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    from finetune._generation_tag import GenerationTag

    extensions: list[Any] = [GenerationTag, "jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    return environment


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


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
