"""A fine-tuning run on this rank: a base and a task made into what the training engine trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from finetune.config import FinetuneConfig, adapter_of, task_of
from finetune.objective import TaskObjective, evaluations
from finetune.reference import with_reference, with_saved_reference
from finetune.task import Prepared, TaskTable
from pretrain.engine import Pipeline, RunResult, Subject, Trainer, Watcher, evaluate, length_faults, schedule_named
from workbench.checkpoint.source import TensorSource
from workbench.errors import ConfigError, DataError
from workbench.models.build import build_stage, initialise
from workbench.models.state import load
from workbench.parallel.live import LiveParameter
from workbench.parallel.mesh import Mesh
from workbench.spec.lora import A_SUFFIX, B_SUFFIX, AdapterRecord, adapter_tensors
from workbench.spec.model import ModelConfig
from workbench.spec.schema import logical_tensors, num_parameters
from workbench.tokenizer import Tokenizer


@dataclass(frozen=True)
class Base:
    """What a run starts from. path: as the user gave it. fingerprint: one digest of all its weights."""

    model: ModelConfig
    source: TensorSource
    tokenizer: Path | None
    path: str
    fingerprint: str
    lineage: Sequence[Mapping[str, Any]] = ()


class Finetuning:
    """One fine-tuning run on this rank; every rank makes one and calls `run`. Collective over the mesh throughout."""

    def __init__(
        self,
        config: FinetuneConfig,
        base: Base,
        mesh: Mesh,
        *,
        watcher: Watcher | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Reads and checks the data, builds the model and fills it from the base, or resumes the run's folder.

        Raises ConfigError, DataError or CheckpointError before anything is trained.
        """
        self.config, self.base = config, base
        self._watcher = watcher if mesh.world.rank == 0 else None
        tokenizer = tokenizer_of(base, config.tokenizer)
        self.prepared = prepare(config, base.model, tokenizer)
        self.model = tuned_model(base.model, self.prepared)
        adapter = adapter_of(config)
        adapter.check(config.method, self.model)
        self.record: AdapterRecord | None = adapter.record(
            config.method, base=base.path, base_fingerprint=base.fingerprint
        )
        subject = Subject(
            self.model,
            fill=self._fill,
            adapt=lambda stage: adapter.attach(config.method, stage),
            tokenizer=tokenizer.path,
            lineage=base.lineage,
            adapter=self.record,
        )
        self.trainer = Trainer(config, subject, self._objective(), mesh, watcher=watcher, dtype=dtype)
        if self.prepared.reference:
            begins = self.trainer.state.step == 0
            self.prepared = with_reference(
                self.prepared,
                self.trainer.pipeline,
                Path(config.run.dir),
                micro_size=config.batch.micro_size,
                begins=begins,
                is_base=begins or self.record is not None,
            )
            self.trainer.objective = self._objective()

    def run(self) -> RunResult:
        """Trains, judges by the valid rows while training, and by the test rows at the end."""
        result = self.trainer.run()
        if result.interrupted:
            return result
        found = self.test()
        if found and self._watcher is not None:
            self._watcher.measured({"step": result.step, "tokens": result.tokens, **found})
        return replace(result, metrics={**result.metrics, **found})

    def test(self) -> dict[str, float]:
        """Metrics over the test rows, by `test/<metric>`; none when the task names no test rows."""
        return judge(self.trainer.pipeline, self.prepared, self.config.batch.micro_size, names=("test",))

    @property
    def num_trained(self) -> int:
        """Logical elements that are trained, over all ranks."""
        if self.record is None:
            return num_parameters(self.model)
        return sum(tensor.numel for tensor in adapter_tensors(self.model, self.record.lora, "F32").values())

    def _objective(self) -> TaskObjective:
        return TaskObjective(self.prepared, seed=self.config.task.seed)

    def _fill(self, parameters: list[LiveParameter]) -> None:
        """The base's values, and initial ones for what the base does not have: adapters and a new head."""
        new = [parameter for parameter in parameters if self._is_new(parameter)]
        load([parameter for parameter in parameters if not self._is_new(parameter)], self.base.source)
        initialise(new, self.model, seed=self.config.run.seed)

    def _is_new(self, parameter: LiveParameter) -> bool:
        names = [part.name for part in parameter.spec.parts]
        if all(name.endswith((A_SUFFIX, B_SUFFIX)) for name in names):
            return True
        ours, theirs = (logical_tensors(model, "F32") for model in (self.model, self.base.model))
        return all(theirs.get(name) != ours[name] for name in names)


