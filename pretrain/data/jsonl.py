"""Writing records as JSON lines."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.data.writing import writing
from workbench.errors import DataError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def write_jsonl(path: str | Path, records: "Iterable[DataclassInstance]", *, overwrite: bool = False) -> int:
    """The number of records written, one JSON object a line; the file is complete or absent."""
    path = Path(path)
    if path.exists() and not overwrite:
        raise DataError(f"{path}: exists already; choose another destination or overwrite it with --force")
    partial = Path(f"{path}.partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        count = _write_lines(partial, records)
        partial.replace(path)
    return count


def _write_lines(path: Path, records: "Iterable[DataclassInstance]") -> int:
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(dataclasses.asdict(record), ensure_ascii=False) + "\n")
            count += 1
    return count
