"""`wb runs`: the run folders and how they stand."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from workbench.cli.common import Command, Output, count_text

DEFAULT_ROOT = Path("runs")
COLUMNS = ("name", "status", "step", "tokens", "loss", "valid/loss", "best_step", "tokens_per_second")


def runs(
    out: Output,
    root: Annotated[Path, typer.Argument(help="The folder that holds run folders, or one of them.")] = DEFAULT_ROOT,
) -> None:
    """List the runs of a folder with their status, step, loss and speed; the latest last."""
    from workbench.errors import ConfigError
    from workbench.run_folder import find_runs

    if not root.is_dir() and root != DEFAULT_ROOT:
        raise ConfigError(f"{root} is not a folder; name the one that holds your runs")
    summaries = [run.summary() for run in find_runs(root)]
    out.result({"root": str(root), "runs": summaries}, text=_table(summaries) or f"no runs in {root}")


def _table(summaries: list[dict[str, Any]]) -> str:
    columns = [name for name in COLUMNS if any(name in summary for summary in summaries)]
    if not columns:
        return ""
    rows = [columns, *([_cell(name, summary.get(name)) for name in columns] for summary in summaries)]
    widths = [max(len(row[index]) for row in rows) for index in range(len(columns))]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    notes = [f"{summary['name']}: {summary['note']}" for summary in summaries if summary["note"]]
    return "\n".join([*lines, *notes])


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float) and name != "tokens_per_second":
        return f"{value:.4f}"
    return count_text(value) if isinstance(value, int | float) and name != "step" else str(value)


COMMAND = Command("runs", runs, panel="Runs", order=40, example="wb runs\nwb runs runs/tiny --json")