def judge(
    pipeline: Pipeline, prepared: Prepared, micro_size: int, *, names: Sequence[str] = ("valid", "test")
) -> dict[str, float]:
    """Metrics over the held-out rows called `names`, by `<name>/<metric>`. Collective over the mesh."""
    found = {}
    pipeline.stage.eval()
    for evaluation in evaluations(prepared, names):
        metrics = evaluate(pipeline, evaluation, micro_size=micro_size, num_microbatches=1)
        found.update({f"{evaluation.name}/{name}": value for name, value in metrics.items()})
    pipeline.stage.train()
    return found


def evaluate_model(
    config: FinetuneConfig, model: ModelConfig, source: TensorSource, tokenizer: Path | None, mesh: Mesh
) -> dict[str, float]:
    """Metrics of a model over the task's held-out rows, by `<name>/<metric>`. Collective over the mesh."""
    base = Base(model, source, tokenizer, config.base, "")
    prepared = prepare(config, model, tokenizer_of(base, config.tokenizer))
    if not prepared.held_out:
        raise DataError("[task] names neither test nor valid rows, so there is nothing to judge by; give task.test")
    if prepared.num_labels != model.num_labels:
        raise ConfigError(
            f"the checkpoint has a head of {model.num_labels or 'no'} labels, but the task "
            f"{config.task.kind!r} needs {prepared.num_labels or 'the language-model head'}; give the checkpoint that "
            "was tuned for this task"
        )
    if prepared.reference:
        prepared = with_saved_reference(prepared, Path(config.run.dir), mesh)
    tuned_model(model, prepared)  # refuses a model that the task's rows do not suit
    built = build_stage(model, mesh)
    load(built.parameters, source)
    pipeline = Pipeline(built, mesh, schedule_named(config.parallel.schedule))
    return judge(pipeline, prepared, config.batch.micro_size)


def prepare(config: FinetuneConfig, model: ModelConfig, tokenizer: Tokenizer) -> Prepared:
    """The task's data, encoded and checked against the model."""
    if faults := length_faults(model, config.batch.seq_len):
        raise ConfigError("; ".join(faults))
    if tokenizer.vocab_size > model.vocab_size:
        raise DataError(
            f"{tokenizer.path}: gives ids up to {tokenizer.vocab_size - 1}, but the model's vocab_size is "
            f"{model.vocab_size}; use the tokenizer that the model was trained with"
        )
    table: TaskTable = config.task
    return task_of(config).prepare(table, tokenizer, max_tokens=config.batch.seq_len)


def tuned_model(base: ModelConfig, prepared: Prepared) -> ModelConfig:
    """The base with the head that the task needs; ConfigError when it has lost its language-model head."""
    if base.num_encoder_layers:
        raise ConfigError(
            f"the base has an encoder (num_encoder_layers={base.num_encoder_layers}), for which no task makes rows "
            "yet; use a base without one"
        )
    if prepared.num_labels:
        # transformers finds the last token of a padded row by this id, and refuses batches without it.
        pad = prepared.pad_id if base.pad_token_id is None else base.pad_token_id
        words = {"lm_head": True, "head_transform": False, "lm_head_bias": False, "next_sentence": False}
        # Where no token comes last by what it has seen, the first one speaks, by way of the pooler.
        heads = {**words, "pooler": not base.causal, "num_labels": prepared.num_labels}
        return base.model_copy(update={**heads, "pad_token_id": pad})
    if not base.causal:
        raise ConfigError(
            "the base sees the tokens after each as well (causal=false) and cannot learn to go on with a text; use a "
            "task that labels texts, or a base with causal = true"
        )
    if base.num_labels:
        raise ConfigError(
            f"the base has a head of {base.num_labels} labels in place of its language-model head, which this task "
            "needs; start from the model that it was tuned from"
        )
    return base


def tokenizer_of(base: Base, given: str | None) -> Tokenizer:
    """The tokenizer that the configuration names, else the one that lies with the base."""
    if given is not None:
        return Tokenizer.load(given)
    if base.tokenizer is None:
        raise DataError(f"{base.path}: holds no tokenizer; name one: tokenizer = 'a folder with tokenizer.json'")
    return Tokenizer.load(base.tokenizer)
