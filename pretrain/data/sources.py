"""What a user may name as a source of text."""

from pathlib import Path

from pretrain.data.documents import FileSource, TextSource
from pretrain.data.stdlib import parse_stdlib


def text_source(name: str, *, field: str = "text", pattern: str = "**/*") -> TextSource:
    """The source that a path names, or `stdlib` (all of the embedded corpus), `stdlib:train`, `:valid` or `:test`.

    A file or folder of that very name in the working directory goes first.
    """
    embedded = None if Path(name).exists() else parse_stdlib(name)
    return FileSource(Path(name), field, pattern) if embedded is None else embedded
