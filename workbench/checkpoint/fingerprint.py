"""Fingerprints of logical tensors that do not depend on layout, file order or format. NumPy only.

A tensor is seen as a matrix of 32-bit words: its last dimension gives the columns (two BF16 elements are a word, an F64
element two), all dimensions before it the rows. The fingerprint is a digest of dtype, shape and three sums over all
words, modulo the prime 2**33 - 9, of `word * word_weight * block_weight * row_weight`, where 256 columns are a block.
Sums are linear, so each box adds its own part in any order and on any rank; no word reaches the prime, so none can be
taken for another. Word weights have 13 bits: a product with a word summed over a block stays under 2**53, so float64
matrix products are exact and run near memory speed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np

from workbench.spec.geometry import Box, LogicalTensor

_PRIME: Final = (1 << 33) - 9
_BLOCK: Final = 256
_PRODUCT_WORDS: Final = 1 << 16
"""Words, or parts of words, turned into float64 at a time: half a MiB stays in the cache. OpenBLAS does not share out a
product of so few among threads of its own: these spin for many times the work's length when others want the cores."""
_STREAMS: Final = 3
_FACTORS: Final = 4  # columns of weights in a product, one of them zero: BLAS has fast kernels for four, none for three
_WORD_BITS: Final = 13
_BLOCK_BITS: Final = 20
_ROW_BITS: Final = 30
_BLOCK_SEED: Final = 0x1000
_ROW_SEED: Final = 0x2000


@dataclass(frozen=True, slots=True)
class PartialFingerprint:
    """The sums over some boxes of a tensor; adding those of disjoint boxes that cover it gives the whole's."""

    sums: tuple[int, int, int] = (0, 0, 0)

    def __add__(self, other: PartialFingerprint) -> PartialFingerprint:
        a, b, c = ((x + y) % _PRIME for x, y in zip(self.sums, other.sums, strict=True))
        return PartialFingerprint((a, b, c))

    def finish(self, tensor: LogicalTensor) -> str:
        """The fingerprint as text, 32 hexadecimal digits, once the sums cover `tensor`."""
        told = f"{tensor.dtype} {list(tensor.shape)} {list(self.sums)}"
        return hashlib.blake2s(told.encode(), digest_size=16).hexdigest()


def box_fingerprint(tensor: LogicalTensor, box: Box, array: np.ndarray) -> PartialFingerprint:
    """The part that the elements of `box`, given in storage dtype, add to the fingerprint of `tensor`."""
    if not array.size:
        return PartialFingerprint()
    matrix = array.reshape(-1, array.shape[-1]) if array.ndim else array.reshape(1, 1)
    first_byte = (box.offset[-1] if box.offset else 0) * matrix.itemsize
    words, word_weights = _words(matrix, first_byte)
    inner = np.zeros((len(words), _FACTORS), np.uint64)
    for columns, first, num_blocks in _parts(first_byte // words.itemsize, words.shape[1], len(word_weights)):
        inside = first % len(word_weights)
        taken = words[:, columns].reshape(len(words), num_blocks, -1)
        sums = _folded(_block_sums(taken, word_weights[inside : inside + taken.shape[2]]))
        inner += np.einsum("rbs,bs->rs", sums, _block_weights(first // len(word_weights), num_blocks))
        inner = _folded(inner)
    outer = _folded(inner * _weights(_row_indices(tensor.shape, box), _ROW_SEED, _ROW_BITS))
    a, b, c, _ = (int(value) % _PRIME for value in outer.sum(axis=0, dtype=np.uint64))
    return PartialFingerprint((a, b, c))


def _block_sums(words: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The sum of each block's words times their weights, for each stream; below 2**53, so exact. [rows, blocks, 4]"""
    rows, num_blocks, width = words.shape
    height = min(_PRODUCT_WORDS // (num_blocks * width), rows)
    memory, sums = np.empty(height * num_blocks * width), np.empty((rows, num_blocks, _FACTORS))
    for row in range(0, rows, height):
        taken = words[row : row + height]
        matrix = memory[: taken.size].reshape(-1, width)
        np.copyto(matrix.reshape(taken.shape), taken)
        out = sums[row : row + height].reshape(-1, _FACTORS)
        np.dot(matrix, weights, out=out)  # which, unlike matmul, lets other threads run meanwhile
    return sums.astype(np.uint64)


def _folded(values: np.ndarray) -> np.ndarray:
    """Smaller numbers of the same remainders, below 2**35: 2**33 is 9 modulo the prime."""
    high = values >> np.uint64(33)
    high *= np.uint64(9)
    high += values & np.uint64((1 << 33) - 1)
    return high


def fingerprint(tensor: LogicalTensor, parts: Iterable[PartialFingerprint]) -> str:
    """The fingerprint of a tensor from the parts of the boxes that cover it."""
    return sum(parts, PartialFingerprint()).finish(tensor)


def _words(matrix: np.ndarray, first_byte: int) -> tuple[np.ndarray, np.ndarray]:
    """The matrix as words, or as the parts of words that its elements are where it cuts one; with their weights."""
    size = matrix.itemsize
    if matrix.strides[1] != size:
        matrix = np.ascontiguousarray(matrix)
    if first_byte % 4 == 0 and matrix.shape[1] * size % 4 == 0:
        size = 4
    part_bytes = min(size, 4)
    return matrix.view(f"<u{part_bytes}"), _word_weights(part_bytes)


def _row_indices(shape: tuple[int, ...], box: Box) -> np.ndarray:
    """Index of each row of the box among the rows of the whole tensor."""
    found = np.zeros(1, np.uint64)
    for length, offset, size in zip(shape[:-1], box.offset[:-1], box.size[:-1], strict=True):
        here = np.arange(offset, offset + size, dtype=np.uint64)
        found = (found[:, None] * np.uint64(length) + here[None, :]).reshape(-1)
    return found


def _parts(first: int, count: int, width: int) -> Iterable[tuple[slice, int, int]]:
    """Runs of a box's columns that are whole blocks of `width`, or a part of one: slice, first column, blocks."""
    done = 0
    while done < count:
        inside, left = (first + done) % width, count - done
        num_blocks = min(left, _PRODUCT_WORDS) // width if not inside else 0
        size = num_blocks * width or min(width - inside, left)
        yield slice(done, done + size), first + done, max(1, num_blocks)
        done += size


@lru_cache(maxsize=3)
def _word_weights(part_bytes: int) -> np.ndarray:
    """Weights of the words of a block, or of the parts of them, for each stream and a column of zeros; float64."""
    weights = _weights(np.arange(_BLOCK, dtype=np.uint64), 0, _WORD_BITS).astype(np.float64)
    weights[:, _STREAMS:] = 0
    places = 256.0 ** np.arange(0, 4, part_bytes)
    return (weights[:, None, :] * places[:, None]).reshape(-1, _FACTORS)


@lru_cache(maxsize=64)
def _block_weights(first: int, count: int) -> np.ndarray:
    return _weights(np.arange(first, first + count, dtype=np.uint64), _BLOCK_SEED, _BLOCK_BITS)


def _weights(index: np.ndarray, seed: int, bits: int) -> np.ndarray:
    """Pseudo-random odd integers of `bits` bits for each index and stream: SplitMix64 (Steele, Lea, Flood 2014)."""
    starts = [(seed + stream + 1) * 0xD1B54A32D192ED03 % (1 << 64) for stream in range(_FACTORS)]
    state = (index * np.uint64(0x9E3779B97F4A7C15))[:, None] + np.array(starts, np.uint64)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (state ^ (state >> np.uint64(31))) >> np.uint64(64 - bits) | np.uint64(1)
