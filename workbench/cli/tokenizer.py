"""`wb tokenizer`: train a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from workbench.cli import _options as option
from workbench.cli.common import Command, Group, Output, count_text, time_text


def train(
    out: Output,
    source: Annotated[
        str, typer.Argument(help="A text or .jsonl file, a folder of them, or stdlib[:train|valid|test].")
    ],
    destination: Annotated[Path, typer.Argument(help="The folder to write; Hugging Face's loaders read it.")],
    vocab_size: Annotated[
        int, typer.Option(help="Number of ids, the 256 bytes and the two specials included.")
    ] = 32000,
    field: option.TextField = "text",
    glob: option.Glob = "**/*",
    max_gib: Annotated[
        float, typer.Option(help="Read this much of the text at most; training holds its words in memory.")
    ] = 1.0,
    force: Annotated[bool, typer.Option("--force", help="Replace a tokenizer at the destination.")] = False,
) -> None:
    """Train a byte-level BPE tokenizer: every text can be encoded, the same text gives the same tokenizer."""
    import time

    from pretrain.data.bpe import check_destination, save_tokenizer, train_tokenizer
    from pretrain.data.sources import text_source
    from workbench.tokenizer import Tokenizer

    check_destination(destination, overwrite=force)
    started = time.monotonic()
    with out.progress("reading", unit="B") as bar:
        backend = train_tokenizer(
            text_source(source, field=field, pattern=glob),
            vocab_size=vocab_size,
            max_bytes=int(max_gib * 2**30),
            progress=lambda done, total: bar.update(done, total=total),
        )
    tokenizer = Tokenizer.load(save_tokenizer(backend, destination, overwrite=force))
    seconds = time.monotonic() - started
    result = {
        "tokenizer": str(destination),
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "pad_id": tokenizer.pad_id,
        "sha256": tokenizer.sha256,
        "seconds": seconds,
    }
    out.result(
        result,
        f"{destination}: {count_text(tokenizer.vocab_size)} tokens in {time_text(seconds)}\n"
        f"next: wb data build {source} data/NAME --tokenizer {destination}",
    )


COMMAND = Group(
    "tokenizer",
    help="Train a tokenizer.",
    commands=(
        Command(
            "train",
            train,
            example="wb tokenizer train corpus/ tokenizers/mine --vocab-size 32000\n"
            "wb tokenizer train stdlib:train tokenizers/python --vocab-size 2050",
        ),
    ),
    panel="Data",
    order=20,
)
