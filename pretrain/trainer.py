"""The trainer: builds a stage, fills or resumes it, and steps until the run is over."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from pretrain.checkpointing import Contents, load_training, save
from pretrain.config import EngineConfig
from pretrain.evaluation import evaluate
from pretrain.execution import choose_executor
from pretrain.flops import find_peak, flops_per_token
from pretrain.interrupt import StopSignal
from pretrain.judging import Standing, require_judge
from pretrain.loss_scale import LossScale
from pretrain.meter import Budget, Meter
from pretrain.objective import Objective, Share
from pretrain.optimizer import Optimizer, full_rate
from pretrain.pipeline import Pipeline
from pretrain.resume import find_checkpoint, require_same_adapter, require_same_run
from pretrain.schedules import schedule_named
from pretrain.step import StepResult, agree, train_step
from workbench.checkpoint.manifest import TrainingState
from workbench.checkpoint.reader import open_native
from workbench.checkpoint.store import CHECKPOINTS, Store
from workbench.errors import WorkbenchError
from workbench.models.build import build_stage
from workbench.models.decoder import DecoderStage
from workbench.parallel.determinism import make_deterministic
from workbench.parallel.host_memory import keep_freed_memory
from workbench.parallel.live import LiveParameter
from workbench.parallel.mesh import Mesh
from workbench.spec.geometry import ParameterSpec
from workbench.spec.lora import AdapterRecord
from workbench.spec.model import ModelConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Subject:
    """What is trained. `fill` gives every parameter its first value; `adapt` may change modules before they are
    wrapped; `tokenizer` and `lineage` are carried into checkpoints. With `adapter`, checkpoints hold only what is
    trained, and `fill` gives the rest its values on a resume as well. `rate` says by what the learning rate of a
    parameter is multiplied."""

    model: ModelConfig
    fill: Callable[[list[LiveParameter]], None]
    adapt: Callable[[DecoderStage], None] | None = None
    tokenizer: Path | None = None
    lineage: Sequence[Mapping[str, Any]] = ()
    adapter: AdapterRecord | None = None
    rate: Callable[[ParameterSpec], float] = full_rate


class Watcher(Protocol):
    """Who is told what happens; rank 0 tells the user, the others tell nobody."""

    def started(self, facts: Mapping[str, Any]) -> None:
        """Before the first step: what was resumed, how many steps there will be, the peak that MFU is measured by."""
        ...

    def stepped(self, done: int, total: int | None) -> None:
        """After every step."""
        ...

    def measured(self, row: Mapping[str, Any]) -> None:
        """A row of metrics."""
        ...

    def saved(self, checkpoint: Path) -> None: ...


class Silent:
    """A watcher that tells nobody."""

    def started(self, facts: Mapping[str, Any]) -> None: ...
    def stepped(self, done: int, total: int | None) -> None: ...
    def measured(self, row: Mapping[str, Any]) -> None: ...
    def saved(self, checkpoint: Path) -> None: ...


@dataclass(frozen=True)
class RunResult:
    """How a run ended. `metrics` are those of the last evaluation, by `<evaluation>/<metric>`; `best` is its best one
    by `eval.metric` (metric, value, step), empty without any; `skipped_steps` updated nothing, since their gradients
    overflowed."""

    step: int
    samples: int
    tokens: int
    seconds: float
    loss: float | None
    metrics: Mapping[str, float]
    best: Mapping[str, Any]
    checkpoint: str
    interrupted: bool
    ended_by: str
    skipped_steps: int


class Trainer:
    """One run on this rank; every rank makes one and calls `run`. Collective over the mesh throughout."""

    def __init__(
        self,
        config: EngineConfig,
        subject: Subject,
        objective: Objective,
        mesh: Mesh,
        *,
        watcher: Watcher | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Builds the model and fills it, or resumes from the newest checkpoint of the run's folder.

        `dtype` is that of parameters and moments; in anything but fp32 the model also computes in it.
        """
        self.config, self.subject, self.objective, self.mesh = config, subject, objective, mesh
        self._watcher: Watcher = watcher if watcher is not None and mesh.world.rank == 0 else Silent()
        if config.run.deterministic:
            make_deterministic()
        if mesh.device.type == "cpu":
            keep_freed_memory()
        compute = DTYPES[config.precision.compute] if dtype == torch.float32 else dtype
        schedule = schedule_named(config.parallel.schedule)
        self._choice = choose_executor(config, subject.model, mesh.layout, mesh.device.type)
        self.built = build_stage(
            subject.model,
            mesh,
            dtype=dtype,
            compute_dtype=compute,
            adapt=subject.adapt,
            options=config.stage_options(self._choice.backend),
        )
        self.optimizer = Optimizer(
            self.built.parameters, mesh, config.optim, compute_dtype=compute, seed=config.run.seed, rate=subject.rate
        )
        self.loss_scale = LossScale(config.precision) if compute == torch.float16 else None
        self.pipeline = Pipeline(self.built, mesh, schedule, objective.criterion)
        self.store = Store(Path(config.run.dir) / CHECKPOINTS)
        if config.needs_best:
            require_judge(config.eval, [evaluation.name for evaluation in objective.evaluations])
        self.state = self._fill_or_resume()
        self._saved_step = self.state.step if self.state.step else None
        scheduler = self.state.scheduler
        self.budget = Budget(
            config.planned_steps(),
            config.run.seconds,
            horizon=scheduler.get("horizon"),
            spent=float(scheduler.get("seconds", 0.0)),
        )
        self._peak = find_peak(config.log.peak_tflops, mesh.device, compute)
        self.meter = Meter(
            token_flops=flops_per_token(subject.model, config.batch.seq_len),
            num_ranks=mesh.world.size,
            peak=self._peak,
        )
        self._loss: float | None = None
        self._metrics: dict[str, float] = {}
        self._evaluated_step: int | None = None
        self._standing = Standing.of(config.eval.metric, scheduler.get("best"))

    def run(self) -> RunResult:
        """Trains until steps, tokens, time or patience are used up or a signal comes; evaluates and saves; says how it
        ended."""
        self._watcher.started(self._facts())
        self.meter.read()
        with StopSignal() as signal:
            ended_by = self._loop(signal)
            interrupted = ended_by == "signal"
            if not interrupted and self.objective.evaluations and self._evaluated_step != self.state.step:
                self.evaluate()
            self.save()
        return RunResult(
            step=self.state.step,
            samples=self.state.samples,
            tokens=self.state.tokens,
            seconds=self.budget.spent,
            loss=self._loss,
            metrics=dict(self._metrics),
            best=self._standing.facts(),
            checkpoint=str(self.store.path(self.state.step)),
            interrupted=interrupted,
            ended_by=ended_by,
            skipped_steps=self._skipped_steps,
        )

    def _loop(self, signal: StopSignal) -> str:
        """Steps until the run is over; returns what ended it: steps, time, patience or signal."""
        config = self.config
        share = Share(config.batch.micro_size, self.mesh.dp.rank, self.mesh.dp.size)
        while self.budget.horizon is None or self.state.step < self.budget.horizon:
            if 0 < config.eval.patience <= self._standing.stale:
                return "patience"
            rows = self.objective.train_rows(
                share, step=self.state.step, first_sample=self.state.samples, global_size=config.batch.global_size
            )
            # Whose clock or signal it was does not matter: all ranks stop before the same step.
            time_is_up = self.mesh.world.rank == 0 and self.budget.is_over
            agreed = agree(rows, self.mesh, stop=signal.asked or time_is_up)
            if agreed.stop:
                asked = self.mesh.world.gather_objects(signal.asked)
                return "signal" if any(asked) else "time"
            step, lr = self.state.step, config.optim.curve(self.budget.horizon)(self.state.step)
            result = train_step(
                self.pipeline,
                self.optimizer,
                rows,
                agreed=agreed,
                lr=lr,
                seed=config.run.seed,
                step=step,
                loss_scale=self.loss_scale,
            )
            self._advance(agreed.num_tokens)
            self._after_step(result, lr)
        return "steps"

    def _advance(self, tokens: int) -> None:
        config, state = self.config, self.state
        self.state = replace(
            state,
            step=state.step + 1,
            samples=state.samples + config.batch.global_size,
            tokens=state.tokens + tokens,
        )
        self.meter.count(tokens)
        if self.budget.horizon is None:
            first = self.mesh.world.rank == 0
            found = self.budget.measured_horizon(self.state.step) if first else None
            self.budget.horizon = self.mesh.world.broadcast_object(found)

    def _after_step(self, result: StepResult, lr: float) -> None:
        """Metrics, evaluation and checkpoint, each when it is due."""
        config, step = self.config, self.state.step
        is_last = step == self.budget.horizon
        evaluates = bool(self.objective.evaluations) and _due(step, config.eval.every) and not is_last
        saves = _due(step, config.checkpoint.every) and not is_last
        if _due(step, config.log.every) or step == 1 or is_last or evaluates or saves:
            self._log(result, lr)
        self._watcher.stepped(step, self.budget.horizon)
        started = time.perf_counter()
        if evaluates:
            self.evaluate()
            saves |= config.checkpoint.keep_best and self._standing.step == step
        if saves:
            self.save()
        if evaluates or saves:
            self.meter.skip(time.perf_counter() - started)

    @property
    def _skipped_steps(self) -> int:
        return 0 if self.loss_scale is None else self.loss_scale.skipped_steps

    def _log(self, result: StepResult, lr: float) -> None:
        losses = {} if result.skipped else self._losses(result)
        row = {"step": self.state.step, **losses, "lr": lr, "tokens": self.state.tokens}
        if self.loss_scale is not None:
            row |= {"loss_scale": self.loss_scale.value, "skipped_steps": self.loss_scale.skipped_steps}
        self._watcher.measured({**row, "seconds": self.budget.spent, **self.meter.read()})

    def _losses(self, result: StepResult) -> dict[str, float]:
        """Loss, gradient norm, load of experts and what else is told of a step; WorkbenchError when one of the first
        two is not finite."""
        loss, norm = result.mean_loss(self.mesh), result.gradient_norm.item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise WorkbenchError(
                f"step {self.state.step}: the loss is {loss} and the gradient norm {norm}; the run has diverged. "
                f"Lower optim.lr={self.config.optim.lr:g} or lengthen optim.warmup={self.config.optim.warmup}; "
                "running again goes on from the last checkpoint"
            )
        self._loss = loss
        load = result.expert_load
        experts = {} if load is None else load.metrics(self.mesh, num_labels=result.num_labels)
        judge = self.objective.criterion.judge
        told = {} if judge is None else judge.metrics(self.pipeline.tally.total(self.mesh))
        return {**told, "loss": loss, "grad_norm": norm, **experts}

    def evaluate(self) -> dict[str, float]:
        """Runs every evaluation and returns the metrics, by `<evaluation>/<metric>`."""
        config, micros = self.config, self.config.batch.micro_size * self.mesh.dp.size
        limit = config.eval.batches * config.batch.global_size or None
        self.built.module.eval()
        for evaluation in self.objective.evaluations:
            found = evaluate(
                self.pipeline,
                evaluation,
                micro_size=config.batch.micro_size,
                num_microbatches=max(config.batch.global_size // micros, 1),
                max_samples=limit,
            )
            self._metrics.update({f"{evaluation.name}/{name}": value for name, value in found.items()})
        self.built.module.train()
        self._evaluated_step = self.state.step
        self._standing = self._standing.after(self.state.step, self._metrics, config.eval, must=config.needs_best)
        best = {"best_step": self._standing.step} if self._standing.step else {}
        self._watcher.measured({"step": self.state.step, "tokens": self.state.tokens, **self._metrics, **best})
        return dict(self._metrics)

    def save(self) -> None:
        """Writes a checkpoint of this step, unless it is there, and removes those beyond `checkpoint.keep`."""
        if self._saved_step == self.state.step:
            return
        config = self.config
        # Rank 0's clock speaks for all, so that every rank writes the same state.
        spent = self.mesh.world.broadcast_object(self.budget.spent)
        rates = config.optim.model_dump(include={"schedule", "lr", "min_lr", "warmup"})
        scheduler = {**rates, "horizon": self.budget.horizon, "seconds": spent, "best": self._standing.facts()}
        optimizer = self.optimizer if config.checkpoint.optimizer else None
        self.state = replace(
            self.state,
            scheduler=scheduler,
            optimizer={} if optimizer is None else self._optimizer_state(),
        )
        path = self.store.path(self.state.step)
        subject = self.subject
        contents = Contents(subject.model, subject.lineage, subject.tokenizer, subject.adapter)
        save(path, self._saved_parameters, optimizer, self.mesh, training=self.state, contents=contents)
        self._saved_step = self.state.step
        if self.mesh.world.rank == 0 and config.checkpoint.keep:
            self.store.retain(config.checkpoint.keep, besides=self._standing.step if config.checkpoint.keep_best else 0)
        self._watcher.saved(path)

    def _optimizer_state(self) -> dict[str, Any]:
        """What a checkpoint says of the optimizer besides its moments."""
        settings = self.config.optim.model_dump(mode="json", include={"name", "betas", "eps", "weight_decay"})
        state = {**settings, "step": self.optimizer.step_count}
        return state if self.loss_scale is None else {**state, "loss_scale": self.loss_scale.state()}

    def _fill_or_resume(self) -> TrainingState:
        if self.mesh.world.rank == 0:
            self.store.clean()
        path = self.mesh.world.broadcast_object(find_checkpoint(self.store, self.config.run.resume))
        if path is None:
            self.subject.fill(self.built.parameters)
            return TrainingState(step=0, seed=self.config.run.seed, data=self.objective.identity)
        source = open_native(path)
        try:
            state = require_same_run(source.manifest, self.config, self.subject.model, self.objective, path)
            require_same_adapter(source.manifest.adapter, self.subject.adapter, path)
            if self.subject.adapter is not None:
                self.subject.fill(self.built.parameters)
            updates = int(state.optimizer.get("step", state.step))
            load_training(source, self._saved_parameters, self.optimizer, updates=updates)
            if self.loss_scale is not None and "loss_scale" in state.optimizer:
                self.loss_scale.restore(state.optimizer["loss_scale"])
        finally:
            source.close()
        return state

    @property
    def _saved_parameters(self) -> list[LiveParameter]:
        everything = self.built.parameters
        return everything if self.subject.adapter is None else [p for p in everything if p.trainable]

    def _facts(self) -> dict[str, Any]:
        return {
            "resumed_step": self.state.step,
            "steps": self.budget.horizon,
            "peak": None if self._peak is None else self._peak.source,
            "device": self.mesh.device.type,
            "backend": self._choice.backend,
            "backend_reason": self._choice.reason,
        }


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
