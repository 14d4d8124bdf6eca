"""The configuration of a fine-tuning run: that of a training run, with a base, a task and a method. No torch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Self

from pydantic import Field, model_validator

from finetune.adapter import Adapter, adapters
from finetune.adapters.lora import LoraTable
from finetune.task import LabelledTable, Task, TaskTable, tasks
from pretrain.config import BatchTable, EngineConfig
from workbench.config import Config, table_by_kind
from workbench.spec.execution import Backend, FrozenFormat, StageOptions

if TYPE_CHECKING:

    class AnyTask(TaskTable):
        kind: str

    class AnyMethod(Config):
        kind: str
else:
    AnyTask = table_by_kind({name: task.table for name, task in tasks().items()})
    AnyMethod = table_by_kind({name: adapter.table for name, adapter in adapters().items()})


class FinetuneBatch(BatchTable):
    """How many rows make a step, and whether examples share them."""

    packing: bool = Field(
        default=False,
        description="Put several examples into a row of seq_len tokens, where they do not see each other; global_size "
        "then counts such rows.",
    )


class FinetuneConfig(EngineConfig):
    """A run that starts from the weights of another."""

    base: str = Field(
        min_length=1, description="What to start from: a checkpoint, a run folder or a Hugging Face folder."
    )
    tokenizer: str | None = Field(
        default=None, description="Tokenizer folder; by default the one that lies with the base."
    )
    batch: FinetuneBatch = FinetuneBatch()
    task: AnyTask = Field(description="What to learn: kind, files.")
    method: AnyMethod = Field(description="How to learn it: kind = full, freeze or lora, and its settings.")

    @property
    def keeps_documents_apart(self) -> bool:
        return self.batch.packing

    @property
    def packed_tokens(self) -> int | None:
        """Tokens of the rows that examples share; None when each has its own."""
        return self.batch.seq_len if self.batch.packing else None

    @property
    def keeps_steps_whole(self) -> bool:
        return self.task.keeps_steps_whole

    def stage_options(self, backend: Backend) -> StageOptions:
        smoothing = self.task.label_smoothing if isinstance(self.task, LabelledTable) else 0.0
        options = super().stage_options(backend)
        frozen: FrozenFormat = self.method.frozen_format if isinstance(self.method, LoraTable) else "plain"
        noise = self.task.neftune_alpha
        return replace(options, label_smoothing=smoothing, embedding_noise=noise, frozen_format=frozen)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        found = self.batch.faults(self.parallel.dp) if self.parallel.dp != "auto" else []
        steps = self.planned_steps()
        if steps and self.optim.warmup > steps:
            found.append(f"optim.warmup={self.optim.warmup} is longer than the run of {steps} steps; lower it")
        if self.batch.packing and not self.task.packs:
            able = ", ".join(name for name, task in tasks().items() if task.table.packs)
            found.append(
                f"batch.packing=true: examples of task {self.task.kind!r} cannot share a row (those of {able} can); "
                "remove it"
            )
        if found:
            raise ValueError("; ".join(found))
        return self


def task_of(config: FinetuneConfig) -> Task:
    """The task that the [task] table describes."""
    return next(task for task in tasks().values() if isinstance(config.task, task.table))


def adapter_of(config: FinetuneConfig) -> Adapter:
    """The adapter that the [method] table describes."""
    return next(adapter for adapter in adapters().values() if isinstance(config.method, adapter.table))
