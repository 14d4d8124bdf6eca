"""`wb import`: a checkpoint of another format as a native one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workbench.cli._conversion import DROP_HELP, RESUME_HELP, VERIFY_HELP
from workbench.cli._layout_options import Ep, Pp, PpLayout, Tp, VocabMultiple, VocabSize, Vpp
from workbench.cli._start import quick_imports
from workbench.cli.common import Command, Output

if TYPE_CHECKING:
    from workbench.checkpoint.source import TensorSource
    from workbench.cli._conversion import Report


def import_(
    out: Output,
    source: Annotated[Path, typer.Argument(help="A Hugging Face folder, or a folder of another known format.")],
    destination: Annotated[Path, typer.Argument(help="The checkpoint folder to make; it must not exist.")],
    family: Annotated[str, typer.Option(help="The model family, when the source does not say it rightly.")] = "",
    vocab_size: VocabSize = None,
    tp: Tp = None,
    pp: Pp = None,
    vpp: Vpp = None,
    ep: Ep = None,
    pp_layout: PpLayout = "",
    vocab_multiple: VocabMultiple = None,
    dtype: Annotated[str, typer.Option(help="Cast weights to F32, BF16 or F16.")] = "",
    mem: Annotated[str, typer.Option(help="Memory for copying at most: 512MiB, 2GiB.")] = "2GiB",
    workers: Annotated[int, typer.Option(help="Threads that copy.", min=1, max=64)] = 2,
    allow_drop: Annotated[list[str] | None, typer.Option(metavar="REGEX", help=DROP_HELP)] = None,
    verify: Annotated[
        str, typer.Option(help=f"{VERIFY_HELP} By default logits of Hugging Face folders, else full.")
    ] = "",
    resume: Annotated[bool, typer.Option("--resume", help=RESUME_HELP)] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the proven plan and write nothing.")] = False,
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
