"""What `wb generate` does on its ranks: a model that goes on from prompts, or that chats."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from workbench.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from finetune.chat import ChatTemplate
    from workbench.models.decoder import DecoderStage
    from workbench.models.generate import Recalled, Sampling
    from workbench.spec.layout import ParallelLayout
    from workbench.tokenizer import Tokenizer


@dataclass(frozen=True)
class Request:
    """What is to be said, and of which model; travels to the ranks. `turns`: where a chat reads what the user says, a
    pipe's path, or "" for this process's input; None where there is no chat."""

    path: Path
    base: Path | None
    family: str | None
    tokenizer: Path | None
    device: str
    layout: ParallelLayout
    prompts: tuple[str, ...]
    max_new_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]
    turns: str | None = None
    system: str = ""
    shows: bool = True
    shows_prompts: bool = True


@dataclass
class Spoken:
    """The text of one row as its tokens come. `is_over`: one of the `stop` strings was said, and is not in `text`."""

    words: Tokenizer
    prompt: Sequence[int]
    stop: tuple[str, ...]
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    is_over: bool = False
    _shown: int = 0

    def __post_init__(self) -> None:
        self._before = len(self.words.decode(self.prompt))

    def add(self, token: int) -> str:
        """The text that is certain now and was not before: no half of a character, nothing that may begin a stop."""
        self.tokens.append(token)
        self.text = self.words.decode([*self.prompt, *self.tokens])[self._before :]
        found = [at for at in map(self.text.find, self.stop) if at >= 0]
        if found:
            self.text, self.is_over = self.text[: min(found)], True
        return self._show(len(self.text) if found else self._certain())

    def rest(self) -> str:
        """What was held back, once nothing follows."""
        return self._show(len(self.text))

    def _certain(self) -> int:
        if self.text.endswith("\ufffd"):
            return self._shown
        held = (n for word in self.stop for n in range(len(word) - 1, 0, -1) if self.text.endswith(word[:n]))
        return len(self.text) - max(held, default=0)

    def _show(self, end: int) -> str:
        start, self._shown = self._shown, max(end, self._shown)
        return self.text[start : self._shown]


def speak(request: Request) -> dict[str, Any]:
    """One rank's part; on rank 0 the text goes to the terminal as it comes. The result as plain values."""
    import torch

    from converters.merge import open_merged
    from workbench.models.generate import load_model
    from workbench.parallel.mesh import Mesh
    from workbench.tokenizer import Tokenizer

    mesh = Mesh.create(request.layout, device_of(request.device))
    # The parent has compared the base with the adapter's record already.
    opened = open_merged(request.path, base=request.base, family=request.family, check_base=False)
    folder = request.tokenizer or opened.tokenizer
    assert folder is not None, "the parent has looked"
    words = Tokenizer.load(folder)
    stop = {token for token in (opened.model.eos_token_id, words.eos_id) if token is not None}
    stage = load_model(opened.model, opened.source, mesh=mesh)
    first = mesh.world.rank == 0
    speaker = Speaker(stage, words, request, stop, sys.stdout if first and request.shows else None)
    started = time.monotonic()
    with torch.inference_mode():
        answers = speaker.answers() if request.turns is None else speaker.chat()
    seconds = time.monotonic() - started
    spoken = sum(len(answer["tokens"]) for answer in answers)
    return {"answers": answers, "seconds": seconds, "tokens_per_second": spoken / max(seconds, 1e-9)}


