"""`wb export`: a checkpoint in the format of another program."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workbench.cli.common import Command, Output

if TYPE_CHECKING:
    from converters.format import OpenedCheckpoint
    from converters.logits import LogitsReport
    from workbench.checkpoint.source import TensorSource

_FORMATS = {"hf": "huggingface", "huggingface": "huggingface", "peft": "peft", "dcp": "dcp", "torchtitan": "torchtitan"}
_WEIGHTS_ONLY = ("huggingface", "peft")


def export(
    out: Output,
    source: Annotated[Path, typer.Argument(help="A checkpoint at any layout, or a run folder (its latest).")],
    destination: Annotated[Path, typer.Argument(help="The folder to make; it must not exist.")],
    to: Annotated[
        str, typer.Option(help="hf (a folder for transformers), peft (an adapter), dcp or torchtitan.")
    ] = "hf",
    base: Annotated[
        Path | None, typer.Option(help="Where the base of an adapter is, if not where it was in training.")
    ] = None,
    family: Annotated[str, typer.Option(help="The model family; found by the model's features by default.")] = "",
    dtype: Annotated[str, typer.Option(help="Cast weights to F32, BF16 or F16.")] = "",
    optimizer: Annotated[
        str, typer.Option(help="keep, drop or require its state; dropped for hf and peft, else kept.")
    ] = "",
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file: 5GB, 500MB.")] = "5GB",
    mem: Annotated[str, typer.Option(help="Memory for copying at most: 512MiB, 2GiB.")] = "2GiB",
    workers: Annotated[int, typer.Option(help="Threads that copy.", min=1, max=64)] = 2,
    verify: Annotated[
        str,
        typer.Option(
            help="none, crc (read back), full (fingerprints), logits (crc, and the result run by transformers). "
            "By default logits for hf and peft, else full."
        ),
    ] = "",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from what an interrupted run has left.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the proven plan and write nothing.")] = False,
) -> None:
    """Write a checkpoint in another program's format; a Hugging Face folder is kept only if its logits agree."""
    from converters.open import get_format, open_checkpoint
    from workbench.cli._conversion import choice, job_options
    from workbench.cli._proof import convert_with_proof
    from workbench.errors import ConfigError, ConversionError
    from workbench.spec.layout import ParallelLayout

    target = get_format(_FORMATS[choice(to, tuple(_FORMATS), "--to")])
    opened = open_checkpoint(source, family=family or None)
    if target.name == "peft" and opened.adapter is None:
        raise ConversionError(f"{opened.path}: holds a whole model and no adapter; export it with --to hf")
    if target.name != "peft":
        opened = _merged(opened, base)
    for_inference = target.name in _WEIGHTS_ONLY
    verify = verify or ("logits" if for_inference else "full")
    if verify == "logits" and not for_inference:
        raise ConfigError(f"--verify logits needs a folder that transformers loads, not --to {to}; use --verify full")
    optimizer = optimizer or ("drop" if for_inference else "keep")
    options = job_options(
        ParallelLayout(), dtype=dtype, optimizer=optimizer, mem=mem, workers=workers, max_shard_size=max_shard_size
    )

    def proof(folder: Path, _: TensorSource) -> LogitsReport:
        return _prove(opened, options.dtype, base, folder)

    convert_with_proof(
        out, opened, target, destination, options, words=("export", verify), proof=proof, dry_run=dry_run, resume=resume
    )


def _merged(opened: OpenedCheckpoint, base: Path | None) -> OpenedCheckpoint:
    """`opened`, or the model that the adapter in it makes of its base."""
    if opened.adapter is None:
        return opened
    from converters.merge import merge, open_base

    return merge(opened, open_base(opened, base))


def _prove(opened: OpenedCheckpoint, dtype: str | None, base: Path | None, folder: Path) -> LogitsReport:
    """The comparison of what is exported, cast as it is written, with `folder`."""
    from converters.cast import CastSource
    from converters.logits import compare_logits

    source = CastSource(opened.source, dtype) if dtype else opened.source
    if opened.adapter is None:
        return compare_logits(opened.model, source, folder)
    from converters.merge import open_base
    from converters.peft_proof import compare_with_peft

    found = open_base(opened, base)
    wide = replace(
        found, source=CastSource(found.source, "F32"), fingerprints={}
    )  # peft adds in fp32, without rounding
    return compare_with_peft(replace(opened, source=source), wide, folder)


COMMAND = Command(
    "export",
    export,
    panel="Core",
    order=40,
    example="wb export runs/tiny out/tiny-hf\nwb export runs/tiny out/tiny-bf16 --dtype bf16 --max-shard-size 2GB\n"
    "wb export runs/my-lora out/adapter --to peft\nwb export runs/tiny out/tiny-dcp --to dcp",
)
