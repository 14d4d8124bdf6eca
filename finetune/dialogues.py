"""Prompts with an answer, in groups that are kept or left out as one: how tasks of preference read rows. No torch.

A side is text, or messages that the tokenizer's chat template renders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from finetune.chat import ChatTemplate, Piece
from finetune.rows import Row, places, text_of
from finetune.task import TooLong, notes_of_too_long
from workbench.errors import DataError

if TYPE_CHECKING:
    from workbench.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Dialogue:
    """What is asked and what is answered; both text, or both lists of messages."""

    row: Row
    prompt: Any
    answer: Any


class Encoded(NamedTuple):
    """Tokens of a dialogue, which of them are the answer's, and the place of its row."""

    ids: list[int]
    is_answer: list[bool]
    place: str


def dialogue(row: Row, answer: str) -> Dialogue:
    """The dialogue of a row that ends with what stands under `answer`.

    Without a prompt, messages but the last are the prompt, and a text has none.
    """
    found = row.values.get(answer)
    if isinstance(found, list) and found:
        prompt = row.values.get("prompt", found[:-1])
        if not isinstance(prompt, list):
            raise DataError(f"{row.place}: {answer!r} is a list of messages, so 'prompt' must be one as well")
        return Dialogue(row, prompt, found if "prompt" in row.values else found[-1:])
    text = text_of(row, answer)
    if not text:
        raise DataError(f"{row.place}: {answer!r} is empty; every row needs an answer")
    return Dialogue(row, text_of(row, "prompt") if "prompt" in row.values else "", text)


class DialogueEncoder:
    """Groups of dialogues to groups of tokens; keeps notes of those that did not fit in `limit` tokens each."""

    def __init__(self, tokenizer: Tokenizer, limit: int, too_long: TooLong) -> None:
        self.tokenizer, self.limit, self.too_long = tokenizer, limit, too_long
        self.notes: list[str] = []
        self._template: ChatTemplate | None = None

    def encode(self, groups: Sequence[Sequence[Dialogue]]) -> list[list[Encoded] | None]:
        """The tokens of each group, None for one that is left out; DataError where an answer is cut off whole."""
        texts = [[self._pieces(one) for one in group] for group in groups]
        ids = iter(self.tokenizer.encode_batch([text for group in texts for pieces in group for text, _ in pieces]))
        whole = [
            [
                self._join(one, [(next(ids), learned) for _, learned in pieces])
                for one, pieces in zip(*both, strict=True)
            ]
            for both in zip(groups, texts, strict=True)
        ]
        rows = [group[0].row for group in groups]
        long = [any(len(one.ids) > self.limit for one in group) for group in whole]
        cut_rows = [row for row, cut in zip(rows, long, strict=True) if cut]
        self.notes += notes_of_too_long(cut_rows, self.limit, self.too_long)
        found = [None if cut and self.too_long == "drop" else self._cut(g) for g, cut in zip(whole, long, strict=True)]
        if all(group is None for group in found):
            raise DataError(f"all {len(rows)} rows are longer than {self.limit} tokens; raise batch.seq_len")
        if lost := [r for r, g in zip(rows, found, strict=True) if g and not all(any(one.is_answer) for one in g)]:
            raise DataError(
                f"{len(lost)} rows have no token of an answer within {self.limit} tokens: the prompt alone fills them "
                f"({places(lost)}); raise batch.seq_len or set task.too_long = 'drop'"
            )
        return found

    def _pieces(self, one: Dialogue) -> list[Piece]:
        if isinstance(one.answer, str):
            return [(one.prompt, False), (one.answer, True)]
        self._template = self._template or ChatTemplate(self.tokenizer)
        pieces = self._template.pieces(replace(one.row, values={"messages": [*one.prompt, *one.answer]}))
        # Of all that the assistant says the last is judged: the last piece that follows one that is not.
        last = max(n for n, (_, learned) in enumerate(pieces) if not learned)
        return [(text, n > last) for n, (text, _) in enumerate(pieces)]

    def _join(self, one: Dialogue, pieces: Sequence[tuple[list[int], bool]]) -> Encoded:
        """The tokens with those that begin and end a text; a template has put its own."""
        is_text, eos = isinstance(one.answer, str), self.tokenizer.eos_id
        start = self.tokenizer.start_ids if is_text else []
        ids = [*start, *(token for tokens, _ in pieces for token in tokens)]
        is_answer = [False] * len(start) + [learned for tokens, learned in pieces for _ in tokens]
        if is_text and eos is not None and ids[-1] != eos:
            ids, is_answer = [*ids, eos], [*is_answer, True]
        return Encoded(ids, is_answer, one.row.place)

    def _cut(self, group: Sequence[Encoded]) -> list[Encoded]:
        return [Encoded(one.ids[: self.limit], one.is_answer[: self.limit], one.place) for one in group]
