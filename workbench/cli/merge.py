"""`wb merge`: an adapter added into the weights of its base, or several checkpoints made into their mean."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from workbench.cli import _options as option
from workbench.cli.common import Command, Output


def merge(
    out: Output,
    source: Annotated[
        Path, typer.Argument(help="An adapter (LoRA or a PEFT folder), or with --average any checkpoint.")
    ],
    destination: option.NewFolder,
    average: Annotated[
        list[Path] | None, typer.Option(help="Another checkpoint of the same model, to take the mean with; repeatable.")
    ] = None,
    weights: Annotated[str, typer.Option(help="Weights of that mean, SOURCE's first: 0.5,0.25,0.25.")] = "",
    base: Annotated[Path | None, typer.Option(help="Where the base is, if not where the adapter remembers.")] = None,
    tp: Annotated[int | None, typer.Option(help="Tensor-parallel ranks; the base's by default.")] = None,
    pp: Annotated[int | None, typer.Option(help="Pipeline stages; the base's by default.")] = None,
    ep: Annotated[int | None, typer.Option(help="Replicas that share the experts; the base's by default.")] = None,
    pp_layout: option.StageLayers = "",
    dtype: Annotated[str, typer.Option(help="Cast weights to F32, BF16 or F16; the base's by default.")] = "",
    family: Annotated[str, typer.Option(help="The base's model family, when it is not found by itself.")] = "",
    mem: option.Mem = "2GiB",
    workers: option.Workers = 2,
    allow_drop: option.AllowDrop = None,
    verify: option.Verify = "crc",
    resume: option.Resume = False,
    dry_run: option.DryRun = False,
) -> None:
    """Write base + adapter, or the mean of checkpoints, as a native one: rounded once, streamed, without a GPU."""
    from converters.edits.average import average as mean
    from converters.merge import open_merged
    from converters.open import get_format
    from workbench.cli._conversion import Conversion, convert, job_options, new_layout
    from workbench.errors import ConversionError

    drops = allow_drop or ()
    opened = open_merged(source, base=base, family=family or None, allow_drop=drops)
    if average:
        others = [open_merged(path, family=family or None, allow_drop=drops) for path in average]
        opened = mean(opened, others, parse_weights(weights))
    elif not opened.edits:
        raise ConversionError(
            f"{source}: is a whole model, so there is nothing to merge; name others with --average, or copy it with "
            "wb reshard"
        )
    layout = new_layout(opened, tp=tp, pp=pp, ep=ep, pp_layout=pp_layout)
    options = job_options(layout, dtype=dtype, optimizer="drop", mem=mem, workers=workers, allow_drop=drops)
    convert(
        out,
        Conversion(opened, get_format("native"), destination, options, "merge", verify, dry_run=dry_run, resume=resume),
    )


def parse_weights(text: str) -> tuple[float, ...]:
    """Numbers from '0.5,0.25,0.25'; none from an empty text."""
    from workbench.errors import ConfigError

    try:
        return tuple(float(word) for word in text.split(",")) if text else ()
    except ValueError:
        raise ConfigError(f"--weights {text!r} is not a list of numbers; write it as 0.5,0.25,0.25") from None


COMMAND = Command(
    "merge",
    merge,
    panel="Models",
    order=20,
    example="wb merge runs/lora out/merged\n"
    "wb merge downloads/adapter out/merged --base downloads/model --dtype bf16\n"
    "wb merge runs/a out/soup --average runs/b --average runs/c --weights 0.5,0.25,0.25",
)
