"""What a task is to a fine-tuning run: rows of text turned into labelled examples, and a judge of outputs. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal, Protocol, Self

import numpy as np
from pydantic import BeforeValidator, Field, model_validator

from finetune.rows import Row, places, read_rows
from finetune.shapes import Shape, recognise
from workbench.config import Config
from workbench.errors import DataError
from workbench.registry import discover
from workbench.spec.model import ModelConfig, ProblemType

if TYPE_CHECKING:
    import torch

    from pretrain.engine import Criterion
    from workbench.models.batch import Batch
    from workbench.models.decoder import Output
    from workbench.tokenizer import Tokenizer

IGNORE: Final = -100


def _as_paths(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


TooLong = Literal["truncate", "drop", "error"]
"""What becomes of rows that do not fit."""

Paths = Annotated[tuple[str, ...], BeforeValidator(_as_paths)]


class TaskTable(Config):
    """What every [task] table has."""

    packs: ClassVar[bool] = False
    """Whether several examples may share a row (batch.packing): each token is labelled, and sees those before it."""

    train: Paths = Field(
        min_length=1,
        description="What to learn: .jsonl, .json, .csv, .tsv, .parquet, a folder of them, hf:NAME[:CONFIG][:SPLIT]; "
        "one or a list.",
    )
    valid: Paths = Field(default=(), description="Rows to judge the model by while it trains.")
    test: Paths = Field(default=(), description="Rows to judge the model by once, at the end; `wb eval` reads these.")
    columns: dict[str, str] = Field(
        default={}, description='What columns of the rows are called, where not as expected: {prompt = "question"}.'
    )
    seed: int = Field(default=1234, ge=0, description="Decides the order of the training rows, and what they hide.")
    neftune_alpha: float = Field(
        default=0.0, ge=0, description="Noise on the embeddings while training (NEFTune); 5 is usual, 0 is none."
    )
    controls: bool = Field(
        default=False, description="Also train the same model from scratch, by as many steps, and judge it by test."
    )

    @model_validator(mode="after")
    def _has_test_rows(self) -> Self:
        if self.controls and not self.test:
            raise ValueError("controls = true is judged by test rows, but there are none; give test, or remove it")
        return self

    @property
    def keeps_steps_whole(self) -> bool:
        """Whether the loss of a row depends on all the others of its step."""
        return False


class LabelledTable(TaskTable):
    """What every [task] table has whose loss is a cross-entropy with labels."""

    label_smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="Share of each label that is spread evenly over all, while training."
    )


@dataclass(frozen=True)
class Example:
    """One row as numbers: input_ids [T]; labels [T], what is said of each token (by default which one follows), or [] a
    class number. segments, documents [T]: as in a batch. values: [] or [N] of float64, what the task's criterion and
    judge want to know of it, by name. place: where the row lies, 'train.jsonl:12'."""

    input_ids: np.ndarray
    labels: np.ndarray
    place: str = ""
    segments: np.ndarray | None = None
    documents: np.ndarray | None = None
    values: Mapping[str, np.ndarray | float] = field(default_factory=dict)

    @property
    def num_labels(self) -> int:
        """Labels that count."""
        return int(np.count_nonzero(self.labels != IGNORE))


class Judge(Protocol):
    """Metrics of a task. What microbatches add is put together over all ranks, then turned into metrics once."""

    @property
    def output(self) -> Output:
        """What the last stage computes for it."""
        ...

    def tally(self, batch: Batch, output: torch.Tensor) -> torch.Tensor:
        """What a microbatch adds to the sums, a float64 vector of fixed length; or a matrix, of which every row is
        kept. Rows of ignored labels add nothing."""
        ...

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        """Metrics from the sums over everything, or from all rows, one after the other in any order."""
        ...


@dataclass(frozen=True)
class Prepared:
    """A task's data, encoded and checked, and what it needs of a model.

    held_out: examples by the name of the evaluation (valid, test). num_labels: outputs of a head of labels, which reads
    every token (label_tokens) or one for the row, and what they mean (problem_type). Without such a head the model
    predicts `words`: the next ones or hidden ones; None: it ends with its last layer. group: so many rows in a row are
    one sample, stay in one microbatch and count as one. criterion: what is learned by; None for the summed loss of the
    model's own labels. reference: whether criterion and judge want the log-probability of each row under the base, as
    its value `reference`. vary: what a row is in the n-th place of the endless order. identity: JSON values that must
    not change between two parts of a run. notes: what the user should know of the data (rows that were cut, say).
    """

    train: Sequence[Example]
    held_out: Mapping[str, Sequence[Example]]
    judge: Judge
    num_labels: int
    pad_id: int
    identity: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    read_as: Mapping[str, str] = field(default_factory=dict)
    label_tokens: bool = False
    problem_type: ProblemType | None = None
    words: Literal["next", "hidden"] | None = "next"
    group: int = 1
    criterion: Criterion | None = None
    reference: bool = False
    vary: Callable[[Example, int], Example] | None = None


class Task(Protocol):
    """A kind of fine-tuning data. A module in `finetune/tasks/` exposes one as TASK; it imports torch late.

    `table` is the class of its [task] table, whose `kind` is the literal `name`.
    """

    @property
    def name(self) -> str: ...

    @property
    def table(self) -> type[TaskTable]: ...

    def prepare(self, table: Any, tokenizer: Tokenizer, *, model: ModelConfig, max_tokens: int) -> Prepared:
        """The data of `table` for the base `model` in at most `max_tokens` tokens a row; DataError names file and line
        of what is wrong."""
        ...


def tasks() -> dict[str, Task]:
    """Every task by name."""
    return discover("finetune.tasks", "TASK")


@dataclass(frozen=True)
class Data:
    """The rows of a task, and by the name of each part what was recognised in it."""

    train: list[Row]
    held_out: Mapping[str, list[Row]]
    read_as: Mapping[str, str]


def read(table: TaskTable, *shapes: Shape) -> Data:
    """The rows that a table names, each recognised as one of `shapes`; DataError for those that are not."""
    found = {
        name: recognise(read_rows(paths, columns=table.columns), shapes, columns=table.columns)
        for name, paths in {"train": table.train, **files_of(table)}.items()
    }
    rows = {name: one.rows for name, one in found.items()}
    return Data(rows.pop("train"), rows, {name: one.told for name, one in found.items()})


def files_of(table: TaskTable) -> dict[str, tuple[str, ...]]:
    """The files of each evaluation that the table asks for."""
    return {name: paths for name, paths in (("valid", table.valid), ("test", table.test)) if paths}


def pad_id_of(tokenizer: Tokenizer) -> int:
    """What fills a row at its end; any id will do, for padding is neither attended to nor predicted."""
    return next((found for found in (tokenizer.pad_id, tokenizer.eos_id) if found is not None), 0)


def eos_id_of(tokenizer: Tokenizer, *, otherwise: str = "never learn to stop") -> int:
    """What ends a text; DataError when the tokenizer names none. otherwise: what a model would do without it."""
    if tokenizer.eos_id is None:
        raise DataError(
            f"{tokenizer.path}: the tokenizer names no end-of-text token, so the model would {otherwise}; name an "
            "eos_token in its tokenizer_config.json"
        )
    return tokenizer.eos_id


def notes_of_too_long(rows: Sequence[Row], limit: int, too_long: TooLong) -> list[str]:
    """What the user should know of `rows`, which are longer than `limit` tokens; DataError when that is an error."""
    if not rows:
        return []
    what = f"{len(rows)} rows are longer than {limit} tokens ({places(rows)})"
    if too_long == "error":
        raise DataError(f"{what}; raise batch.seq_len, or set task.too_long = 'truncate' or 'drop'")
    return [f"{what}; they were {'cut' if too_long == 'truncate' else 'left out'}"]
