"""`wb merge`: an adapter added into the weights of its base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from workbench.cli.common import Command, Output


def merge(
    out: Output,
    source: Annotated[Path, typer.Argument(help="An adapter: a checkpoint or run folder of LoRA, or a PEFT folder.")],
    destination: Annotated[Path, typer.Argument(help="The folder to make; it must not exist.")],
    base: Annotated[Path | None, typer.Option(help="Where the base is, if not where the adapter remembers.")] = None,
    tp: Annotated[int | None, typer.Option(help="Tensor-parallel ranks; the base's by default.")] = None,
    pp: Annotated[int | None, typer.Option(help="Pipeline stages; the base's by default.")] = None,
    pp_layout: Annotated[str, typer.Option(help="Layers per stage, when not even: 6,8,8,6.")] = "",
    dtype: Annotated[str, typer.Option(help="Cast weights to F32, BF16 or F16; the base's by default.")] = "",
    family: Annotated[str, typer.Option(help="The base's model family, when it is not found by itself.")] = "",
    mem: Annotated[str, typer.Option(help="Memory to use at most: 512MiB, 2GiB.")] = "2GiB",
    workers: Annotated[int, typer.Option(help="Threads that copy.", min=1, max=64)] = 2,
    verify: Annotated[str, typer.Option(help="none, crc (read back) or full (fingerprints too).")] = "crc",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from what an interrupted run has left.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the proven plan and write nothing.")] = False,
) -> None:
    """Write base + adapter as one native checkpoint: added in fp32, rounded once, streamed, without a GPU."""
    from converters.merge import open_merged
    from converters.open import get_format
    from workbench.cli._conversion import convert, job_options, new_layout
    from workbench.errors import ConversionError

    opened = open_merged(source, base=base, family=family or None)
    if "adapter" not in opened.info:
        raise ConversionError(f"{source}: is a whole model, so there is nothing to merge; copy it with wb reshard")
    layout = new_layout(opened, tp=tp, pp=pp, pp_layout=pp_layout)
    options = job_options(layout, dtype=dtype, optimizer="drop", mem=mem, workers=workers)
    target = get_format("native")
    convert(out, opened, target, destination, options, operation="merge", verify=verify, dry_run=dry_run, resume=resume)


COMMAND = Command(
    "merge",
    merge,
    panel="Models",
    order=20,
    example="wb merge runs/lora out/merged\nwb merge downloads/adapter out/merged --base downloads/model --dtype bf16",
)
