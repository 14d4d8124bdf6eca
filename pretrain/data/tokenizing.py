"""Text to token files, streamed: memory does not grow with the text."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from pretrain.data.documents import Piece, TextPart, TextSource
from pretrain.data.indexed import IndexedWriter, strip_suffix
from pretrain.data.manifest import DataManifest, SourceFile, manifest_path, write_manifest
from pretrain.data.writing import writing
from workbench.errors import DataError
from workbench.tokenizer import Tokenizer

Progress = Callable[[int, int], None]

_BATCH_CHARS = 1 << 20
_BATCH_PIECES = 4096


def build_data(
    source: TextSource,
    destination: str | Path,
    *,
    tokenizer: Tokenizer,
    valid_share: float = 0.0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, DataManifest]:
    """Write `destination`.bin/.idx/.json and return its manifest by prefix; nothing is there before all is.

    Each document is followed by the tokenizer's end-of-text token. With `valid_share` there are two token files,
    `destination`-train and -valid; the document's name decides, so adding documents moves none of the others.
    """
    prefix = strip_suffix(destination)
    if tokenizer.eos_id is None:
        raise DataError(
            f"{tokenizer.path}: names no end-of-text token; put an eos_token into its tokenizer_config.json"
        )
    prefixes = [Path(f"{prefix}-train"), Path(f"{prefix}-valid")] if valid_share else [prefix]
    parts = source.parts()
    with writing(prefix), ExitStack() as stack:
        outputs: list[_Output] = []
        for path in prefixes:
            outputs.append(_Output(path, tokenizer, overwrite))
            stack.enter_context(outputs[-1].writer)
        _write_parts(parts, outputs, tokenizer, valid_share, progress)
        for output in outputs:
            output.check_not_empty(source)
            manifest_path(output.writer.prefix).unlink(missing_ok=True)
    manifests = {str(output.writer.prefix): output.manifest(source, tokenizer) for output in outputs}
    with writing(prefix):
        for output, manifest in zip(outputs, manifests.values(), strict=True):
            write_manifest(output.writer.prefix, manifest)
    return manifests


class _Output:
    """One token file being written, with what its manifest will say."""

    def __init__(self, prefix: Path, tokenizer: Tokenizer, overwrite: bool) -> None:
        self.writer = IndexedWriter(prefix, vocab_size=tokenizer.vocab_size, overwrite=overwrite)
        self.text_bytes = 0
        assert tokenizer.eos_id is not None
        self._eos_id = tokenizer.eos_id
        self._files: list[SourceFile] = []
        self._documents_before = 0

    def add(self, piece: Piece, ids: list[int]) -> None:
        """Append a piece; the end of its document is marked unless the document is empty."""
        self.writer.add(ids)
        self.text_bytes += len(piece.text.encode())
        if piece.ends and self.writer.open_length:
            self.writer.add([self._eos_id])
            self.writer.end_document()

    def end_part(self, part: TextPart) -> None:
        """Record a finished file, if any of its documents went here."""
        if added := self.writer.num_documents - self._documents_before:
            self._files.append(SourceFile(part.name, part.sha256(), part.num_bytes(), added))
        self._documents_before = self.writer.num_documents

    def check_not_empty(self, source: TextSource) -> None:
        """DataError if no document came this way."""
        if not self.writer.num_documents:
            raise DataError(
                f"{source.label}: no text for {self.writer.prefix}; give more documents, or another --valid share"
            )

    def manifest(self, source: TextSource, tokenizer: Tokenizer) -> DataManifest:
        """What was written."""
        return DataManifest(
            source=source.label,
            tokenizer=str(tokenizer.path),
            tokenizer_sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            eos_id=self._eos_id,
            documents=self.writer.num_documents,
            tokens=self.writer.num_tokens,
            text_bytes=self.text_bytes,
            files=tuple(self._files),
        )


def _write_parts(
    parts: list[TextPart], outputs: list[_Output], tokenizer: Tokenizer, valid_share: float, progress: Progress | None
) -> None:
    plain = tokenizer.plain()
    total = sum(part.num_bytes() for part in parts)
    finished = in_part = 0
    for batch in _batches(parts):
        ids = iter(plain.encode_batch([item.text for item in batch if isinstance(item, Piece)]))
        for item in batch:
            if isinstance(item, Piece):
                held_out = len(outputs) > 1 and _chosen(item.document, valid_share)
                outputs[held_out].add(item, next(ids))
                in_part += len(item.text)
            else:
                for output in outputs:
                    output.end_part(item)
                finished, in_part = finished + item.num_bytes(), 0
        if progress is not None:
            progress(min(finished + in_part, total), total)


def _batches(parts: list[TextPart]) -> Iterator[list[Piece | TextPart]]:
    """Pieces across files, bounded in number and characters; the part itself follows its last piece."""
    batch: list[Piece | TextPart] = []
    chars = 0
    for part in parts:
        for piece in part.pieces():
            batch.append(piece)
            chars += len(piece.text)
            if chars >= _BATCH_CHARS or len(batch) >= _BATCH_PIECES:
                yield batch
                batch, chars = [], 0
        batch.append(part)
    yield batch


def _chosen(document: str, share: float) -> bool:
    """Whether a document is held out: a function of its name, independent of the embedded corpus's own division."""
    return int.from_bytes(hashlib.sha256(f"held out/{document}".encode()).digest()[:8], "big") < share * 2**64
