"""`wb reshard`: a native checkpoint at another layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from workbench.cli import _options as option
from workbench.cli._start import quick_imports
from workbench.cli.common import Command, Output


def reshard(
    out: Output,
    source: Annotated[Path, typer.Argument(help="A checkpoint folder, or a run folder (its latest checkpoint).")],
    destination: option.NewFolder,
    tp: option.Tp = None,
    pp: option.Pp = None,
    vpp: option.Vpp = None,
    ep: option.Ep = None,
    pp_layout: option.PpLayout = "",
    vocab_multiple: option.VocabMultiple = None,
    dtype: option.Dtype = "",
    optimizer: option.Optimizer = "keep",
    mem: option.Mem = "2GiB",
    workers: option.Workers = 2,
    allow_drop: option.AllowDrop = None,
    verify: option.Verify = "crc",
    lazy: Annotated[
        bool, typer.Option("--lazy", help="Share the source's files (hard links): for changes of PP, VPP, EP and DP.")
    ] = False,
    resume: option.Resume = False,
    dry_run: option.DryRun = False,
) -> None:
    """Write a checkpoint at another tensor, pipeline and expert layout, optimizer state included, without a GPU."""
    with quick_imports():
        import converters.job  # noqa: F401 (wanted later, and quicker here)
        from converters.open import get_format, open_checkpoint
        from workbench.cli._conversion import Conversion, convert, job_options, new_layout

    opened = open_checkpoint(source, allow_drop=allow_drop or ())
    target = get_format("native")
    layout = new_layout(opened, tp=tp, pp=pp, vpp=vpp, ep=ep, pp_layout=pp_layout, vocab_multiple=vocab_multiple)
    options = job_options(
        layout, dtype=dtype, optimizer=optimizer, mem=mem, workers=workers, allow_drop=allow_drop or ()
    )
    options = replace(options, lazy=lazy)
    convert(out, Conversion(opened, target, destination, options, "reshard", verify, dry_run=dry_run, resume=resume))


COMMAND = Command(
    "reshard",
    reshard,
    panel="Core",
    order=20,
    example="wb reshard runs/tiny out/tp4 --tp 4 --pp 1\n"
    "wb reshard runs/tiny/checkpoints/step-00000100 out/uneven --tp 2 --pp 4 --pp-layout 6,8,8,6 --dry-run",
)
