"""Megatron-compatible token files: `PREFIX.bin` (token ids) beside `PREFIX.idx` (where each document lies).

The layout is that of Megatron-LM's core/datasets/indexed_dataset.py, little-endian throughout:
magic "MMIDIDX\\0\\0", version u64 = 1, dtype code u8, number of sequences u64, length of the document table u64, then
sequence lengths int32, byte pointers int64, and the document table int64 (the first sequence of each document, and the
number of sequences at the end). This writer makes one sequence of each document.
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
import numpy.typing as npt

from workbench.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, str] = {1: "|u1", 2: "|i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_FLOAT_CODES = {6: "float64", 7: "float32"}
_CODES = {name: code for code, name in _DTYPES.items()}
_COPY_ITEMS = 1 << 20
UINT16_VOCABULARY = 65500  # Megatron's DType.optimal_dtype: uint16 strictly below, else int32

Tokens = npt.NDArray[np.integer]


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest dtype that Megatron would choose for ids below `vocab_size`."""
    return np.dtype("<u2") if vocab_size < UINT16_VOCABULARY else np.dtype("<i4")


def strip_suffix(path: str | Path) -> Path:
    """The prefix of a token file, whether the user named the prefix, the .bin or the .idx."""
    text = str(path)
    return Path(text[:-4]) if text.endswith((".bin", ".idx")) else Path(text)


def bin_path(prefix: Path) -> Path:
    """PREFIX.bin (a dot in the prefix is part of its name)."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: Path) -> Path:
    """PREFIX.idx."""
    return Path(f"{prefix}.idx")


class IndexedTokens:
    """Memory-mapped, read-only documents of token ids; opening checks the header and reads no table.

    `num_tokens`, `num_documents`, `dtype`, and `read(start, stop)` over the concatenated stream of all documents.
    """

    def __init__(self, path: str | Path) -> None:
        self.prefix = strip_suffix(path)
        self.dtype, self.num_sequences, table_length = _read_header(self.prefix)
        self.num_documents = table_length - 1
        index = np.memmap(idx_path(self.prefix), dtype=np.uint8, mode="r")
        sizes_end = _HEADER.size + 4 * self.num_sequences
        pointers_end = sizes_end + 8 * self.num_sequences
        self.sizes = index[_HEADER.size : sizes_end].view("<i4")
        self.pointers = index[sizes_end:pointers_end].view("<i8")
        self.documents = index[pointers_end : pointers_end + 8 * table_length].view("<i8")
        self._check_ends()
        self._stream = np.memmap(bin_path(self.prefix), dtype=self.dtype, mode="r")
        self.num_tokens = len(self._stream)

    def __len__(self) -> int:
        return self.num_documents

    def read(self, start: int, stop: int) -> Tokens:
        """Token ids [start, stop) of the concatenated stream, as a view of the mapped file."""
        assert 0 <= start <= stop <= self.num_tokens, (start, stop, self.num_tokens)
        return self._stream[start:stop]

    def document(self, number: int) -> Tokens:
        """The token ids of one document, its end-of-document token included."""
        return self.read(self.document_start(number), self.document_start(number + 1))

    def document_start(self, number: int) -> int:
        """Where document `number` begins in the concatenated stream; the stream's length for number == len(self)."""
        sequence = int(self.documents[number])
        return (
            self.num_tokens if sequence == self.num_sequences else int(self.pointers[sequence]) // self.dtype.itemsize
        )

    def verify(self) -> int:
        """The largest token id, after checking that every document lies where the tables say; reads the whole file."""
        expected = 0
        for low in range(0, self.num_sequences, _COPY_ITEMS):
            sizes = self.sizes[low : low + _COPY_ITEMS].astype(np.int64) * self.dtype.itemsize
            pointers = expected + np.cumsum(sizes) - sizes
            if (sizes < 0).any() or not np.array_equal(pointers, self.pointers[low : low + _COPY_ITEMS]):
                raise DataError(
                    f"{idx_path(self.prefix)}: sequences near number {low} do not follow one another; build it again"
                )
            expected += int(sizes.sum())
        for low in range(0, self.num_documents, _COPY_ITEMS):
            table = self.documents[low : low + _COPY_ITEMS + 1]
            if (np.diff(table) < 0).any():
                raise DataError(
                    f"{idx_path(self.prefix)}: the document table decreases near document {low}; build it again"
                )
        largest = 0
        for low in range(0, self.num_tokens, _COPY_ITEMS):
            block = self.read(low, min(low + _COPY_ITEMS, self.num_tokens))
            if int(block.min()) < 0:
                raise DataError(
                    f"{bin_path(self.prefix)}: holds the negative token id {int(block.min())}; build it again"
                )
            largest = max(largest, int(block.max()))
        return largest

    def _check_ends(self) -> None:
        """Refuse tables whose first and last entries do not fit the .bin file: the cheap proof against truncation."""
        size = bin_path(self.prefix).stat().st_size
        last = int(self.pointers[-1]) + int(self.sizes[-1]) * self.dtype.itemsize
        if last != size:
            raise DataError(
                f"{bin_path(self.prefix)}: {size} bytes, but its index ends at byte {last}; "
                "the file is truncated or belongs to another index; build it again"
            )
        if int(self.pointers[0]) != 0 or int(self.documents[0]) != 0 or int(self.documents[-1]) != self.num_sequences:
            raise DataError(
                f"{idx_path(self.prefix)}: its tables do not cover its {self.num_sequences} sequences; build it again"
            )


