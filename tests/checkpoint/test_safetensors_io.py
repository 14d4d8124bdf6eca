"""Headers from outside are believed only after their numbers have been checked."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from workbench.checkpoint.safetensors_io import RangedFile, file_bytes, lay_out, read_header
from workbench.errors import CheckpointError


def write(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_a_file_of_the_safetensors_library_reads_the_same(tmp_path):
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(5, dtype=np.float16)}
    save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "x.safetensors")
    assert header.metadata == {"format": "pt"}
    file = RangedFile(tmp_path / "x.safetensors")
    for key, expected in arrays.items():
        found = np.empty(header.entries[key].shape, expected.dtype)
        file.read_into(found, header.entries[key].start)
        assert np.array_equal(found, expected)


def test_a_laid_out_file_is_read_by_the_safetensors_library(tmp_path):
    layout = lay_out([("half", "F16", (3,)), ("word", "F32", (2, 2)), ("bit", "BOOL", ())], {"format": "pt"})
    content = bytearray(layout.file_bytes)
    content[: len(layout.prefix)] = layout.prefix
    arrays = {"half": np.ones(3, np.float16), "word": np.eye(2, dtype=np.float32), "bit": np.array(True)}
    for key, array in arrays.items():
        start = layout.entries[key].start
        assert start % array.itemsize == 0, "wider element types come first, so that all are aligned"
        content[start : start + array.nbytes] = array.tobytes()
    (tmp_path / "x.safetensors").write_bytes(content)
    loaded = load_file(tmp_path / "x.safetensors")
    assert all(np.array_equal(loaded[key], array) for key, array in arrays.items())


def test_large_tensors_begin_on_a_page_whatever_lies_beside_them():
    layout = lay_out([("odd", "BF16", (3,)), ("a", "BF16", (2048, 2)), ("half", "BF16", (32,)), ("b", "BF16", (4096,))])
    assert layout.entries["a"].start % 4096 == 0 and layout.entries["b"].start % 4096 == 0
    assert layout.entries["half"].start % 64 == 0


REFUSED = {
    "a name twice": (b'{"a":' + json.dumps(entry()).encode() + b',"a":' + json.dumps(entry()).encode() + b"}", "twice"),
    "no JSON": (b"\x80\x04pickle", "not valid"),
    "no object": (b"[1]", "not an object"),
    "an unknown dtype": ({"a": entry("Q4")}, "'a': dtype 'Q4' is not known"),
    "a negative size": ({"a": entry(shape=[-2])}, r"shape \[-2\] is not a list of sizes"),
    "a size that is true": ({"a": entry(shape=[True, 2])}, "is not a list of sizes"),
    "a range backwards": ({"a": entry(offsets=[8, 0])}, r"data_offsets \[8, 0\] are not a range"),
    "bytes that do not fit": ({"a": entry(shape=[3])}, r"8 bytes do not make F32 of shape \[3\] \(12 bytes\)"),
    "an overlap": ({"a": entry(), "b": entry(offsets=[4, 12])}, "'b' .* overlaps"),
    "a hole": ({"a": entry(offsets=[4, 12])}, "'a' .* leaves a hole"),
    "terabytes": ({"a": entry(shape=[1 << 40], offsets=[0, 1 << 42])}, "it is truncated"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, "'a': its header entry lacks"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_bad_header_is_refused_by_file_tensor_and_value(tmp_path, kind):
    header, message = REFUSED[kind]
    path = write(tmp_path / "bad.safetensors", header, b"\0" * 8)
    with pytest.raises(CheckpointError, match=rf"bad\.safetensors.*{message}"):
        read_header(path)


def test_a_header_that_claims_terabytes_is_refused_before_it_is_read(tmp_path):
    path = write(tmp_path / "bad.safetensors", {}, length=1 << 43)
    with pytest.raises(CheckpointError, match=f"claims a header of {1 << 43} bytes"):
        read_header(path)


@pytest.mark.parametrize(("size", "message"), [(5, "5 bytes are too few"), (12, "file of 12 bytes"), (-1, "truncated")])
def test_a_truncated_file_is_named_with_its_size(tmp_path, size, message):
    path = tmp_path / "x.safetensors"
    save_file({"a": np.zeros(100, np.float32)}, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=rf"x\.safetensors.*{message}"):
        read_header(path)


@given(st.binary(max_size=200))
def test_no_bytes_make_the_reader_fail_in_any_other_way(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(content)) + content)
    try:
        read_header(path)
    except CheckpointError as error:
        assert str(path) in str(error)


@given(
    st.lists(
        st.tuples(
            st.text(max_size=12),
            st.sampled_from(["F32", "BF16", "U8"]),
            st.lists(st.integers(0, 3000), max_size=3).map(tuple),
        ),
        unique_by=lambda tensor: tensor[0],
        max_size=40,
    ),
    st.sampled_from([None, {"format": "pt"}]),
)
def test_the_size_of_a_file_is_known_without_its_header(tensors, metadata):
    sizes = [(len(json.dumps(key)), dtype, shape) for key, dtype, shape in tensors]
    assert file_bytes(sizes, metadata) == lay_out(tensors, metadata).file_bytes
