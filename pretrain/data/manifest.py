"""`PREFIX.json` beside a token file: what was tokenized, with what. Megatron's reader does not look at it."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from workbench.errors import DataError

FORMAT = "workbench-data"
VERSION = 1


@dataclass(frozen=True)
class SourceFile:
    """One file that went in; `name` is relative to the source."""

    name: str
    sha256: str
    num_bytes: int
    documents: int


@dataclass(frozen=True)
class DataManifest:
    """What a token file holds; `text_bytes` counts the UTF-8 bytes of its documents, for bits per byte."""

    source: str
    tokenizer: str
    tokenizer_sha256: str
    vocab_size: int
    eos_id: int
    documents: int
    tokens: int
    text_bytes: int
    files: tuple[SourceFile, ...]


def manifest_path(prefix: Path) -> Path:
    """PREFIX.json."""
    return Path(f"{prefix}.json")


def write_manifest(prefix: Path, manifest: DataManifest) -> None:
    """Put the manifest beside the token file, all of it or nothing."""
    partial = Path(f"{manifest_path(prefix)}.partial")
    document = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(manifest)}
    partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    partial.replace(manifest_path(prefix))


def read_manifest(prefix: Path) -> DataManifest | None:
    """The manifest of a token file; None for one that another program wrote without it."""
    path = manifest_path(prefix)
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); remove it to use the token file without it") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        return None
    if document.get("version") != VERSION:
        raise DataError(
            f"{path}: version {document.get('version')}, only version {VERSION} can be read; build the data again"
        )
    fields = {field.name for field in dataclasses.fields(DataManifest)}
    if missing := sorted(fields - document.keys()):
        raise DataError(f"{path}: lacks {', '.join(missing)}; build the data again")
    values = {name: document[name] for name in fields}
    return DataManifest(**(values | {"files": tuple(SourceFile(**file) for file in document["files"])}))
