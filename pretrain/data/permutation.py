"""A keyed permutation of range(size) that answers any single position in constant time and holds no table.

An alternating Feistel network over Z_a x Z_b with a * b just above the size, and cycle walking for the few points
outside (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002, methods 2 and 3). The data order of a run is
this function, so the constants are part of what a resumed run relies on: they never change within a version.
"""

import hashlib
import math

_MASK = (1 << 64) - 1
_ROUNDS = 8


class Permutation:
    """A bijection of range(size), decided by `key` alone."""

    def __init__(self, size: int, *, key: str) -> None:
        assert size > 0, size
        self.size = size
        # a * b >= size with a, b about its square root: a walk leaves the domain with probability about 1 / sqrt(size).
        self._left = math.isqrt(size - 1) + 1
        self._right = -(-size // self._left)
        digest = hashlib.blake2b(key.encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS))

    def __call__(self, position: int) -> int:
        """The element at `position`, for 0 <= position < size."""
        assert 0 <= position < self.size, (position, self.size)
        point = self._network(position)
        while point >= self.size:
            point = self._network(point)
        return point

    def _network(self, point: int) -> int:
        left, right = divmod(point, self._right)
        keys = iter(self._keys)
        for key in keys:
            left = (left + _mix(right ^ key)) % self._left
            right = (right + _mix(left ^ next(keys))) % self._right
        return left * self._right + right


def _mix(value: int) -> int:
    """A 64-bit hash of a 64-bit value (the finalizer of splitmix64, Steele et al. 2014)."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
