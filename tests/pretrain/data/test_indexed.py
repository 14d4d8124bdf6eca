"""Token files: round trips, the program that owns the format, refusals, and writers that die."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.indexed import IndexedTokens, IndexedWriter, bin_path, idx_path, token_dtype
from tests.pretrain.data.helpers import write_tokens
from workbench.errors import DataError


@settings(max_examples=30, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 70_000), min_size=1, max_size=20), min_size=1, max_size=12),
    spare=st.integers(0, 10_000),
)
def test_documents_come_back_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], spare: int
) -> None:
    prefix = tmp_path_factory.mktemp("indexed") / "data"
    with IndexedWriter(prefix, vocab_size=max(map(max, documents)) + 1 + spare) as writer:
        for document in documents:
            writer.add(document[:3])
            writer.add(document[3:])
            writer.end_document()
    tokens = IndexedTokens(prefix)
    assert [tokens.document(number).tolist() for number in range(len(tokens))] == documents
    assert tokens.read(0, tokens.num_tokens).tolist() == [token for document in documents for token in document]
    assert tokens.verify() == max(map(max, documents))


def test_the_dtype_is_the_one_megatron_chooses() -> None:
    assert (token_dtype(65499), token_dtype(65500)) == (np.dtype("<u2"), np.dtype("<i4"))


def test_the_prefix_the_bin_and_the_idx_name_the_same_file(tmp_path: Path) -> None:
    write_tokens(tmp_path / "v1.5", [3, 4])
    for name in ("v1.5", "v1.5.bin", "v1.5.idx"):
        assert IndexedTokens(tmp_path / name).num_tokens == 7


def test_the_index_is_byte_for_byte_the_format(tmp_path: Path) -> None:
    write_tokens(tmp_path / "a", [2, 3], vocab_size=100)
    expected = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 2, 3)
    expected += struct.pack("<2i", 2, 3) + struct.pack("<2q", 0, 4) + struct.pack("<3q", 0, 1, 2)
    assert (tmp_path / "a.idx").read_bytes() == expected
    assert (tmp_path / "a.bin").read_bytes() == struct.pack("<5H", *range(5))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


@pytest.mark.parametrize("vocab_size", [1000, 100_000])
def test_megatron_core_reads_our_files_and_we_read_its(tmp_path: Path, vocab_size: int) -> None:
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    torch = pytest.importorskip("torch")
    ours = write_tokens(tmp_path / "ours", [5, 1, 300, 7], vocab_size=vocab_size)
    theirs = megatron.IndexedDataset(str(tmp_path / "ours"))
    assert len(theirs) == 4 and theirs.document_indices.tolist() == [0, 1, 2, 3, 4]
    assert all(theirs[number].tolist() == ours.document(number).tolist() for number in range(4))

    builder = megatron.IndexedDatasetBuilder(
        str(tmp_path / "theirs.bin"), dtype=megatron.DType.optimal_dtype(vocab_size)
    )
    for document in ([1, 2, 3], [4], [5, 6]):
        builder.add_document(torch.tensor(document), [len(document)])
    builder.add_document(torch.tensor([7, 8, 9]), [1, 2])  # one document of two sequences
    builder.finalize(str(tmp_path / "theirs.idx"))
    read = IndexedTokens(tmp_path / "theirs")
    assert [read.document(number).tolist() for number in range(len(read))] == [[1, 2, 3], [4], [5, 6], [7, 8, 9]]
    assert read.verify() == 9 and read.dtype == token_dtype(vocab_size)


def test_nothing_exists_at_the_final_names_until_the_writer_closes(tmp_path: Path) -> None:
    writer = IndexedWriter(tmp_path / "a", vocab_size=10)
    writer.add([1, 2])
    with pytest.raises(DataError, match=r"a\.idx: no such token file|did not finish"):
        IndexedTokens(tmp_path / "a")
    writer.close()
    assert IndexedTokens(tmp_path / "a").num_tokens == 2


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the disk is gone"), IndexedWriter(tmp_path / "a", vocab_size=10) as writer:
        writer.add([1, 2])
        raise RuntimeError("the disk is gone")
    assert list(tmp_path.iterdir()) == []


def test_a_process_killed_while_writing_leaves_no_token_file(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        writer = IndexedWriter(tmp_path / "a", vocab_size=10)
        for _ in range(1000):
            writer.add([1, 2, 3])
            writer.end_document()
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    with pytest.raises(DataError, match=r"a\.idx"):
        IndexedTokens(tmp_path / "a")
    write_tokens(tmp_path / "a", [4])
    assert IndexedTokens(tmp_path / "a").num_tokens == 4


def test_an_existing_token_file_is_not_overwritten_unasked(tmp_path: Path) -> None:
    write_tokens(tmp_path / "a", [4])
    with pytest.raises(DataError, match=r"a\.idx: exists already"):
        IndexedWriter(tmp_path / "a", vocab_size=10)
    with IndexedWriter(tmp_path / "a", vocab_size=10, overwrite=True) as writer:
        writer.add([1])
    assert IndexedTokens(tmp_path / "a").num_tokens == 1


def test_a_token_id_outside_the_vocabulary_is_refused_when_written(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a", vocab_size=10) as writer:
        writer.add([9])
        with pytest.raises(DataError, match="token id 10, outside the vocabulary of 10"):
            writer.add([3, 10])
        with pytest.raises(DataError, match="token id -1"):
            writer.add([3, -1])


def test_an_empty_source_writes_no_file_and_says_so(tmp_path: Path) -> None:
    writer = IndexedWriter(tmp_path / "a", vocab_size=10)
    writer.end_document()
    with pytest.raises(DataError, match="holds no documents"):
        writer.close()
    assert list(tmp_path.iterdir()) == []


def _header(code: int = 8, version: int = 1, sequences: int = 2, table: int = 3) -> bytes:
    return b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", version, code, sequences, table)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"", "begins with b''"),
        (b"PK\x03\x04 something else entirely, long enough", "not a Megatron token index"),
        (_header()[:20], "20 bytes, shorter than its 34-byte header"),
        (_header(), "34 bytes, but 2 sequences need 82; it is truncated"),
        (_header(version=2), "version 2, only version 1"),
        (_header(code=6), "dtype float64; token ids must be integers"),
        (_header(code=77), "unknown code 77"),
        (_header(sequences=0, table=1), "holds no documents"),
        (_header(sequences=1 << 60, table=1 << 60), "it is truncated"),
    ],
)
def test_a_foreign_or_truncated_index_is_named_for_what_it_is(tmp_path: Path, index: bytes, message: str) -> None:
    (tmp_path / "a.idx").write_bytes(index)
    (tmp_path / "a.bin").write_bytes(b"\x00" * 10)
    with pytest.raises(DataError, match=message) as fault:
        IndexedTokens(tmp_path / "a")
    assert "a.idx" in str(fault.value)


def test_missing_and_truncated_token_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.idx: no such token file"):
        IndexedTokens(tmp_path / "nowhere")
    write_tokens(tmp_path / "a", [4, 5], vocab_size=100)
    os.truncate(bin_path(tmp_path / "a"), 16)
    with pytest.raises(DataError, match=r"a\.bin: 16 bytes, but its index ends at byte 18"):
        IndexedTokens(tmp_path / "a")
    bin_path(tmp_path / "a").unlink()
    with pytest.raises(DataError, match=r"a\.bin: no such token file"):
        IndexedTokens(tmp_path / "a")


def test_verify_finds_tables_that_the_quick_check_cannot(tmp_path: Path) -> None:
    write_tokens(tmp_path / "a", [4, 5, 6], vocab_size=100)
    content = bytearray(idx_path(tmp_path / "a").read_bytes())
    content[34:42] = struct.pack("<2i", 5, 4)
    idx_path(tmp_path / "a").write_bytes(bytes(content))
    with pytest.raises(DataError, match="do not follow one another"):
        IndexedTokens(tmp_path / "a").verify()
