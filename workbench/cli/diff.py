"""`wb diff`: where two checkpoints differ."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workbench.cli.common import Command, Output

if TYPE_CHECKING:
    from converters.verify import TensorDifference


def diff(
    out: Output,
    first: Annotated[Path, typer.Argument(help="A checkpoint in any format, or a run folder.")],
    second: Annotated[Path, typer.Argument(help="The other, at any layout and in any format.")],
    recorded: Annotated[
        bool, typer.Option("--recorded", help="Trust recorded fingerprints; read only what differs.")
    ] = False,
    most: Annotated[int, typer.Option("--most", min=0, help="Look into at most so many differing tensors.")] = 20,
) -> int | None:
    """Show which tensors of two checkpoints differ, where first, and by how much."""
    from converters.verify import describe, tensor_difference
    from workbench.cli._compare import compare_checkpoints, comparison_text
    from workbench.errors import VerificationError

    one, two, comparison, notes = compare_checkpoints(out, first, second, recorded=recorded)
    names = [*comparison.different, *comparison.dtype][:most]
    found = [tensor_difference(one.source, two.source, name) for name in names]
    details = [difference for difference in found if difference is not None]
    model = _model_differences(one.model.model_dump(mode="json"), two.model.model_dump(mode="json"))
    text = comparison_text(first, second, comparison, notes)
    lines = [text, *(_line(difference) for difference in details)]
    lines += [f"model.{name}: {a!r} and {b!r}" for name, (a, b) in model.items()]
    result = {"first": str(one.path), "second": str(two.path), **describe(comparison), "notes": notes, "model": model}
    out.result({**result, "details": [asdict(difference) for difference in details]}, text="\n".join(lines))
    return None if comparison.equal and not model else VerificationError.exit_code


def _model_differences(first: dict[str, object], second: dict[str, object]) -> dict[str, tuple[object, object]]:
    names = dict.fromkeys((*first, *second))
    return {n: (first.get(n), second.get(n)) for n in names if first.get(n) != second.get(n)}


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
