"""Fingerprints see every bit and no layout."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.boxes import partitions, shapes
from workbench.checkpoint import fingerprint as fingerprint_module
from workbench.checkpoint.fingerprint import box_fingerprint, fingerprint
from workbench.spec.dtypes import NUMPY_NAMES
from workbench.spec.geometry import Box, LogicalTensor

DTYPES = st.sampled_from(["BF16", "F16", "F32", "F64", "U8", "I64"])
seeds = st.integers(0, 2**32 - 1)


def random_bits(shape: tuple[int, ...], dtype: str, seed: int) -> np.ndarray:
    numpy_dtype = np.dtype(NUMPY_NAMES[dtype])
    count = int(np.prod(shape, dtype=int)) * numpy_dtype.itemsize
    return np.random.default_rng(seed).integers(0, 256, count, np.uint8).view(numpy_dtype).reshape(shape)


def whole(tensor: LogicalTensor, array: np.ndarray) -> str:
    return fingerprint(tensor, [box_fingerprint(tensor, Box.whole(tensor.shape), array)])


def plain(tensor: LogicalTensor, array: np.ndarray) -> tuple[int, int, int]:
    """The sums as the definition gives them, word by word in Python integers."""
    rows = array.reshape(-1, array.shape[-1])
    short = -rows.shape[1] * rows.itemsize % 4
    padded = np.pad(rows.view(np.uint8), ((0, 0), (0, short))).view("<u4")
    words = fingerprint_module._word_weights(4).astype(int).tolist()
    blocks = fingerprint_module._block_weights(0, -(-padded.shape[1] // 256)).tolist()
    row_weights = fingerprint_module._weights(np.arange(len(rows), dtype=np.uint64), 0x2000, 30).tolist()
    sums = [0, 0, 0]
    for weight, row in zip(row_weights, padded.tolist(), strict=True):
        for c, word in enumerate(row):
            for stream in range(3):
                sums[stream] += word * words[c % 256][stream] * blocks[c // 256][stream] * weight[stream]
    return tuple(value % (2**33 - 9) for value in sums)


@settings(max_examples=60)
@given(st.data(), shapes(max_dims=4), DTYPES, seeds)
def test_any_partition_in_any_order_gives_the_fingerprint_of_the_whole(data, shape, dtype, seed):
    tensor = LogicalTensor("x", shape, dtype)
    array = random_bits(shape, dtype, seed)
    boxes = data.draw(partitions(shape))
    parts = [box_fingerprint(tensor, box, array[box.slices]) for box in boxes]
    assert fingerprint(tensor, parts) == whole(tensor, array)


@settings(max_examples=100)
@given(st.data(), shapes(), DTYPES, seeds)
def test_any_single_flipped_bit_changes_it(data, shape, dtype, seed):
    tensor = LogicalTensor("x", shape, dtype)
    array = random_bits(shape, dtype, seed)
    before = whole(tensor, array)
    flat = array.reshape(-1).view(np.uint8).copy()
    flat[data.draw(st.integers(0, flat.size - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert whole(tensor, flat.view(array.dtype).reshape(shape)) != before


@given(seeds, st.integers(0, 15), st.integers(0, 15), st.sampled_from([0, 1]))
def test_swapped_rows_or_columns_change_it(seed, a, b, axis):
    tensor = LogicalTensor("x", (16, 16), "BF16")
    array = random_bits(tensor.shape, "BF16", seed)
    order = np.arange(16)
    order[[a, b]] = order[[b, a]]
    assert (whole(tensor, np.take(array, order, axis)) == whole(tensor, array)) == (a == b)


@given(seeds, st.sampled_from([(0, 1), (0, 2), (1, 3), (2, 3)]))
def test_swapped_blocks_change_it(seed, pair):
    tensor = LogicalTensor("x", (8, 8), "F32")
    array = random_bits(tensor.shape, "F32", seed)
    blocks = [np.s_[:4, :4], np.s_[:4, 4:], np.s_[4:, :4], np.s_[4:, 4:]]
    swapped = array.copy()
    swapped[blocks[pair[0]]], swapped[blocks[pair[1]]] = array[blocks[pair[1]]], array[blocks[pair[0]]]
    assert whole(tensor, swapped) != whole(tensor, array)


def test_a_transposed_square_a_shape_and_a_dtype_are_told_apart():
    array = random_bits((8, 8), "BF16", 1)
    square, flat = LogicalTensor("x", (8, 8), "BF16"), LogicalTensor("x", (1, 64), "BF16")
    zeros = np.zeros((8, 8), np.uint16)
    assert whole(square, array) != whole(square, np.ascontiguousarray(array.T))
    assert whole(square, zeros) != whole(flat, zeros.reshape(1, 64))
    assert whole(square, zeros) != whole(LogicalTensor("x", (8, 8), "F16"), zeros)


@pytest.mark.parametrize("dtype", ["BF16", "F32", "F64", "U8"])
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 4), (7,), (40, 9), (11, 1023), (1, 2049), (70, 500), (33, 257)])
def test_it_equals_the_definition_summed_word_by_word(shape, dtype):
    tensor = LogicalTensor("x", shape, dtype)
    array = random_bits(shape, dtype, 3)
    assert box_fingerprint(tensor, Box.whole(shape), array).sums == plain(tensor, array)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0,), ()])
def test_a_tensor_of_no_elements_or_no_dimensions_has_one(shape):
    tensor = LogicalTensor("x", shape, "F32")
    assert len(whole(tensor, np.zeros(shape, np.float32))) == 32


@pytest.mark.parametrize("columns", [1 << 17, (1 << 17) + 511])
def test_sums_are_exact_where_every_word_is_the_largest(columns):
    """Blocks of 256 words of all ones are the worst case for float64, and many of them for the sum over blocks."""
    tensor = LogicalTensor("x", (1, columns), "BF16")
    array = np.full(tensor.shape, 0xFFFF, np.uint16)
    assert box_fingerprint(tensor, Box.whole(tensor.shape), array).sums == plain(tensor, array)


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_no_word_is_taken_for_another(a, b):
    tensor = LogicalTensor("x", (1,), "U32")
    pair = [box_fingerprint(tensor, Box.whole((1,)), np.array([word], np.uint32)).sums for word in (a, b)]
    assert all((x == y) == (a == b) for x, y in zip(*pair, strict=True))


def test_columns_beyond_one_block_of_weights_are_summed_alike_in_one_piece_and_in_many():
    tensor = LogicalTensor("x", (2, 150_000), "BF16")
    array = random_bits(tensor.shape, "BF16", 5)
    boxes = [Box((0, at), (2, 50_000)) for at in range(0, 150_000, 50_000)]
    parts = [box_fingerprint(tensor, box, array[box.slices]) for box in boxes]
    assert fingerprint(tensor, parts) == whole(tensor, array)


def test_the_definition_does_not_drift():
    """Fingerprints are in users' manifests: another value here is another format version."""
    tensor = LogicalTensor("x", (4, 6), "BF16")
    array = np.arange(24, dtype=np.uint16).reshape(4, 6)
    assert whole(tensor, array) == "0d1885a64ab917154bf122b0907deb08"


def test_no_product_is_large_enough_for_blas_to_wake_its_threads():
    """OpenBLAS shares out a product of matrices from 2**18 multiplications on, one of a vector from 9216 on."""
    assert fingerprint_module._PRODUCT_WORDS * fingerprint_module._FACTORS <= 1 << 18
    assert fingerprint_module._BLOCK * fingerprint_module._FACTORS < 9216
