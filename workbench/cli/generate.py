"""`wb generate`: text from a checkpoint."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.cli.common import Command, Output

if TYPE_CHECKING:
    from workbench.cli._speech import Request


def generate(
    out: Output,
    path: Annotated[Path, typer.Argument(help="A checkpoint, a run folder, an adapter or a Hugging Face folder.")],
    prompt: Annotated[
        list[str] | None, typer.Option(help="The text to go on from; may be given several times.")
    ] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(help='A prompt a line; of a .jsonl file, {"prompt": ...} a line.')
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Answer what is typed, in the tokenizer's chat template, until it ends.")
    ] = False,
    system: Annotated[str, typer.Option(help="The system message of a chat.")] = "",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add at most.", min=1)] = 64,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token each time; 1 draws as trained.")
    ] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from the k likeliest tokens; 0: from all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that together have this share.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Decides the draw.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends an answer and is left out of it.")] = None,
    tp: Annotated[int, typer.Option(min=1, help="Ranks that share each layer.")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="Stages that the layers are dealt over.")] = 1,
    tokenizer: Annotated[Path | None, typer.Option(help="A tokenizer folder, when the checkpoint has none.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="An adapter to PATH, to speak in its place.")] = None,
    base: Annotated[Path | None, typer.Option(help="Where the base of an adapter is, if it has moved.")] = None,
    family: Annotated[str, typer.Option(help="The model family of a Hugging Face folder.")] = "",
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
) -> None:
    """Go on from prompts, or chat; a single answer is shown as it comes. Greedy unless --temperature is given."""
    from converters.merge import open_merged
    from workbench.cli._speech import Request, device_of
    from workbench.errors import ConfigError
    from workbench.models.generate import Sampling
    from workbench.spec.layout import ParallelLayout

    given = [*(prompt or []), *(_read_prompts(prompts_file) if prompts_file is not None else [])]
    if bool(given) == chat:
        raise ConfigError("give --prompt or --prompts-file, or else --chat" + (", not both" if chat else ""))
    if adapter is not None:
        if base is not None:
            raise ConfigError(f"--adapter {adapter} is to {path}, but --base says {base}; give one of the two")
        path, base = adapter, path
    device_of(device)
    opened = open_merged(path, base=base, family=family or None)
    if tokenizer is None and opened.tokenizer is None:
        raise ConfigError(f"{path}: holds no tokenizer; name a folder with --tokenizer")
    layout = ParallelLayout(tp=tp, pp=pp)
    layout.validate_for(opened.model)
    request = Request(
        path,
        base,
        family or None,
        tokenizer,
        device,
        layout,
        tuple(given),
        max_new_tokens,
        Sampling(temperature, top_k, top_p, seed),
        tuple(stop or ()),
        turns="" if chat else None,
        system=system,
        shows=not out.json,
        shows_prompts=not out.quiet,
    )
    out.result(_spoken(request, out), text="")


def _spoken(request: Request, out: Output) -> dict[str, Any]:
    """What `speak` gives on the ranks that are started here; a chat's input is passed on to the first of them."""
    from workbench.cli._speech import forward_lines, speak
    from workbench.parallel.launch import rank_environment, require_devices, run_on_ranks

    nproc = request.layout.world_size
    if request.device != "cpu" and rank_environment() is None:
        require_devices(nproc)
    if request.turns is None or nproc == 1 or rank_environment() is not None:
        return run_on_ranks(speak, request, nproc=nproc)
    with tempfile.TemporaryDirectory(prefix="wb-chat-") as folder:
        pipe = os.path.join(folder, "turns")
        os.mkfifo(pipe)  # started ranks have no input of their own
        threading.Thread(target=forward_lines, args=(sys.stdin, pipe), daemon=True).start()
        return run_on_ranks(speak, replace(request, turns=pipe), nproc=nproc)


def _read_prompts(path: Path) -> list[str]:
    """The prompts of a file; DataError when there are none, or a line of JSON has no text under "prompt"."""
    from workbench.errors import DataError

    try:
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text: {error}") from error
    if not lines:
        raise DataError(f"{path}: holds no prompts; give one a line")
    if path.suffix != ".jsonl":
        return lines
    try:
        return [str(json.loads(line)["prompt"]) for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f'{path}: not {{"prompt": ...}} on every line ({type(error).__name__}: {error})') from error


COMMAND = Command(
    "generate",
    generate,
    panel="Models",
    order=60,
    example='wb generate runs/tiny --prompt "def main():"\n'
    'wb generate models/gpt2 --prompt "Once upon a time" --max-new-tokens 200 --temperature 0.8 --top-p 0.95\n'
    "wb generate models/base --adapter runs/chat --chat --tp 2 --pp 2",
)
