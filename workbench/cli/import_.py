"""`wb import`: a checkpoint of another format as a native one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workbench.cli.common import Command, Output

if TYPE_CHECKING:
    from converters.logits import LogitsReport
    from workbench.checkpoint.source import TensorSource


def import_(
    out: Output,
    source: Annotated[Path, typer.Argument(help="A Hugging Face folder, or a folder of another known format.")],
    destination: Annotated[Path, typer.Argument(help="The checkpoint folder to make; it must not exist.")],
    family: Annotated[str, typer.Option(help="The model family, when the source does not say it rightly.")] = "",
    tp: Annotated[int, typer.Option(help="Tensor-parallel ranks.", min=1)] = 1,
    pp: Annotated[int | None, typer.Option(help="Pipeline stages; 1, or as many as --pp-layout has.", min=1)] = None,
    pp_layout: Annotated[str, typer.Option(help="Layers per stage, when not even: 6,8,8,6.")] = "",
    vocab_multiple: Annotated[int | None, typer.Option(help="Pad each rank's vocabulary to this multiple.")] = None,
    dtype: Annotated[str, typer.Option(help="Cast weights to F32, BF16 or F16.")] = "",
    mem: Annotated[str, typer.Option(help="Memory for copying at most: 512MiB, 2GiB.")] = "2GiB",
    workers: Annotated[int, typer.Option(help="Threads that copy.", min=1, max=64)] = 2,
    verify: Annotated[
        str, typer.Option(help="none, crc (read back), full (fingerprints), logits (crc, and against transformers).")
    ] = "logits",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from what an interrupted run has left.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the proven plan and write nothing.")] = False,
) -> None:
    """Turn a checkpoint of another format into a native one at any layout, proven before it appears."""
    from converters.open import get_format, open_checkpoint
    from workbench.cli._conversion import job_options, new_layout
    from workbench.cli._proof import convert_with_proof
    from workbench.errors import ConfigError

    opened = open_checkpoint(source, family=family or None)
    if opened.format == "native":
        raise ConfigError(f"{source} is a native checkpoint already; use wb reshard to change its layout or dtype")
    if verify == "logits" and opened.format != "huggingface":
        raise ConfigError(
            f"--verify logits needs a Hugging Face folder, {source} is {opened.format}; use --verify full"
        )

    def proof(_: Path, written: TensorSource) -> LogitsReport:
        from converters.logits import compare_logits

        # After a cast the weights differ by design: then it is the reading that is proven, and the rest bit for bit.
        return compare_logits(opened.model, opened.source if dtype else written, opened.path)

    layout = new_layout(opened, tp=tp, pp=pp, pp_layout=pp_layout, vocab_multiple=vocab_multiple)
    options = job_options(layout, dtype=dtype, optimizer="keep", mem=mem, workers=workers)
    convert_with_proof(
        out,
        opened,
        get_format("native"),
        destination,
        options,
        words=("import", verify),
        proof=proof,
        dry_run=dry_run,
        resume=resume,
    )


COMMAND = Command(
    "import",
    import_,
    panel="Models",
    order=10,
    example="wb import models/SmolLM2-135M out/smol --tp 2 --pp 2\nwb import models/gpt2 out/gpt2 --verify full",
)
