"""Arguments and options of several commands, as every command that has them spells them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

AnyCheckpoint = Annotated[Path, typer.Argument(help="A checkpoint in any format, or a run folder.")]
Nproc = Annotated[int | None, typer.Option(min=1, help="Ranks to start here; by default what [parallel] asks for.")]
Columns = Annotated[
    list[str] | None, typer.Option("--map", metavar="NAME=COLUMN", help="Name a column of rows: prompt=question.")
]
TextField = Annotated[str, typer.Option(help="The key that holds the text in .jsonl files.")]
Glob = Annotated[str, typer.Option(help="Which files of a folder to read.")]

VERIFY_HELP = (
    "none, crc (checksums of both sides), full (crc, and each tensor of both sides assembled by other code), "
    "logits (crc, and forward passes compared)."
)

NewFolder = Annotated[Path, typer.Argument(help="The folder to make; it must not exist.")]
NewCheckpoint = Annotated[Path, typer.Argument(help="The checkpoint folder to make; it must not exist.")]

Tp = Annotated[int | None, typer.Option(help="Tensor-parallel ranks; the source's by default.")]
Pp = Annotated[int | None, typer.Option(help="Pipeline stages; the source's by default.")]
Vpp = Annotated[int | None, typer.Option(help="Chunks of layers in each stage; the source's by default.")]
Ep = Annotated[int | None, typer.Option(help="Replicas that share the experts; the source's by default.")]
Etp = Annotated[
    int | None, typer.Option(help="Tensor ranks that share each expert: 1 or all of them; the source's by default.")
]
PpLayout = Annotated[
    str, typer.Option(help="Layers per stage, or per chunk in the order of the network, when not even: 6,8,8,6.")
]
StageLayers = Annotated[str, typer.Option(help="Layers per stage, when not even: 6,8,8,6.")]
VocabMultiple = Annotated[int | None, typer.Option(help="Pad each rank's vocabulary to this multiple.")]
VocabSize = Annotated[
    int | None,
    typer.Option(help="Words of the vocabulary, when the source keeps it padded and does not say.", min=1),
]

Family = Annotated[str, typer.Option(help="The model family, when the source does not say it rightly.")]
WeightDtype = Annotated[str, typer.Option(help="Cast weights to F32, BF16 or F16.")]
Dtype = Annotated[str, typer.Option(help="Cast weights to F32, BF16 or F16; moments stay F32.")]
Optimizer = Annotated[str, typer.Option(help="keep, drop or require optimizer state.")]
Mem = Annotated[str, typer.Option(help="Memory to use at most: 512MiB, 2GiB.")]
CopyMem = Annotated[str, typer.Option(help="Memory for copying at most: 512MiB, 2GiB.")]
Workers = Annotated[int, typer.Option(help="Threads that copy.", min=1, max=64)]
AllowDrop = Annotated[
    list[str] | None,
    typer.Option(
        metavar="REGEX",
        help="Leave out tensors that have no place and match this regular expression, whole; may be repeated.",
    ),
]
Verify = Annotated[str, typer.Option(help=VERIFY_HELP)]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from what an interrupted run has left.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the proven plan and write nothing.")]
