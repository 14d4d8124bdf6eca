"""PyBLiMP: minimal pairs of a real Python statement and a one-token corruption of it that does not parse.

A model is scored by how often it gives the real statement the lower mean loss a token, without any training for it;
after BLiMP (Warstadt et al. 2020). The statements come from held-out files of the embedded corpus and occur in none of
its training files.
"""

from dataclasses import dataclass

from pretrain.data.statements import StatementPool, corrupt, ranked
from workbench.errors import DataError


@dataclass(frozen=True)
class MinimalPair:
    """`good` parses, `bad` does not; `kind` is delete, duplicate or swap, `file` and `line` say where `good` stands."""

    good: str
    bad: str
    kind: str
    file: str
    line: int


def minimal_pairs(pool: StatementPool, *, count: int = 1000, seed: int = 0) -> list[MinimalPair]:
    """`count` pairs, the same for the same corpus and seed. DataError when the held-out files have fewer."""
    pairs: list[MinimalPair] = []
    for statement in ranked(pool.held_out, seed=seed):
        if len(pairs) == count:
            break
        corruption = corrupt(statement.text, key=f"seed {seed}/{statement.text}")
        if corruption is not None:
            pairs.append(MinimalPair(statement.text, corruption.text, corruption.kind, statement.file, statement.line))
    if len(pairs) < count:
        raise DataError(
            f"stdlib: its held-out files yield {len(pairs)} minimal pairs, not {count}; ask for at most that many"
        )
    return pairs
