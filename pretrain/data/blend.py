"""Interleaving of weighted sources in exact proportions, answered for any single position without a table."""

from collections.abc import Sequence
from fractions import Fraction


class Blend:
    """Which source the n-th sample comes from, and which of that source's samples it is.

    Sources hang on a balanced binary tree. At a node whose left side has the share p, the left side has received
    floor(n * p) of the node's first n samples (a Beatty sequence), in exact rational arithmetic: every prefix holds
    each source in proportion to within one sample a level of the tree, and position n costs O(log sources).
    """

    def __init__(self, weights: Sequence[float]) -> None:
        assert weights and all(weight > 0 for weight in weights), weights
        # Through the decimal text, so that 0.3 means three tenths and not the float below it.
        exact = tuple(Fraction(str(weight)) for weight in weights)
        self.shares = tuple(weight / sum(exact) for weight in exact)
        self._splits: dict[tuple[int, int], tuple[int, int, int]] = {}
        self._grow(0, len(exact))

    def _grow(self, low: int, high: int) -> None:
        if high - low < 2:
            return
        middle = (low + high) // 2
        share = sum(self.shares[low:middle], Fraction(0)) / sum(self.shares[low:high], Fraction(0))
        self._splits[low, high] = (middle, share.numerator, share.denominator)
        self._grow(low, middle)
        self._grow(middle, high)

    def __call__(self, position: int) -> tuple[int, int]:
        """(source, index within the source's own samples) of the sample at `position`."""
        low, high = 0, len(self.shares)
        while high - low > 1:
            middle, numerator, denominator = self._splits[low, high]
            before = position * numerator // denominator
            if (position + 1) * numerator // denominator > before:
                position, high = before, middle
            else:
                position, low = position - before, middle
        return low, position
