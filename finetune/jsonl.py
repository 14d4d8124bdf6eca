"""Rows of JSON-lines files, each with the place that an error message names."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.errors import DataError

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Row:
    """One object of a file; `number` counts lines from 1."""

    path: Path
    number: int
    values: dict[str, Any]

    @property
    def place(self) -> str:
        """'train.jsonl:12'."""
        return f"{self.path}:{self.number}"


def read_rows(paths: Sequence[str | Path]) -> list[Row]:
    """Every row of the files in order; DataError when one is missing, not JSON, or when there is no row at all."""
    rows = [row for path in paths for row in _rows_of(Path(path))]
    if not rows:
        raise DataError(f"{', '.join(map(str, paths))}: no rows; give a file with one JSON object a line")
    return rows


def text_of(row: Row, key: str) -> str:
    """The text under `key`; DataError with the row's place when it is missing or no text."""
    value = row.values.get(key)
    if not isinstance(value, str):
        has = (
            f"it has {', '.join(row.values) or 'nothing'}"
            if key not in row.values
            else f"it is {json.dumps(value)[:40]}"
        )
        raise DataError(f"{row.place}: needs text under {key!r}, but {has}")
    return value


def places(rows: Sequence[Row]) -> str:
    """The places of the first few rows, for a message about many."""
    shown = ", ".join(row.place for row in rows[:_SHOWN])
    return shown if len(rows) <= _SHOWN else f"{shown} and {len(rows) - _SHOWN} more"


def _rows_of(path: Path) -> Iterator[Row]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; [task] names JSON-lines files") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    # Not splitlines(): JSON text may hold the other characters that it takes for line ends.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: not JSON ({error}); write one object a line") from None
        if not isinstance(values, dict):
            raise DataError(f"{path}:{number}: {line.strip()[:40]} is not an object; write one object a line")
        yield Row(path, number, values)
