"""The embedded corpus: the Python standard library of this machine, about 730 documents and 10 MB.

The source files of the library (without tests, machine-specific files and the tables of character sets), and the pages
of `pydoc_data.topics`. Versions of Python differ, so a build lists the sha256 of each. Files are divided into train,
valid and test by a digest of their name: the same on every machine.
"""

import ast
import hashlib
import os
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pretrain.data.documents import Piece, TextPart, pieces_of
from workbench.errors import DataError

SPLITS = ("train", "valid", "test")
_TRAIN_SHARE, _VALID_SHARE = 0.90, 0.03
_LEFT_OUT_FOLDERS = frozenset(
    ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "ensurepip")
)
_LEFT_OUT = re.compile(r"_sysconfigdata|config-|encodings/(cp|mac_|iso8859|koi8|kz1048|ptcp|tis|hp_)")
_TOPICS = "pydoc_data/topics.py"


@dataclass(frozen=True)
class StdlibDocument:
    """One module's source, or one page of the language reference; `is_code` tells them apart."""

    name: str
    text: str

    @property
    def is_code(self) -> bool:
        """Whether it is Python."""
        return self.name.endswith(".py")

    def pieces(self) -> Iterator[Piece]:
        """The whole document."""
        yield from pieces_of(self.text, self.name)

    def num_bytes(self) -> int:
        """UTF-8 bytes."""
        return len(self.text.encode())

    def sha256(self) -> str:
        """The digest of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True)
class StdlibSource:
    """The documents of one split; all of them for None."""

    split: str | None = None

    @property
    def label(self) -> str:
        """How `wb data build` names it."""
        return "stdlib" if self.split is None else f"stdlib:{self.split}"

    def parts(self) -> list[TextPart]:
        """The documents in the order of their names."""
        return [document for document in stdlib_documents() if self.split in (None, split_of(document.name))]


def parse_stdlib(text: str) -> StdlibSource | None:
    """The source that 'stdlib' or 'stdlib:SPLIT' names; None for any other text."""
    name, colon, split = text.partition(":")
    if name != "stdlib":
        return None
    if colon and split not in SPLITS:
        raise DataError(f"{text}: no such split; the standard library has {', '.join(SPLITS)}")
    return StdlibSource(split if colon else None)


def split_of(name: str) -> str:
    """train, valid or test: a function of the file's name."""
    point = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    return "train" if point < _TRAIN_SHARE else "valid" if point < _TRAIN_SHARE + _VALID_SHARE else "test"


def stdlib_documents() -> list[StdlibDocument]:
    """Every document of the corpus, by name. DataError where Python came without its sources."""
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _LEFT_OUT_FOLDERS]
        for file in files:
            path = Path(folder, file)
            name = path.relative_to(root).as_posix()
            if path.suffix == ".py" and not _LEFT_OUT.match(name) and name != _TOPICS:
                documents.append(StdlibDocument(name, _read(path)))
    documents += _topic_pages(root / _TOPICS)
    documents = sorted(
        (document for document in documents if document.text.strip()), key=lambda document: document.name
    )
    if not any(document.is_code for document in documents):
        raise DataError(
            f"{root}: Python came without the sources of its standard library; install them, or use your own text"
        )
    return documents


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8", errors="strict").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return ""  # a few library files declare another encoding: left out like empty ones
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _topic_pages(path: Path) -> list[StdlibDocument]:
    """The pages of the topics file, from its dictionary literal: reading runs no code."""
    if not path.is_file():
        return []
    for node in ast.parse(_read(path)).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            pages = ast.literal_eval(node.value)
            return [StdlibDocument(f"pydoc_data/topics/{name}", text) for name, text in pages.items()]
    return []
