"""PyCoLA: is this statement valid Python? A balanced task, divided by file; after CoLA (Warstadt et al. 2019).

Every statement appears once, either as it stands in its file (label 1) or corrupted by one token (label 0). Test
statements come from the embedded corpus's test files and occur in none of its training files.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.data.statements import Statement, StatementPool, corrupt, ranked
from workbench.errors import DataError


@dataclass(frozen=True)
class Example:
    """`label` 1: `text` parses; 0: it does not. `file` and `line` say where its statement stands."""

    text: str
    label: int
    file: str
    line: int


@dataclass(frozen=True)
class PyCoLA:
    """The two halves; no file has examples in both."""

    train: tuple[Example, ...]
    test: tuple[Example, ...]


def pycola(pool: StatementPool, *, num_train: int = 12_000, num_test: int = 2_000, seed: int = 0) -> PyCoLA:
    """The task, the same for the same corpus and seed. DataError when the corpus has fewer statements."""
    return PyCoLA(
        train=_examples(pool.train, count=num_train, seed=seed, split="train"),
        test=_examples(pool.held_out, count=num_test, seed=seed, split="test"),
    )


def _examples(found: Sequence[Statement], *, count: int, seed: int, split: str) -> tuple[Example, ...]:
    """Statements by rank, every other one corrupted. One that cannot be corrupted is left out of both classes."""
    examples: list[Example] = []
    for statement in ranked(found, seed=seed):
        if len(examples) == count:
            break
        corruption = corrupt(statement.text, key=f"seed {seed}/{statement.text}")
        if corruption is not None:
            label = len(examples) % 2
            examples.append(
                Example(statement.text if label else corruption.text, label, statement.file, statement.line)
            )
    if len(examples) < count:
        raise DataError(
            f"stdlib: its {split} files yield {len(examples)} statements, not {count}; ask for at most that many"
        )
    return tuple(examples)
