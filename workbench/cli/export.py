"""`wb export`: a checkpoint in the format of another program."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workbench.cli.common import Command, Output

if TYPE_CHECKING:
    from converters.logits import LogitsReport
    from workbench.checkpoint.source import TensorSource

_FORMATS = {"hf": "huggingface", "huggingface": "huggingface", "peft": "peft"}


def export(
    out: Output,
    source: Annotated[Path, typer.Argument(help="A checkpoint at any layout, or a run folder (its latest).")],
    destination: Annotated[Path, typer.Argument(help="The folder to make; it must not exist.")],
    to: Annotated[str, typer.Option(help="hf (a folder for transformers) or peft (an adapter).")] = "hf",
    family: Annotated[str, typer.Option(help="The model family; found by the model's features by default.")] = "",
    dtype: Annotated[str, typer.Option(help="Cast weights to F32, BF16 or F16.")] = "",
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file: 5GB, 500MB.")] = "5GB",
    mem: Annotated[str, typer.Option(help="Memory for copying at most: 512MiB, 2GiB.")] = "512MiB",
    workers: Annotated[int, typer.Option(help="Threads that copy.", min=1, max=64)] = 2,
    verify: Annotated[
        str,
        typer.Option(
            help="none, crc (read back), full (fingerprints), logits (crc, and the result run by transformers)."
        ),
    ] = "logits",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the proven plan and write nothing.")] = False,
) -> None:
    """Write a checkpoint as a Hugging Face folder, run it with plain transformers, and keep it only if logits agree."""
    from converters.cast import CastSource
    from converters.open import get_format, open_checkpoint
    from workbench.cli._conversion import choice, job_options
    from workbench.cli._proof import convert_with_proof
    from workbench.spec.layout import ParallelLayout

    target = get_format(_FORMATS[choice(to, tuple(_FORMATS), "--to")])
    opened = open_checkpoint(source, family=family or None)
    options = job_options(
        ParallelLayout(), dtype=dtype, optimizer="drop", mem=mem, workers=workers, max_shard_size=max_shard_size
    )

    def proof(folder: Path, _: TensorSource) -> LogitsReport:
        from converters.logits import compare_logits

        expected = CastSource(opened.source, options.dtype) if options.dtype else opened.source
        return compare_logits(opened.model, expected, folder)

    convert_with_proof(
        out, opened, target, destination, options, words=("export", verify), proof=proof, dry_run=dry_run
    )


COMMAND = Command(
    "export",
    export,
    panel="Core",
    order=40,
    example="wb export runs/tiny out/tiny-hf\nwb export runs/tiny out/tiny-bf16 --dtype bf16 --max-shard-size 2GB",
)