def _read_header(prefix: Path) -> tuple[np.dtype, int, int]:
    """(token dtype, number of sequences, length of the document table), checked against the size of the index file."""
    index = idx_path(prefix)
    for path in (index, bin_path(prefix)):
        if not path.is_file():
            hint = "the build did not finish" if _partial(path).exists() else "name the path without .bin or .idx"
            raise DataError(f"{path}: no such token file; {hint} (make one with `wb data build`)")
    try:
        with index.open("rb") as file:
            header = file.read(_HEADER.size)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise DataError(f"{index}: cannot be read: {error.strerror}") from error
    if not header.startswith(MAGIC):
        raise DataError(f"{index}: begins with {header[:9]!r}, not {MAGIC!r}; it is not a Megatron token index")
    if len(header) < _HEADER.size:
        raise DataError(
            f"{index}: {size} bytes, shorter than its {_HEADER.size}-byte header; it is truncated, build it again"
        )
    _, version, code, num_sequences, table_length = _HEADER.unpack(header)
    if version != VERSION:
        raise DataError(f"{index}: version {version}, only version {VERSION} can be read; build it again")
    if code not in _DTYPES:
        found = _FLOAT_CODES.get(code, f"unknown code {code}")
        raise DataError(f"{index}: tokens of dtype {found}; token ids must be integers ({', '.join(_CODES)})")
    if num_sequences == 0 or table_length < 2 or bin_path(prefix).stat().st_size == 0:
        raise DataError(f"{index}: holds no documents; build it from a source with text in it")
    # Multimodal indices carry one mode byte a sequence behind the tables: allowed, and of no concern to a token stream.
    needed = _HEADER.size + 12 * num_sequences + 8 * table_length
    if size not in (needed, needed + num_sequences):
        raise DataError(
            f"{index}: {size} bytes, but {num_sequences} sequences need {needed}; it is truncated, build it again"
        )
    return np.dtype(_DTYPES[code]), num_sequences, table_length


class IndexedWriter:
    """Writes documents one after another in bounded memory; nothing exists at the final names before `close` succeeds.

    A context manager: leaving it normally commits, leaving it by an exception removes what was written.
    """

    def __init__(self, path: str | Path, *, vocab_size: int, overwrite: bool = False) -> None:
        self.prefix = strip_suffix(path)
        self.dtype = token_dtype(vocab_size)
        self.num_documents = self.num_tokens = 0
        self.open_length = 0  # tokens of the document that is being written
        self._vocab_size = vocab_size
        if not overwrite:
            for final in (idx_path(self.prefix), bin_path(self.prefix)):
                if final.exists():
                    raise DataError(f"{final}: exists already; choose another destination or overwrite it with --force")
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._sizes_path = Path(f"{self.prefix}.sizes.partial")
        self._bin: BinaryIO = _partial(bin_path(self.prefix)).open("wb", buffering=1 << 20)
        self._sizes: BinaryIO = self._sizes_path.open("w+b", buffering=1 << 20)

    def add(self, tokens: npt.ArrayLike) -> None:
        """Append tokens to the open document."""
        array = np.asarray(tokens, dtype=np.int64)
        if array.size:
            low, high = int(array.min()), int(array.max())
            if low < 0 or high >= self._vocab_size:
                raise DataError(
                    f"{self.prefix}: document {self.num_documents} holds token id {low if low < 0 else high}, "
                    f"outside the vocabulary of {self._vocab_size}"
                )
        self._bin.write(array.astype(self.dtype).tobytes())
        self.open_length += array.size

    def end_document(self) -> None:
        """Close the open document; an empty one is not recorded."""
        if not self.open_length:
            return
        if self.open_length >= 1 << 31:
            raise DataError(
                f"{self.prefix}: document {self.num_documents} has {self.open_length} tokens; "
                "the format holds 2147483647"
            )
        self._sizes.write(struct.pack("<i", self.open_length))
        self.num_tokens += self.open_length
        self.num_documents += 1
        self.open_length = 0

    def close(self) -> None:
        """Write the index and move both files to their names: the .bin first, so that an index is never without it."""
        self.end_document()
        if not self.num_documents:
            self.abort()
            raise DataError(f"{self.prefix}: the source holds no documents, so no token file was written")
        index = _partial(idx_path(self.prefix))
        with index.open("wb") as file:
            self._write_index(file)
            _sync(file)
        _sync(self._bin)
        self._bin.close()
        self._sizes.close()
        self._sizes_path.unlink()
        idx_path(self.prefix).unlink(missing_ok=True)
        _partial(bin_path(self.prefix)).replace(bin_path(self.prefix))
        index.replace(idx_path(self.prefix))

    def abort(self) -> None:
        """Remove everything written so far."""
        self._bin.close()
        self._sizes.close()
        for path in (_partial(bin_path(self.prefix)), _partial(idx_path(self.prefix)), self._sizes_path):
            path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _write_index(self, file: BinaryIO) -> None:
        count = self.num_documents
        file.write(_HEADER.pack(MAGIC, VERSION, _CODES[self.dtype.str], count, count + 1))
        for sizes in self._spooled_sizes():
            file.write(sizes.tobytes())
        offset = 0
        for sizes in self._spooled_sizes():
            num_bytes = sizes.astype(np.int64) * self.dtype.itemsize
            file.write((offset + np.cumsum(num_bytes) - num_bytes).astype("<i8").tobytes())
            offset += int(num_bytes.sum())
        for low in range(0, count + 1, _COPY_ITEMS):
            file.write(np.arange(low, min(low + _COPY_ITEMS, count + 1), dtype="<i8").tobytes())

    def _spooled_sizes(self) -> Iterator[npt.NDArray[np.int32]]:
        self._sizes.flush()
        self._sizes.seek(0)
        while block := self._sizes.read(4 * _COPY_ITEMS):
            yield np.frombuffer(block, dtype="<i4")


def _partial(path: Path) -> Path:
    return Path(f"{path}.partial")


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
