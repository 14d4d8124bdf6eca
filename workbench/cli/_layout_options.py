"""Options for the layout of a checkpoint to be written, as every command that has them spells them."""

from __future__ import annotations

from typing import Annotated

import typer

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
VocabMultiple = Annotated[int | None, typer.Option(help="Pad each rank's vocabulary to this multiple.")]
VocabSize = Annotated[
    int | None,
    typer.Option(help="Words of the vocabulary, when the source keeps it padded and does not say.", min=1),
]
