"""`wb verify`: a checkpoint against its own checksums, or two checkpoints against each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from workbench.cli import _options as option
from workbench.cli.common import Command, Output, size_text


def verify(
    out: Output,
    path: option.AnyCheckpoint,
    other: Annotated[Path | None, typer.Argument(help="Another, at any layout and in any format, to compare.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Compute the fingerprints again as well.")] = False,
) -> int | None:
    """Check that a checkpoint is intact, or that two hold the same model, bit for bit. Reads every byte."""
    if other is not None:
        return _pair(out, path, other)
    _alone(out, path, full=full)
    return None


def _alone(out: Output, path: Path, *, full: bool) -> None:
    from converters.open import open_checkpoint
    from converters.plan import tensor_bytes
    from converters.verify import compare_fingerprints, compute_fingerprints
    from workbench.errors import VerificationError

    opened = open_checkpoint(path)
    total = sum(map(tensor_bytes, opened.source.schema.values()))
    with out.progress("checking", total=total * (2 if full else 1), unit="B") as bar:
        if opened.check is not None:
            opened.check(bar.advance)
        if full:
            known = {name: text for name, text in opened.fingerprints.items() if text}
            found = compute_fingerprints(opened.source, names=known.keys(), progress=bar.advance)
            if faults := compare_fingerprints(known, found):
                raise VerificationError(f"{opened.path}: {'; '.join(faults[:4])}")
    checked = ["structure"]
    checked += ["checksums"] if opened.check is not None else []
    checked += ["fingerprints"] if full and opened.fingerprints else []
    result = {"path": str(opened.path), "format": opened.format, "tensors": len(opened.source.schema), "bytes": total}
    text = f"{opened.path}: intact ({len(opened.source.schema)} tensors, {size_text(total)}; {', '.join(checked)})"
    out.result({**result, "checked": checked, "ok": True}, text=text)


def _pair(out: Output, first: Path, second: Path) -> int | None:
    from converters.verify import changes_outputs
    from workbench.cli._compare import compare_checkpoints, comparison_text
    from workbench.errors import VerificationError

    compared = compare_checkpoints(out, first, second, recorded=False)
    equal = compared.comparison.equal and not any(map(changes_outputs, compared.model))
    out.result({**compared.describe(), "equal": equal}, text=comparison_text(first, second, compared))
    return None if equal else VerificationError.exit_code


COMMAND = Command(
    "verify",
    verify,
    panel="Models",
    order=40,
    example="wb verify runs/tiny\nwb verify runs/tiny out/tp4",
)
