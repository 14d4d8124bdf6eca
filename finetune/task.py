"""What a task is to a fine-tuning run: rows of text turned into labelled examples, and a judge of outputs. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Protocol

import numpy as np
from pydantic import BeforeValidator, Field

from workbench.config import Config
from workbench.registry import discover

if TYPE_CHECKING:
    import torch

    from pretrain.engine import Criterion
    from workbench.models.batch import Batch
    from workbench.tokenizer import Tokenizer

IGNORE: Final = -100


def _as_paths(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Paths = Annotated[tuple[str, ...], BeforeValidator(_as_paths)]


class TaskTable(Config):
    """What every [task] table has."""

    train: Paths = Field(min_length=1, description="JSON-lines files to train on: a path or a list of paths.")
    valid: Paths = Field(default=(), description="Rows to judge the model by while it trains.")
    test: Paths = Field(default=(), description="Rows to judge the model by once, at the end; `wb eval` reads these.")
    seed: int = Field(default=1234, ge=0, description="Decides the order of the training rows, alone.")


@dataclass(frozen=True)
class Example:
    """One row as numbers: input_ids [T]; labels [T], the token that follows each position, or [] a class number; values
    that the task's criterion and judge want to know of it, by name."""

    input_ids: np.ndarray
    labels: np.ndarray
    values: Mapping[str, float] = field(default_factory=dict)

    @property
    def num_labels(self) -> int:
        """Labels that count."""
        return int(np.count_nonzero(self.labels != IGNORE))


class Judge(Protocol):
    """Metrics of a task. Sums are added over microbatches and ranks, then turned into metrics once."""

    @property
    def output(self) -> Literal["loss", "token_losses", "logits"]:
        """What the last stage computes for it."""
        ...

    def tally(self, batch: Batch, output: torch.Tensor) -> torch.Tensor:
        """What a microbatch adds to the sums, a float64 vector of fixed length; rows of ignored labels add nothing."""
        ...

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        """Metrics from the sums over everything."""
        ...


@dataclass(frozen=True)
class Prepared:
    """A task's data, encoded and checked.

    held_out: examples by the name of the evaluation (valid, test). num_labels: outputs of the sequence head, 0 for the
    language-model head. identity: JSON values that must not change between two parts of a run. notes: what the user
    should know of the data (rows that were cut, say). criterion: what is learned by; by default the summed loss of all
    labels. group: rows that belong together and stay in one microbatch, where they count as one. reference: whether
    criterion and judge want the log-probability of each row under the base, as its value `reference`.
    """

    train: Sequence[Example]
    held_out: Mapping[str, Sequence[Example]]
    judge: Judge
    num_labels: int
    pad_id: int
    identity: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    criterion: Criterion | None = None
    group: int = 1
    reference: bool = False


class Task(Protocol):
    """A kind of fine-tuning data. A module in `finetune/tasks/` exposes one as TASK; it imports torch late.

    `table` is the class of its [task] table, whose `kind` is the literal `name`.
    """

    @property
    def name(self) -> str: ...

    @property
    def table(self) -> type[TaskTable]: ...

    def prepare(self, table: Any, tokenizer: Tokenizer, *, max_tokens: int) -> Prepared:
        """The data of `table` in at most `max_tokens` tokens a row; DataError names file and line of what is wrong."""
        ...


def tasks() -> dict[str, Task]:
    """Every task by name."""
    return discover("finetune.tasks", "TASK")


def files_of(table: TaskTable) -> dict[str, tuple[str, ...]]:
    """The files of each evaluation that the table asks for."""
    return {name: paths for name, paths in (("valid", table.valid), ("test", table.test)) if paths}


def pad_id_of(tokenizer: Tokenizer) -> int:
    """What fills a row at its end; any id will do, for padding is neither attended to nor predicted."""
    return next((found for found in (tokenizer.pad_id, tokenizer.eos_id) if found is not None), 0)
