"""A fine-tuning run on this rank: a base and a task made into what the training engine trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from finetune.adapter import require_fit
from finetune.adapters._lora_layers import fill_magnitudes
from finetune.config import FinetuneConfig, adapter_of, task_of
from finetune.objective import TaskObjective, evaluations
from finetune.packing import packed, packing_faults
from finetune.reference import with_reference, with_saved_reference
from finetune.task import Prepared, TaskTable
from pretrain.engine import Pipeline, RunResult, Subject, Trainer, Watcher, evaluate, length_faults, schedule_named
from workbench.checkpoint.source import TensorSource
from workbench.errors import ConfigError, DataError
from workbench.models.build import build_stage, initialise
from workbench.models.decoder import DecoderStage
from workbench.models.state import load, load_packed, stored_boxes
from workbench.parallel.live import LiveParameter
from workbench.parallel.mesh import Mesh
from workbench.spec.lora import AdapterRecord, is_factor
from workbench.spec.model import ModelConfig
from workbench.spec.schema import logical_tensors, predicts_words
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
        prepared: Prepared | None = None,
    ) -> None:
        """Reads and checks the data, unless it is given `prepared`; builds the model and fills it from the base, or
        resumes the run's folder.

        Raises ConfigError, DataError or CheckpointError before anything is trained.
        """
        self.config, self.base, self._dtype = config, base, dtype
        self._watcher = watcher if mesh.world.rank == 0 else None
        tokenizer = tokenizer_of(base, config.tokenizer)
        self.prepared = prepared or prepare(config, base.model, tokenizer)
        self.model = tuned_model(base.model, self.prepared)
        adapter = self._adapter = adapter_of(config)
        require_fit(adapter, config.method, config, self.model)
        self.record: AdapterRecord | None = adapter.record(
            config.method, base=base.path, base_fingerprint=base.fingerprint
        )
        subject = Subject(
            self.model,
            fill=self._fill,
            adapt=self._adapt,
            tokenizer=tokenizer.path,
            lineage=base.lineage,
            adapter=self.record,
            rate=lambda spec: adapter.rate(config.method, self.model, spec),
        )
        self._objective = self._objective_of_rows()
        self.trainer = Trainer(config, subject, self._objective, mesh, watcher=watcher, dtype=dtype)
        if self.prepared.reference:
            self.prepared = self._with_reference()
            self.trainer.objective = self._objective = self._objective_of_rows()

    def run(self) -> RunResult:
        """Trains, judges by the valid rows while training, and by the test rows at the end."""
        result = self.trainer.run()
        if result.interrupted:
            return result
        found = {**self.test(), **self.controls()}
        if found and self._watcher is not None:
            self._watcher.measured({"step": result.step, "tokens": result.tokens, **found})
        return replace(result, metrics={**result.metrics, **found})

    def test(self) -> dict[str, float]:
        """Metrics over the test rows, by `test/<metric>`; none when the task names no test rows."""
        return judge(self.trainer.pipeline, self.prepared, self.config.batch.micro_size, names=("test",))

    def controls(self) -> dict[str, float]:
        """The same for the same model trained whole and as long from initial weights, where the task asks for it."""
        if not self.config.task.controls:
            return {}
        run = self.config.run.model_copy(update={"dir": str(Path(self.config.run.dir) / "from-scratch")})
        config = self.config.model_copy(update={"run": run})
        subject = Subject(self.model, fill=lambda new: initialise(new, self.model, seed=run.seed), adapt=self._freeze)
        trainer = Trainer(config, subject, self._objective, self.trainer.mesh, dtype=self._dtype)
        trainer.run()
        found = judge(trainer.pipeline, self.prepared, config.batch.micro_size, names=("test",))
        return {f"from_scratch/{name}": value for name, value in found.items()}

    @property
    def num_trained(self) -> int:
        """Logical elements that are trained, over all ranks. Collective over the mesh."""
        built = self.trainer.built
        boxes = stored_boxes([parameter for parameter in built.parameters if parameter.trainable])
        here = torch.tensor(sum(stored.box.numel for stored in boxes), device=built.module.mesh.device)
        return int(built.module.mesh.world.all_reduce(here))

    def _adapt(self, stage: DecoderStage) -> None:
        self._stage = stage
        self._adapter.attach(self.config.method, stage)
        self._freeze(stage)

    def _freeze(self, stage: DecoderStage) -> None:
        """Of a body without heads the pooler, which nothing reads."""
        if not self.model.lm_head and stage.has_head and self.model.pooler:
            stage.pooler.requires_grad_(False)

    def _objective_of_rows(self) -> TaskObjective:
        tokens, seed = self.config.packed_tokens, self.config.task.seed
        return TaskObjective(self.prepared if tokens is None else packed(self.prepared, tokens, seed=seed), seed=seed)

    def _with_reference(self) -> Prepared:
        begins = self.trainer.state.step == 0
        return with_reference(
            self.prepared,
            self.trainer.pipeline,
            Path(self.config.run.dir),
            micro_size=self.config.batch.micro_size,
            begins=begins,
            is_base=begins or self.record is not None,
        )

    def _fill(self, parameters: list[LiveParameter]) -> None:
        """The base's values, and initial ones for what the base does not have: adapters and a new head."""
        new = [parameter for parameter in parameters if self._is_new(parameter)]
        load([parameter for parameter in parameters if not self._is_new(parameter)], self.base.source)
        load_packed(self._stage, self.base.source)
        initialise(new, self.model, seed=self.config.run.seed)
        fill_magnitudes(new, self.base.source)

    def _is_new(self, parameter: LiveParameter) -> bool:
        names = [part.name for part in parameter.spec.parts]
        if all(map(is_factor, names)):
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
    config: FinetuneConfig,
    model: ModelConfig,
    source: TensorSource,
    tokenizer: Path | None,
    mesh: Mesh,
    *,
    prepared: Prepared | None = None,
) -> dict[str, float]:
    """Metrics of a model over the task's held-out rows, by `<name>/<metric>`; the data is read unless it is given
    `prepared`. Collective over the mesh."""
    base = Base(model, source, tokenizer, config.base, "")
    prepared = prepared or prepare(config, model, tokenizer_of(base, config.tokenizer))
    if not prepared.held_out:
        raise DataError("[task] names neither test nor valid rows, so there is nothing to judge by; give task.test")
    needed = tuned_model(model, prepared)
    if (needed.num_labels, needed.label_tokens) != (model.num_labels, model.label_tokens):
        raise ConfigError(
            f"the checkpoint has {_head_words(model)}, but the task {config.task.kind!r} needs {_head_words(needed)}; "
            "give the checkpoint that was tuned for this task"
        )
    if prepared.reference:
        prepared = with_saved_reference(prepared, Path(config.run.dir), mesh)
    built = build_stage(model, mesh)
    load(built.parameters, source)
    pipeline = Pipeline(built, mesh, schedule_named(config.parallel.schedule))
    return judge(pipeline, prepared, config.batch.micro_size)


