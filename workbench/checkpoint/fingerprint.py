"""Fingerprints of logical tensors that do not depend on layout, file order or format. NumPy only.

A tensor is seen as a matrix of 16-bit words: its last dimension gives the columns (an F32 element is two words), all
dimensions before it the rows. The fingerprint is three sums over all words, modulo the prime 2**31 - 1, of
`word * column_weight * row_weight`, followed by a digest of dtype and shape. Sums are linear, so each box adds its own
part in any order and on any rank. Column weights have 20 bits: a product with a 16-bit word summed over up to 2**16
columns stays under 2**53, so float64 matrix products are exact and run near memory speed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np

from workbench.spec.geometry import Box, LogicalTensor

_PRIME: Final = (1 << 31) - 1
_COLUMN_BLOCK: Final = 1 << 16
_BLOCK_COLUMNS: Final = 1 << 11
_BLOCK_WORDS: Final = 1 << 16
"""Words turned into float64 at a time: half a MiB stays in the cache. OpenBLAS does not share out a product of so few
among threads of its own: these spin for many times the work's length when others want the cores."""
_STREAMS: Final = 3
_FACTORS: Final = 4  # columns of weights in a product, one of them zero: BLAS has fast kernels for four, none for three
_ROW_SEED: Final = 0x1000


@dataclass(frozen=True, slots=True)
class PartialFingerprint:
    """The sums over some boxes of a tensor; adding those of disjoint boxes that cover it gives the whole's."""

    sums: tuple[int, int, int] = (0, 0, 0)

    def __add__(self, other: PartialFingerprint) -> PartialFingerprint:
        a, b, c = ((x + y) % _PRIME for x, y in zip(self.sums, other.sums, strict=True))
        return PartialFingerprint((a, b, c))

    def finish(self, tensor: LogicalTensor) -> str:
        """The fingerprint as text, 32 hexadecimal digits, once the sums cover `tensor`."""
        kind = hashlib.blake2s(f"{tensor.dtype} {list(tensor.shape)}".encode(), digest_size=4).hexdigest()
        return "".join(f"{value:08x}" for value in self.sums) + kind


def box_fingerprint(tensor: LogicalTensor, box: Box, array: np.ndarray) -> PartialFingerprint:
    """The part that the elements of `box`, given in storage dtype, add to the fingerprint of `tensor`."""
    if not array.size:
        return PartialFingerprint()
    words, words_per_element = _words(array.reshape(-1, array.shape[-1]) if array.ndim else array.reshape(1, 1))
    first_column = (box.offset[-1] if box.offset else 0) * words_per_element
    inner = np.zeros((_STREAMS, words.shape[0]), np.uint64)
    for columns, weights in _column_blocks(first_column, words.shape[1]):
        inner = _folded(inner + _row_sums(words[:, columns], weights))
    outer = _folded(inner * _row_weights(_row_indices(tensor.shape, box)))
    a, b, c = (int(value) % _PRIME for value in outer.sum(axis=1, dtype=np.uint64))
    return PartialFingerprint((a, b, c))


def _row_sums(words: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The sum of each row's words times the weights of its columns, for each stream; below 2**52, so exact."""
    rows, count = words.shape
    width = min(_BLOCK_COLUMNS, count)
    height = min(_BLOCK_WORDS // width, rows)
    memory, sums = np.empty(height * width), np.zeros((rows, _FACTORS))
    for column in range(0, count, width):
        factors = weights[column : min(column + width, count)]
        for row in range(0, rows, height):
            taken = words[row : row + height, column : column + width]
            block = memory[: taken.size].reshape(taken.shape)
            np.copyto(block, taken)
            sums[row : row + height] += np.dot(block, factors)  # which, unlike matmul, lets other threads run meanwhile
    return sums[:, :_STREAMS].T.astype(np.uint64)


def _folded(values: np.ndarray) -> np.ndarray:
    """Smaller numbers of the same remainders: 2**31 is 1 modulo the prime."""
    return (values & np.uint64(_PRIME)) + (values >> np.uint64(31))


def fingerprint(tensor: LogicalTensor, parts: Iterable[PartialFingerprint]) -> str:
    """The fingerprint of a tensor from the parts of the boxes that cover it."""
    return sum(parts, PartialFingerprint()).finish(tensor)


def _words(matrix: np.ndarray) -> tuple[np.ndarray, int]:
    """The matrix as 16-bit words (bytes, for one-byte elements), and how many words an element has."""
    size = matrix.dtype.itemsize
    if matrix.strides[1] != size:
        matrix = np.ascontiguousarray(matrix)
    if size == 1:
        return matrix.view(np.uint8), 1
    return matrix.view("<u2"), size // 2


def _row_indices(shape: tuple[int, ...], box: Box) -> np.ndarray:
    """Index of each row of the box among the rows of the whole tensor."""
    found = np.zeros(1, np.uint64)
    for length, offset, size in zip(shape[:-1], box.offset[:-1], box.size[:-1], strict=True):
        here = np.arange(offset, offset + size, dtype=np.uint64)
        found = (found[:, None] * np.uint64(length) + here[None, :]).reshape(-1)
    return found


def _column_blocks(first: int, count: int) -> Iterable[tuple[slice, np.ndarray]]:
    """Slices of a box's columns that each lie in one block of weights, with the weights."""
    done = 0
    while done < count:
        block, inside = divmod(first + done, _COLUMN_BLOCK)
        size = min(count - done, _COLUMN_BLOCK - inside)
        yield slice(done, done + size), _column_weights(block)[inside : inside + size]
        done += size


@lru_cache(maxsize=16)
def _column_weights(block: int) -> np.ndarray:
    """Weights of the columns of a block, for each stream and a column of zeros: float64, integers of 20 bits."""
    index = np.arange(block * _COLUMN_BLOCK, (block + 1) * _COLUMN_BLOCK, dtype=np.uint64)
    weights = np.zeros((_COLUMN_BLOCK, _FACTORS))
    for seed in range(_STREAMS):
        weights[:, seed] = _mix(index, seed) >> np.uint64(44) | np.uint64(1)  # never zero
    return weights


def _row_weights(rows: np.ndarray) -> np.ndarray:
    """Weights of rows by their index, for each stream: integers in [1, 2**31 - 1)."""
    streams = [_mix(rows, _ROW_SEED + seed) % np.uint64(_PRIME - 1) + np.uint64(1) for seed in range(_STREAMS)]
    return np.stack(streams)


def _mix(index: np.ndarray, seed: int) -> np.ndarray:
    """Pseudo-random 64-bit integers from indices: SplitMix64 (Steele, Lea, Flood 2014), one stream per seed."""
    state = index * np.uint64(0x9E3779B97F4A7C15) + np.uint64((seed + 1) * 0xD1B54A32D192ED03 % (1 << 64))
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
