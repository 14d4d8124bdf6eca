"""`wb data`: build, describe and look at training data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.cli import _options as option
from workbench.cli._preview import preview_config, preview_rows
from workbench.cli.common import Command, Group, Output, count_text, size_text, time_text

if TYPE_CHECKING:
    from pretrain.data.indexed import IndexedTokens
    from workbench.tokenizer import Tokenizer

EMBEDDED_TASKS = ("pyblimp", "pycola")


def build(
    out: Output,
    source: Annotated[
        str,
        typer.Argument(help="A text or .jsonl file, a folder of them, stdlib[:train|valid|test], pyblimp or pycola."),
    ],
    destination: Annotated[
        Path, typer.Argument(help="Where to write: DESTINATION.bin, .idx and .json (a task: a folder).")
    ],
    tokenizer: Annotated[Path | None, typer.Option(help="A tokenizer folder or its tokenizer.json.")] = None,
    field: option.TextField = "text",
    glob: option.Glob = "**/*",
    valid: Annotated[
        float,
        typer.Option(min=0, max=0.99, help="Share of documents to hold out: writes DESTINATION-train and -valid."),
    ] = 0.0,
    force: Annotated[bool, typer.Option("--force", help="Replace what is at the destination.")] = False,
) -> None:
    """Turn text into token files that Megatron reads as well; `pyblimp` and `pycola` write .jsonl files instead.

    A text file is one document, unless lines that read <|endoftext|> divide it; each document ends with the tokenizer's
    end-of-text token.
    """
    import time

    from pretrain.data.sources import text_source
    from pretrain.data.tokenizing import build_data
    from workbench.errors import ConfigError
    from workbench.tokenizer import Tokenizer

    if source in EMBEDDED_TASKS and not Path(source).exists():
        out.result({"files": _build_task(source, destination, force)})
        return
    if tokenizer is None:
        raise ConfigError("no tokenizer given; add --tokenizer FOLDER (`wb tokenizer train` makes one)")
    started = time.monotonic()
    with out.progress("tokenizing", unit="B") as bar:
        manifests = build_data(
            text_source(source, field=field, pattern=glob),
            destination,
            tokenizer=Tokenizer.load(tokenizer),
            valid_share=valid,
            overwrite=force,
            progress=lambda done, total: bar.update(done, total=total),
        )
    seconds = time.monotonic() - started
    built = [
        {"path": prefix, "documents": one.documents, "tokens": one.tokens, "text_bytes": one.text_bytes}
        for prefix, one in manifests.items()
    ]
    rate = sum(one.text_bytes for one in manifests.values()) / seconds
    lines = [
        f"{prefix}: {count_text(one.documents)} documents, {count_text(one.tokens)} tokens, "
        f"{size_text(one.text_bytes)} of text"
        for prefix, one in manifests.items()
    ]
    lines.append(f"{time_text(seconds)}, {size_text(rate)}/s; next: put the path into [data] train of a config")
    out.result({"built": built, "seconds": seconds, "bytes_per_second": rate}, "\n".join(lines))


def info(
    out: Output,
    path: Annotated[Path, typer.Argument(help="A token file, with or without .bin or .idx.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read every token and check that the tables fit.")] = False,
) -> None:
    """Show what a token file holds: documents, tokens, lengths, and what it was made of."""
    from pretrain.data.indexed import IndexedTokens
    from pretrain.data.manifest import read_manifest

    tokens = IndexedTokens(path)
    manifest = read_manifest(tokens.prefix)
    lengths = tokens.sizes
    result: dict[str, Any] = {
        "path": str(tokens.prefix),
        "documents": tokens.num_documents,
        "tokens": tokens.num_tokens,
        "dtype": tokens.dtype.name,
        "bytes": tokens.num_tokens * tokens.dtype.itemsize,
        "longest": int(lengths.max()),
        "shortest": int(lengths.min()),
        "mean_length": tokens.num_tokens / tokens.num_documents,
    }
    if manifest is not None:
        result |= {
            "source": manifest.source,
            "files": len(manifest.files),
            "text_bytes": manifest.text_bytes,
            "bytes_per_token": manifest.text_bytes / manifest.tokens,
            "tokenizer": manifest.tokenizer,
            "tokenizer_sha256": manifest.tokenizer_sha256,
            "vocab_size": manifest.vocab_size,
        }
    if verify:
        result |= {"verified": True, "largest_id": tokens.verify()}
    out.result(result)


def preview(
    out: Output,
    path: Annotated[
        str,
        typer.Argument(
            help="A token file; a configuration of `wb finetune`; a data file, a folder of them or hf:NAME[:SPLIT].",
            metavar="CONFIG|DATA",
        ),
    ],
    tokenizer: Annotated[Path | None, typer.Option(help="In place of the one that belongs to the data.")] = None,
    column: option.Columns = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many to show.")] = 3,
    seq_len: Annotated[
        int, typer.Option(min=0, help="Show training samples of this length, in training order, not documents.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="With --seq-len: data.seed.")] = 1234,
    chars: Annotated[int, typer.Option(min=1, help="Characters to show of each.")] = 400,
) -> None:
    """Show what a run learns from: documents of token files, rows with the learned part coloured (or in brackets).

    With --seq-len: the samples that a training run over token files meets first.
    """
    from finetune.rows import is_rows
    from pretrain.data.config import DataConfig, open_data
    from pretrain.data.indexed import IndexedTokens
    from workbench.errors import ConfigError

    if path.endswith(".toml") or is_rows(path):
        show = preview_config if path.endswith(".toml") else preview_rows
        show(out, path, tokenizer=tokenizer, maps=column or (), seq_len=seq_len, count=count, chars=chars)
        return
    if column:
        raise ConfigError(f"--map {column[0]}: {path} is a token file, which has no columns; leave it out")
    tokens = IndexedTokens(path)
    decoder = _decoder(tokens, tokenizer)
    shown: list[dict[str, Any]] = []
    if seq_len:
        train = open_data(DataConfig.model_validate({"train": str(path), "seed": seed}), seq_len=seq_len).train
        for number in range(count):
            ids = train.sampler.sample(number).input_ids
            shown.append({"sample": number, "tokens": len(ids), "text": decoder.decode(ids, skip_special_tokens=False)})
    else:
        for number in range(min(count, len(tokens))):
            # A few tokens make a character at the least, so this many are enough and a long document costs nothing.
            document = tokens.document(number)
            text = decoder.decode(document[: 4 * chars + 16], skip_special_tokens=False)
            shown.append({"document": number, "tokens": len(document), "text": text})
    for one in shown:
        one["text"] = one["text"][:chars]
    label = "sample" if seq_len else "document"
    text = "\n\n".join(f"--- {label} {one[label]}, {one['tokens']} tokens\n{one['text']}" for one in shown)
    out.result({"path": str(tokens.prefix), label + "s": shown}, text)


def _decoder(tokens: IndexedTokens, tokenizer: Path | None) -> Tokenizer:
    from pretrain.data.manifest import read_manifest
    from workbench.errors import DataError
    from workbench.tokenizer import Tokenizer

    if tokenizer is not None:
        return Tokenizer.load(tokenizer)
    manifest = read_manifest(tokens.prefix)
    if manifest is None:
        raise DataError(f"{tokens.prefix}: does not say what it was tokenized with; add --tokenizer FOLDER")
    if not Path(manifest.tokenizer).exists():
        raise DataError(f"{tokens.prefix}: its tokenizer {manifest.tokenizer} is not there; add --tokenizer FOLDER")
    return Tokenizer.load(manifest.tokenizer)


def _build_task(name: str, destination: Path, force: bool) -> dict[str, int]:
    """Number of examples by file."""
    from pretrain.data.jsonl import write_jsonl
    from pretrain.data.pyblimp import minimal_pairs
    from pretrain.data.pycola import pycola
    from pretrain.data.statements import statement_pool
    from pretrain.data.stdlib import stdlib_documents

    pool = statement_pool(stdlib_documents())
    train, test = destination / "train.jsonl", destination / "test.jsonl"
    if name == "pyblimp":
        return {str(test): write_jsonl(test, minimal_pairs(pool), overwrite=force)}
    task = pycola(pool)
    return {
        str(train): write_jsonl(train, task.train, overwrite=force),
        str(test): write_jsonl(test, task.test, overwrite=force),
    }


COMMAND = Group(
    "data",
    help="Build token files, describe them, look into them.",
    commands=(
        Command(
            "build",
            build,
            example="wb data build corpus/ data/corpus --tokenizer tokenizers/mine --valid 0.01\n"
            "wb data build chats.jsonl.gz data/chats --tokenizer tokenizers/mine --field content\n"
            "wb data build stdlib:train data/stdlib-train --tokenizer tokenizers/python",
        ),
        Command("info", info, example="wb data info data/corpus-train\nwb data info data/corpus-train --verify --json"),
        Command(
            "preview",
            preview,
            example="wb data preview data/corpus-train -n 2\n"
            "wb data preview data/corpus-train --seq-len 512 --seed 1234\n"
            "wb data preview sft.toml\n"
            "wb data preview answers.csv --map prompt=question --map completion=answer",
        ),
    ),
    panel="Data",
    order=10,
)