def prepare(config: FinetuneConfig, model: ModelConfig, tokenizer: Tokenizer) -> Prepared:
    """The task's data, encoded and checked against the model."""
    faults = length_faults(model, config.batch.seq_len)
    if faults := faults + (packing_faults(model, config.batch.seq_len) if config.batch.packing else []):
        raise ConfigError("; ".join(faults))
    if tokenizer.vocab_size > model.vocab_size:
        raise DataError(
            f"{tokenizer.path}: gives ids up to {tokenizer.vocab_size - 1}, but the model's vocab_size is "
            f"{model.vocab_size}; use the tokenizer that the model was trained with"
        )
    table: TaskTable = config.task
    return task_of(config).prepare(table, tokenizer, model=model, max_tokens=config.batch.seq_len)


def tuned_model(base: ModelConfig, prepared: Prepared) -> ModelConfig:
    """The base with the head that the task needs; ConfigError when it cannot have it."""
    if base.num_encoder_layers:
        raise ConfigError(
            f"the base has an encoder (num_encoder_layers={base.num_encoder_layers}), for which no task makes rows "
            "yet; use a base without one"
        )
    if prepared.num_labels:
        # transformers finds the last token of a padded row by this id, and refuses batches without it.
        pad = prepared.pad_id if base.pad_token_id is None else base.pad_token_id
        tuned = base.with_labels(
            prepared.num_labels, of_tokens=prepared.label_tokens, problem_type=prepared.problem_type
        )
        return tuned.model_copy(update={"pad_token_id": pad})
    if prepared.words is None:
        return base.without_heads()
    if prepared.words == "next" and not base.causal:
        raise ConfigError(
            "the base sees the tokens after each as well (causal=false) and cannot learn to go on with a text; use a "
            "task that labels texts, or a base with causal = true"
        )
    if prepared.words == "hidden" and base.causal:
        raise ConfigError(
            "the base sees only the tokens before each (causal=true) and cannot tell hidden words; use the task 'lm', "
            "or a base with causal = false"
        )
    if not predicts_words(base):
        raise ConfigError(
            f"the base has {_head_words(base)} in place of its language-model head, which this task needs; start from "
            "the model that it was tuned from"
        )
    # Pairs of segments are for pretraining; a task has none.
    return base.model_copy(update={"next_sentence": False, "pooler": False})


def _head_words(model: ModelConfig) -> str:
    if not model.num_labels:
        return "the language-model head" if model.lm_head else "no head"
    return f"a head of {model.num_labels} labels" + (" for every token" if model.label_tokens else "")


def tokenizer_of(base: Base, given: str | None) -> Tokenizer:
    """The tokenizer that the configuration names, else the one that lies with the base."""
    if given is not None:
        return Tokenizer.load(given)
    if base.tokenizer is None:
        raise DataError(f"{base.path}: holds no tokenizer; name one: tokenizer = 'a folder with tokenizer.json'")
    return Tokenizer.load(base.tokenizer)