class Speaker:
    """A model with its words, and what was asked of it. Collective over the tensor and pipeline axes throughout."""

    def __init__(
        self, stage: DecoderStage, words: Tokenizer, request: Request, stop: Collection[int], screen: TextIO | None
    ) -> None:
        self._stage, self._words, self._request, self._stop, self._screen = stage, words, request, set(stop), screen

    def answers(self) -> list[dict[str, Any]]:
        """What follows each prompt; a single one is shown as it comes, several when all are there."""
        prompts = self._request.prompts
        rows = [self._words.encode(prompt, special=True) for prompt in prompts]
        shown = prompts if self._request.shows_prompts else [""] * len(prompts)
        spoken = self._follow(rows, before=shown[0] if len(rows) == 1 else "")
        if len(rows) > 1:
            self._show("\n\n".join(before + row.text for before, row in zip(shown, spoken, strict=True)))
        return [_answer(prompt, row) for prompt, row in zip(prompts, spoken, strict=True)]

    def chat(self) -> list[dict[str, Any]]:
        """Answers what the user says, turn by turn, until the input ends; all turns before are remembered, and only
        what a turn adds to them is computed."""
        from finetune.chat import ChatTemplate
        from workbench.models.generate import Recalled

        template = ChatTemplate(self._words)
        self._stop |= self._turn_ends(template)
        system = self._request.system
        messages = [{"role": "system", "content": system}] if system else []
        answers, recalled = [], Recalled()
        for said in self._turns():
            messages.append({"role": "user", "content": said})
            (spoken,) = self._follow([self._words.encode(template.prompt(messages))], recalled=recalled)
            self._show("\n")
            messages.append({"role": "assistant", "content": spoken.text.strip()})
            answers.append(_answer(said, spoken))
        return answers

    def _turn_ends(self, template: ChatTemplate) -> set[int]:
        """The special token, if there is one, by which the template ends an answer."""
        after = self._words.encode(template.ending())
        return {token for token in after if token in self._words.special_ids and token == after[0]}

    def _follow(self, rows: list[list[int]], *, before: str = "", recalled: Recalled | None = None) -> list[Spoken]:
        from workbench.models.generate import generate_batch

        request = self._request
        spoken = [Spoken(self._words, ids, request.stop) for ids in rows]
        steps = generate_batch(
            self._stage,
            rows,
            max_new_tokens=request.max_new_tokens,
            sampling=request.sampling,
            stop=self._stop,
            ends=lambda row: spoken[row].is_over,
            recalled=recalled,
        )
        self._show(before)
        for step in steps:
            for row, token in step.items():
                piece = spoken[row].add(token)
                if len(rows) == 1:
                    self._show(piece)
        if len(rows) == 1:
            self._show(spoken[0].rest())
        return spoken

    def _turns(self) -> Iterator[str]:
        """What the user says, on every rank."""
        world = self._stage.mesh.world
        lines = _lines(self._request.turns, self._screen) if world.rank == 0 else iter(())
        while (said := world.broadcast_object(next(lines, None))) is not None:
            yield said

    def _show(self, text: str) -> None:
        if self._screen is not None:
            print(text, end="", file=self._screen, flush=True)


def _lines(path: str | None, screen: TextIO | None) -> Iterator[str]:
    """Lines that are not empty, each asked for where somebody looks at the screen."""
    with open(path, encoding="utf-8") if path else nullcontext(sys.stdin) as source:
        while True:
            if screen is not None:
                print("> ", end="", file=screen, flush=True)
            line = source.readline()
            if not line:
                return
            if line.strip():
                yield line.strip()


def _answer(prompt: str, spoken: Spoken) -> dict[str, Any]:
    return {"prompt": prompt, "text": spoken.text, "prompt_tokens": len(spoken.prompt), "tokens": spoken.tokens}


def device_of(name: str) -> torch.device:
    """The device called cpu, cuda or auto; ConfigError when this machine does not have it."""
    import torch

    from workbench.parallel.launch import choose_device

    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device {name!r} is not known; use one of auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: there is no CUDA device on this machine; use cpu")
    return torch.device("cpu") if name == "cpu" else choose_device()


def forward_lines(lines: Iterable[str], pipe: str) -> None:
    """Passes on to the reader of `pipe` what is said here, line by line."""
    with open(pipe, "w", encoding="utf-8") as file:
        for line in lines:
            file.write(line)
            file.flush()
