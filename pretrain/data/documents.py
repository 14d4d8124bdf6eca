"""Text documents of files and folders, streamed piece by piece, with a place for every fault."""

import codecs
import gzip
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol, cast

from workbench.errors import DataError

END_OF_TEXT = "<|endoftext|>"
_PIECE_CHARS = 1 << 15  # about what one piece of a long document holds: a tokenizer takes 100 bytes a character
_LINE_BYTES = 1 << 20
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can write what UTF-8 cannot
# Pre-tokenizers of the GPT-2 kind always begin a word at a single blank, so a cut before one changes no token.
_SAFE_CUT = re.compile(r"(?<=\S) (?=\S)")
_JSON_LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
_NOT_TEXT = (
    ".parquet",
    ".arrow",
    ".bin",
    ".idx",
    ".npy",
    ".npz",
    ".zst",
    ".zip",
    ".tar",
    ".xz",
    ".bz2",
    ".pkl",
    ".pt",
    ".safetensors",
)


@dataclass(frozen=True)
class Piece:
    """A stretch of one document; `ends` on its last. `document` names it: a file, or file:line."""

    text: str
    document: str
    ends: bool


class TextSource(Protocol):
    """Documents of one origin, in an order that does not change."""

    @property
    def label(self) -> str: ...

    def parts(self) -> "list[TextPart]": ...


class TextPart(Protocol):
    """One file of a source (or what stands for a file): what the manifest lists."""

    @property
    def name(self) -> str: ...

    def pieces(self) -> Iterator[Piece]: ...

    def num_bytes(self) -> int: ...

    def sha256(self) -> str: ...


@dataclass(frozen=True)
class TextFile:
    """A text file, or one JSON object a line in a .jsonl file (.gz too).

    A text file is one document, unless lines that read `<|endoftext|>` divide it.
    """

    path: Path
    name: str
    field: str = "text"

    def num_bytes(self) -> int:
        """The size on disk."""
        return self.path.stat().st_size

    def sha256(self) -> str:
        """The digest of the file as it lies on disk."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def pieces(self) -> Iterator[Piece]:
        """The file's documents, in order. DataError names the line at fault."""
        name = self.path.name.lower()
        try:
            with _open(self.path) as file:
                yield from self._json_lines(file) if name.endswith(_JSON_LINES) else self._text(file)
        except (OSError, EOFError) as error:
            raise DataError(f"{self.path}: cannot be read: {error}") from error

    def _json_lines(self, file: BinaryIO) -> Iterator[Piece]:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{self.path}:{number}"
            try:
                record = json.loads(line)
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{place}: not UTF-8: byte {line[error.start]:#04x} at column {error.start + 1}"
                ) from error
            except ValueError as error:
                raise DataError(f"{place}: not JSON: {error}; a .jsonl file holds one object a line") from error
            if not isinstance(record, dict) or self.field not in record:
                found = (
                    f"the keys {', '.join(map(repr, record))}"
                    if isinstance(record, dict)
                    else f"a {type(record).__name__}"
                )
                raise DataError(f"{place}: no field {self.field!r}, but {found}; name the right one with --field")
            text = record[self.field]
            if not isinstance(text, str):
                raise DataError(f"{place}: field {self.field!r} is {type(text).__name__}, not text")
            if _LONE_SURROGATE.search(text):
                raise DataError(f"{place}: field {self.field!r} holds half of a surrogate pair (\\ud800-\\udfff)")
            yield from pieces_of(text, f"{self.name}:{number}")

    def _text(self, file: BinaryIO) -> Iterator[Piece]:
        held: list[str] = []
        held_chars, document = 0, self.name
        for number, line in _decoded_lines(file, self.path):
            if line.rstrip("\r\n") == END_OF_TEXT:
                yield Piece("".join(held), document, ends=True)
                held, held_chars, document = [], 0, f"{self.name}:{number + 1}"
                continue
            held.append(line)
            held_chars += len(line)
            if held_chars > 2 * _PIECE_CHARS:
                *begun, rest = cut("".join(held))
                yield from (Piece(one, document, ends=False) for one in begun)
                held, held_chars = [rest], len(rest)
        yield Piece("".join(held), document, ends=True)


@dataclass(frozen=True)
class FileSource:
    """A text or JSON-lines file, or a folder of them (hidden files left out), in the order of their names."""

    path: Path
    field: str = "text"
    pattern: str = "**/*"

    @property
    def label(self) -> str:
        """The path as the user gave it."""
        return str(self.path)

    def parts(self) -> list[TextPart]:
        """The files. DataError for a path that is missing, empty or holds what is no text."""
        if self.path.is_dir():
            found = sorted(path for path in self.path.glob(self.pattern) if path.is_file() and not self._hidden(path))
            if not found:
                raise DataError(f"{self.path}: no file matches {self.pattern!r}; choose others with --glob")
        elif self.path.is_file():
            found = [self.path]
        else:
            raise DataError(f"{self.path}: no such file or folder (the word 'stdlib' names the embedded corpus)")
        for path in found:
            if path.suffix.lower() in _NOT_TEXT:
                raise DataError(
                    f"{path}: {path.suffix} files are not read; give text or .jsonl, "
                    "or leave it out with --glob '**/*.txt'"
                )
        root = self.path if self.path.is_dir() else self.path.parent
        return [TextFile(path, path.relative_to(root).as_posix(), self.field) for path in found]

    def _hidden(self, path: Path) -> bool:
        return any(part.startswith(".") for part in path.relative_to(self.path).parts)


def pieces_of(text: str, document: str) -> Iterator[Piece]:
    """The pieces of a whole document."""
    *begun, rest = cut(text)
    yield from (Piece(one, document, ends=False) for one in begun)
    yield Piece(rest, document, ends=True)


def cut(text: str, *, chars: int = _PIECE_CHARS) -> list[str]:
    """The text in pieces of about `chars`, cut where a word begins; at the latest after 4 * chars."""
    pieces, start = [], 0
    while len(text) - start > 2 * chars:
        found = _SAFE_CUT.search(text, start + chars, start + 4 * chars)
        stop = found.start() if found else min(start + 4 * chars, len(text))
        pieces.append(text[start:stop])
        start = stop
    return [*pieces, text[start:]]


def documents(part: TextPart) -> Iterator[tuple[str, str]]:
    """(name, text) of each whole document of a part; for sources of short documents."""
    held: list[str] = []
    for piece in part.pieces():
        held.append(piece.text)
        if piece.ends:
            yield piece.document, "".join(held)
            held = []


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def _decoded_lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, str]]:
    """(line number, text) with line ends kept; a line of more than 1 MiB comes in several."""
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    number = 1
    while raw := file.readline(_LINE_BYTES):
        try:
            yield number, decoder.decode(raw)
        except UnicodeDecodeError as error:
            column = error.start + 1
            raise DataError(
                f"{path}:{number}: not UTF-8: byte {error.object[error.start]:#04x} at column {column}; "
                "convert the file, or leave it out with --glob"
            ) from error
        number += raw.endswith(b"\n")
    if decoder.getstate()[0]:
        raise DataError(f"{path}:{number}: not UTF-8: the last character is incomplete; the file is truncated")
