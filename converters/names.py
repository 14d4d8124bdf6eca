"""Names of many tensors in few words, for people."""

from __future__ import annotations

import re
from collections.abc import Iterable


def fold(name: str) -> str:
    """`name` with every number between dots, a layer or an expert, as `*`."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def summarise(names: Iterable[str], one: str, many: str) -> str:
    """Names with a verb, layers and experts folded: `32 tensors 'layers.*.q_norm.weight' have`."""
    counts: dict[str, int] = {}
    for name in names:
        pattern = fold(name)
        counts[pattern] = counts.get(pattern, 0) + 1
    shown = [f"{n} tensors {pattern!r}" if n > 1 else f"tensor {pattern!r}" for pattern, n in sorted(counts.items())]
    more = f" and {len(shown) - 6} more kinds" if len(shown) > 6 else ""
    return f"{', '.join(shown[:6])}{more} {many if sum(counts.values()) > 1 else one}"
