"""Rows of data files as they come: JSON lines, JSON, CSV, Parquet, folders of them and named datasets. No torch.

Nothing has to be registered: a path is enough, and each row knows the place that an error message names.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol

from workbench.config_faults import nearest
from workbench.errors import DataError

HUB: Final = "hf:"
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file or a dataset; `number` counts lines, or rows where there are no lines, from 1."""

    path: str
    number: int
    values: Mapping[str, Any]

    @property
    def place(self) -> str:
        """'train.jsonl:12'."""
        return f"{self.path}:{self.number}"


def read_rows(sources: Sequence[str | Path], *, columns: Mapping[str, str] | None = None) -> list[Row]:
    """Every row of the sources in order, its columns renamed; DataError when one cannot be read or holds no row.

    A source is a file, a folder of files, or 'hf:NAME', 'hf:NAME:SPLIT', 'hf:NAME:CONFIG:SPLIT' for the `datasets`
    library. columns: what a column of the files is called, by the name that it is to have.
    """
    found = []
    for source in map(str, sources):
        rows = [row for part in parts_of(source) for row in _rows_of(part)]
        if not rows:
            raise DataError(f"{source}: no rows; give a file with one JSON object a line, a CSV or a Parquet file")
        found += rows
    return [_renamed(row, columns) for row in found] if columns else found


def is_rows(source: str) -> bool:
    """Whether a path is one that `read_rows` reads, by its name."""
    return source.startswith(HUB) or Path(source).is_dir() or Path(source).suffix in _READERS


def parts_of(source: str) -> list[str]:
    """The files of a source, or the named dataset that it is; DataError when there is nothing to read."""
    path = Path(source)
    if source.startswith(HUB):
        return [source]
    if path.is_dir():
        inside = [file for file in sorted(path.rglob("*")) if not _hidden(file.relative_to(path)) and file.is_file()]
        if files := [str(file) for file in inside if file.suffix in _READERS]:
            return files
        held = ", ".join(file.name for file in inside[:_SHOWN]) or "nothing"
        raise DataError(f"{source}: a folder without data files ({', '.join(_READERS)}); it holds {held}")
    if not path.exists():
        raise DataError(f"{source}: no such file or folder; a dataset of the hub is named 'hf:NAME'")
    if path.suffix not in _READERS:
        raise DataError(f"{source}: '{path.suffix}' is not a kind of file that is read; give {', '.join(_READERS)}")
    return [source]


def text_of(row: Row, key: str) -> str:
    """The text under `key`; DataError with the row's place when it is missing or no text."""
    value = row.values.get(key)
    if not isinstance(value, str):
        has = (
            f"it has {', '.join(row.values) or 'nothing'}"
            if key not in row.values
            else f"it is {json.dumps(value, default=str)[:40]}"
        )
        raise DataError(f"{row.place}: needs text under {key!r}, but {has}")
    return value


class Placed(Protocol):
    """What has a place in a file."""

    @property
    def place(self) -> str: ...


def places(found: Sequence[Placed]) -> str:
    """The places of the first few, for a message about many."""
    shown = ", ".join(one.place for one in found[:_SHOWN])
    return shown if len(found) <= _SHOWN else f"{shown} and {len(found) - _SHOWN} more"


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _renamed(row: Row, columns: Mapping[str, str]) -> Row:
    if missing := [name for name in columns.values() if name not in row.values]:
        raise DataError(f"{row.place}: has no column {missing[0]!r}{nearest(missing[0], row.values)}")
    kept = {name: value for name, value in row.values.items() if name not in columns.values()}
    return replace(row, values=kept | {name: row.values[theirs] for name, theirs in columns.items()})


def _rows_of(source: str) -> Iterator[Row]:
    return _dataset(source) if source.startswith(HUB) else _READERS[Path(source).suffix](source)


def _json_lines(path: str, text: str | None = None) -> Iterator[Row]:
    # Not splitlines(): JSON text may hold the other characters that it takes for line ends.
    for number, line in enumerate((_text(path) if text is None else text).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: not JSON ({error}); write one object a line") from None
        if not isinstance(values, dict):
            raise DataError(f"{path}:{number}: {line.strip()[:40]} is not an object; write one object a line")
        yield Row(path, number, values)


def _json(path: str) -> Iterator[Row]:
    text = _text(path)
    if not text.lstrip().startswith("["):
        yield from _json_lines(path, text)  # many files of JSON lines are called .json
        return
    try:
        elements = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from None
    for number, values in enumerate(elements, start=1):
        if not isinstance(values, dict):
            raise DataError(f"{path}:{number}: element {json.dumps(values)[:40]} is not an object")
        yield Row(path, number, values)


def _csv(path: str) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(_text(path), newline=""), delimiter="\t" if path.endswith(".tsv") else ",")
    header, begins = next(reader, []), reader.line_num + 1
    try:
        for cells in reader:
            if cells and len(cells) != len(header):
                raise DataError(
                    f"{path}:{begins}: has {len(cells)} cells, but the header has {len(header)} ({', '.join(header)}); "
                    "quote cells that hold the delimiter"
                )
            if cells:
                yield Row(path, begins, dict(zip(header, cells, strict=True)))
            begins = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{begins}: not CSV ({error}); JSON lines hold any text") from None


def _parquet(path: str) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError:
        raise DataError(f"{path}: Parquet needs pyarrow; pip install 'workbench[parquet]'") from None
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            for values in batch.to_pylist():
                number += 1
                yield Row(path, number, values)
    except (ArrowException, OSError) as error:
        raise DataError(f"{path}: not a Parquet file that can be read ({error})") from error


def _dataset(source: str) -> Iterator[Row]:
    name, *rest = source.removeprefix(HUB).split(":")
    if not name or len(rest) > 2:
        raise DataError(f"{source}: write hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT")
    try:
        import datasets
    except ModuleNotFoundError:
        raise DataError(f"{source}: needs the library datasets; pip install 'workbench[datasets]'") from None
    config, split = (rest[0], rest[1]) if len(rest) == 2 else (None, rest[0] if rest else "train")
    try:
        found = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # whatever the hub, the network and the reader of this dataset raise
        raise DataError(f"{source}: datasets cannot load it ({error})") from error
    for number, values in enumerate(found, start=1):
        yield Row(source, number, values)


def _text(path: str) -> str:
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


_READERS: Final[Mapping[str, Callable[[str], Iterator[Row]]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}
