"""`wb diff`: where two checkpoints differ."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workbench.cli import _options as option
from workbench.cli.common import Command, Output

if TYPE_CHECKING:
    from converters.verify import TensorDifference


def diff(
    out: Output,
    first: option.AnyCheckpoint,
    second: Annotated[Path, typer.Argument(help="The other, at any layout and in any format.")],
    recorded: Annotated[
        bool, typer.Option("--recorded", help="Trust recorded fingerprints; read only what differs.")
    ] = False,
    most: Annotated[int, typer.Option("--most", min=0, help="Look into at most so many differing tensors.")] = 20,
) -> int | None:
    """Show which tensors of two checkpoints differ, where first, and by how much."""
    from converters.verify import tensor_difference
    from workbench.cli._compare import compare_checkpoints, comparison_text
    from workbench.errors import VerificationError

    compared = compare_checkpoints(out, first, second, recorded=recorded)
    one, two, comparison = compared.first, compared.second, compared.comparison
    names = [*comparison.different, *comparison.dtype][:most]
    found = [tensor_difference(one.source, two.source, name) for name in names]
    details = [difference for difference in found if difference is not None]
    lines = [comparison_text(first, second, compared), *(_line(difference) for difference in details)]
    result = {**compared.describe(), "details": [asdict(difference) for difference in details]}
    out.result(result, text="\n".join(lines))
    return None if comparison.equal and not compared.model else VerificationError.exit_code


def _line(difference: TensorDifference) -> str:
    a, b = difference.values
    return (
        f"  {difference.name}: {difference.elements} elements; the first at {list(difference.first)}: {a:.9g} and "
        f"{b:.9g}; at most {difference.largest:.3g} apart"
    )


COMMAND = Command(
    "diff",
    diff,
    panel="Models",
    order=50,
    example="wb diff runs/tiny out/tp4\nwb diff runs/tiny my-hf-model --most 5",
)
