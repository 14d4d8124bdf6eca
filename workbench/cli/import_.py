"""`wb import`: a checkpoint of another format as a native one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workbench.cli import _options as option
from workbench.cli._start import quick_imports
from workbench.cli.common import Command, Output

if TYPE_CHECKING:
    from workbench.checkpoint.source import TensorSource
    from workbench.cli._conversion import Report


def import_(
    out: Output,
    source: Annotated[Path, typer.Argument(help="A Hugging Face folder, or a folder of another known format.")],
    destination: option.NewCheckpoint,
    family: option.Family = "",
    vocab_size: option.VocabSize = None,
    tp: option.Tp = None,
    pp: option.Pp = None,
    vpp: option.Vpp = None,
    ep: option.Ep = None,
    pp_layout: option.PpLayout = "",
    vocab_multiple: option.VocabMultiple = None,
    dtype: option.WeightDtype = "",
    mem: option.CopyMem = "2GiB",
    workers: option.Workers = 2,
    allow_drop: option.AllowDrop = None,
    verify: Annotated[
        str, typer.Option(help=f"{option.VERIFY_HELP} By default logits of Hugging Face folders, else full.")
    ] = "",
    resume: option.Resume = False,
    dry_run: option.DryRun = False,
) -> None:
    """Turn a checkpoint of another format into a native one at any layout, proven before it appears."""
    with quick_imports():
        import converters.formats.huggingface
        import converters.job  # noqa: F401 (both wanted later, and quicker here)
        from converters.open import get_format, open_checkpoint
        from workbench.cli._conversion import Conversion, convert, job_options, new_layout
        from workbench.errors import ConfigError

    opened = open_checkpoint(source, family=family or None, vocab_size=vocab_size, allow_drop=allow_drop or ())
    if opened.format == "native":
        raise ConfigError(f"{source} is a native checkpoint already; use wb reshard to change its layout or dtype")
    verify = verify or ("logits" if opened.format == "huggingface" else "full")
    if verify == "logits" and opened.format != "huggingface":
        raise ConfigError(
            f"--verify logits needs a Hugging Face folder, {source} is {opened.format}; use --verify full"
        )

    def proof(_: Path, written: TensorSource) -> Sequence[Report]:
        from converters.logits import compare_logits

        # After a cast the weights differ by design: then it is the reading that is proven, and the rest bit for bit.
        return [compare_logits(opened.model, opened.source if dtype else written, opened.path)]

    layout = new_layout(opened, tp=tp, pp=pp, vpp=vpp, ep=ep, pp_layout=pp_layout, vocab_multiple=vocab_multiple)
    options = job_options(layout, dtype=dtype, optimizer="keep", mem=mem, workers=workers, allow_drop=allow_drop or ())
    convert(
        out, Conversion(opened, get_format("native"), destination, options, "import", verify, proof, dry_run, resume)
    )


COMMAND = Command(
    "import",
    import_,
    panel="Models",
    order=10,
    example="wb import models/SmolLM2-135M out/smol --tp 2 --pp 2\nwb import models/gpt2 out/gpt2 --verify full\n"
    "wb import megatron/run out/native --vocab-size 50257",
)
