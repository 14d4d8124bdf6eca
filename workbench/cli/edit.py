"""`wb edit`: a checkpoint with other layers, another vocabulary, or experts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from workbench.cli import _options as option
from workbench.cli.common import Command, Output


def edit(
    out: Output,
    source: Annotated[Path, typer.Argument(help="A checkpoint in any format, or a run folder (its latest).")],
    destination: option.NewCheckpoint,
    layers: Annotated[
        str, typer.Option(help="Layers to take, renumbered, moments too: 0-7,16-31. One may be taken twice.")
    ] = "",
    vocab_size: Annotated[int | None, typer.Option(help="Rows of embedding and head.", min=1)] = None,
    new_rows: Annotated[str, typer.Option(help="What new rows are: mean (of the old ones) or zero.")] = "mean",
    upcycle_experts: Annotated[
        int | None, typer.Option(help="Copy each MLP to so many experts; moments are dropped.", min=2)
    ] = None,
    top_k: Annotated[int, typer.Option(help="Experts that a token takes.", min=1)] = 2,
    seed: Annotated[int, typer.Option(help="From which new routers are drawn.")] = 0,
    tp: option.Tp = None,
    pp: option.Pp = None,
    pp_layout: option.StageLayers = "",
    dtype: option.Dtype = "",
    family: option.Family = "",
    optimizer: option.Optimizer = "keep",
    mem: option.Mem = "2GiB",
    workers: option.Workers = 2,
    allow_drop: option.AllowDrop = None,
    verify: option.Verify = "crc",
    resume: option.Resume = False,
    dry_run: option.DryRun = False,
) -> None:
    """Write a checkpoint edited as it streams: layers first, then the vocabulary, then experts."""
    from converters.edits.experts import upcycle
    from converters.edits.layers import parse_layers, select_layers
    from converters.edits.vocabulary import NewRows, resize_vocabulary
    from converters.merge import open_merged
    from converters.open import get_format
    from workbench.cli._conversion import Conversion, choice, convert, job_options, new_layout
    from workbench.errors import ConfigError

    filling: NewRows = choice(new_rows, ("mean", "zero"), "--new-rows")
    drops = allow_drop or ()
    opened = open_merged(source, family=family or None, allow_drop=drops)
    if layers:
        opened = select_layers(opened, parse_layers(layers, opened.model.num_hidden_layers))
    if vocab_size is not None:
        opened = resize_vocabulary(opened, vocab_size, filling)
    if upcycle_experts is not None:
        opened = upcycle(opened, upcycle_experts, top_k, seed=seed)
    if not (layers or vocab_size or upcycle_experts):
        raise ConfigError("nothing to edit; give --layers, --vocab-size or --upcycle-experts")
    layout = new_layout(opened, tp=tp, pp=pp, pp_layout=pp_layout)
    options = job_options(layout, dtype=dtype, optimizer=optimizer, mem=mem, workers=workers, allow_drop=drops)
    convert(
        out,
        Conversion(opened, get_format("native"), destination, options, "edit", verify, dry_run=dry_run, resume=resume),
    )


COMMAND = Command(
    "edit",
    edit,
    panel="Models",
    order=25,
    example="wb edit runs/base out/half --layers 0-7,16-31\n"
    "wb edit runs/base out/more-words --vocab-size 50304 --new-rows mean\n"
    "wb edit runs/base out/moe --upcycle-experts 8 --top-k 2 --tp 2 --verify full",
)
