"""`wb generate`: text from a checkpoint."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workbench.cli.common import Command, Output

if TYPE_CHECKING:
    import torch

    from workbench.tokenizer import Tokenizer


def generate(
    out: Output,
    path: Annotated[Path, typer.Argument(help="A checkpoint, a run folder or a Hugging Face folder.")],
    prompt: Annotated[str, typer.Option(help="The text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add at most.", min=1)] = 64,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token each time; 1 draws as trained.")
    ] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from the k likeliest tokens; 0: from all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that together have this share.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Decides the draw.")] = 0,
    tokenizer: Annotated[Path | None, typer.Option(help="A tokenizer folder, when the checkpoint has none.")] = None,
    base: Annotated[Path | None, typer.Option(help="Where the base of an adapter is, if it has moved.")] = None,
    family: Annotated[str, typer.Option(help="The model family of a Hugging Face folder.")] = "",
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
) -> None:
    """Go on from a prompt, token by token as they come; greedy unless --temperature is given."""
    from converters.merge import open_merged
    from workbench.errors import ConfigError
    from workbench.models.generate import Sampling, load_model
    from workbench.models.generate import generate as generate_tokens
    from workbench.tokenizer import Tokenizer

    opened = open_merged(path, base=base, family=family or None)
    folder = tokenizer or opened.tokenizer
    if folder is None:
        raise ConfigError(f"{path}: holds no tokenizer; name a folder with --tokenizer")
    words = Tokenizer.load(folder)
    sampling = Sampling(temperature, top_k, top_p, seed)
    ids = words.encode(prompt, special=True)
    stop = {token for token in (opened.model.eos_token_id, words.eos_id) if token is not None}
    stage = load_model(opened.model, opened.source, device=_device(device))
    started = time.monotonic()
    tokens = generate_tokens(stage, ids, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop)
    found: list[int] = []
    text = ""
    for piece in _pieces(words, ids, tokens, found):
        if not text and not (out.json or out.quiet):
            print(prompt, end="", file=out.stdout)
        text += piece
        if not out.json:
            print(piece, end="", file=out.stdout, flush=True)
    seconds = time.monotonic() - started
    result = {"prompt": prompt, "text": text, "prompt_tokens": len(ids), "tokens": found, "seconds": seconds}
    out.result({**result, "tokens_per_second": len(found) / max(seconds, 1e-9)}, text="")


def _pieces(words: Tokenizer, prompt: list[int], tokens: Iterator[int], found: list[int]) -> Iterator[str]:
    """The text that each token adds; a token that ends inside a character waits for the next one."""
    shown = words.decode(prompt)
    for token in tokens:
        found.append(token)
        whole = words.decode([*prompt, *found])
        if not whole.endswith("\ufffd"):
            yield whole[len(shown) :]
            shown = whole
    rest = words.decode([*prompt, *found])[len(shown) :]
    if rest:
        yield rest


def _device(name: str) -> torch.device:
    import torch

    from workbench.errors import ConfigError

    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device {name!r} is not known; use one of auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: there is no CUDA device on this machine; use cpu")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


COMMAND = Command(
    "generate",
    generate,
    panel="Models",
    order=60,
    example='wb generate runs/tiny --prompt "def main():"\n'
    'wb generate models/gpt2 --prompt "Once upon a time" --max-new-tokens 200 --temperature 0.8 --top-p 0.95',
)
