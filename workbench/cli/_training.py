"""What `wb pretrain` and `wb finetune` share: ranks, the run folder, what is said meanwhile, and how a run ends."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.cli.common import Output, count_text, size_text, time_text

if TYPE_CHECKING:
    from pretrain.config import EngineConfig
    from pretrain.engine import RunResult
    from workbench.config import Loaded
    from workbench.spec.layout import ParallelLayout
    from workbench.spec.model import ModelConfig

Outcome = dict[str, Any]


@dataclass(frozen=True)
class Voice:
    """How a rank may speak; travels to the ranks, where an Output cannot."""

    json: bool
    quiet: bool
    verbose: bool

    def output(self) -> Output:
        """An Output of the same manners that narrates on stderr, and leaves the result to the parent process."""
        return Output(json=self.json, quiet=self.quiet, verbose=self.verbose, stdout=sys.stderr)


def voice_of(out: Output) -> Voice:
    return Voice(out.json, out.quiet, out.verbose)


@dataclass(frozen=True)
class Ranks:
    """How many ranks a run has, and whether this process is the one that speaks and writes the run folder."""

    count: int
    speaks: bool
    joined: bool


def find_ranks(config: EngineConfig, nproc: int | None) -> Ranks:
    """The ranks that a launcher started, or else those to start here: --nproc, or what [parallel] asks for.

    LaunchError when they are to be started here and there are GPUs, but fewer than ranks.
    """
    from workbench.parallel.launch import rank_environment, require_devices

    environment = rank_environment()
    if environment is not None:
        return Ranks(environment.world_size, environment.rank == 0, joined=True)
    if nproc is None:
        import torch

        least = config.parallel.num_ranks()
        gpus = torch.cuda.device_count() if config.parallel.dp == "auto" else 0
        nproc = max(gpus // least, 1) * least
    require_devices(nproc)
    return Ranks(nproc, True, joined=False)


def plan_facts(config: EngineConfig, model: ModelConfig, layout: ParallelLayout) -> dict[str, Any]:
    """What is known of a run before it starts."""
    from pretrain.execution import choose_executor
    from pretrain.memory import estimate_memory
    from pretrain.simulate import simulate_step
    from workbench.parallel.launch import choose_device
    from workbench.spec.schema import num_parameters

    device = choose_device().type
    stages = estimate_memory(model, layout, config, on_cpu=device == "cpu")
    choice = choose_executor(config, model, layout, device)
    worst = max(stages, key=lambda stage: stage.total)
    return {
        "run": config.run.dir,
        "parameters": num_parameters(model),
        "layout": layout.model_dump(mode="json", exclude={"vocab_multiple"}),
        "ranks": layout.world_size,
        "bubble": simulate_step(config, layout).bubble,
        "step_tokens": config.step_tokens,
        "steps": config.planned_steps(),
        "seconds": config.run.seconds,
        "memory_bytes": worst.total,
        "state_bytes": worst.total - worst.activations,
        "precision": config.precision.compute,
        "linear": config.precision.linear,
        "backend": choice.backend,
        "backend_reason": choice.reason,
    }


def say_plan(out: Output, facts: Mapping[str, Any], config: EngineConfig, model: ModelConfig) -> None:
    """Prints what is about to happen."""
    layout, batch = facts["layout"], config.batch
    shape = f"{model.num_hidden_layers} layers x {model.hidden_size}, vocabulary {model.vocab_size}"
    tokens = " (tokens shared)" if layout["sequence_parallel"] else ""
    context = f" x cp {layout['cp']}" if layout["cp"] > 1 else ""
    shard = "" if layout["shard"] == "none" else f" ({layout['shard']})"
    experts = f" (experts dealt over {layout['ep']})" if layout["ep"] > 1 else ""
    spread = f"tp {layout['tp']}{tokens}{context} x pp {layout['pp']} x dp {layout['dp']}{shard}{experts}"
    ranks = f"{facts['ranks']} rank" + ("s" if facts["ranks"] > 1 else "")
    micros = batch.num_microbatches(layout["dp"])
    pipeline = ""
    if layout["pp"] > 1:
        chunks = f" in {layout['vpp']} chunks" if layout["vpp"] > 1 else ""
        pipeline = f", {config.parallel.schedule}{chunks} waits {facts['bubble']:.0%} of the time"
    ends = [f"{facts['steps']} steps"] if facts["steps"] is not None else []
    ends += [time_text(facts["seconds"])] if facts["seconds"] is not None else []
    out.say(f"model      {count_text(facts['parameters'])} parameters: {shape}")
    linear = "" if facts["linear"] == "compute" else f" with {facts['linear']} in linear layers"
    out.say(f"layout     {spread} = {ranks}, {facts['precision']}{linear}{pipeline}")
    if config.kernels.backend != "torch":
        out.say(f"kernels    {facts['backend']} ({facts['backend_reason']})")
    out.say(
        f"batch      {batch.global_size} x {batch.seq_len} = {count_text(facts['step_tokens'])} tokens a step, "
        f"in {micros} microbatch{'es' if micros > 1 else ''} of {batch.micro_size}"
    )
    out.say(f"length     {' or '.join(ends)}")
    memory, state = size_text(facts["memory_bytes"]), size_text(facts["state_bytes"])
    out.say(f"memory     about {memory} on the fullest rank: {state} of weights, gradients, moments; activations")
    out.say(f"run        {config.run.dir}")


class Terminal:
    """A Watcher that fills the run folder's metrics and moves a progress bar; lives on rank 0."""

    def __init__(self, voice: Voice, config: EngineConfig, label: str) -> None:
        from workbench.log import get_logger

        self._out, self._config, self._label = voice.output(), config, label
        self._log = get_logger(__name__)
        self._sinks: Any = None
        self._bar: Any = None
        self._note = ""

    def started(self, facts: Mapping[str, Any]) -> None:
        from workbench.log import open_sinks

        self._log.info("started: %s", dict(facts))
        resumed = facts["resumed_step"]
        if resumed:
            self._out.say(f"resumed at step {resumed}")
        if facts["peak"]:
            self._out.detail(f"MFU is measured against {facts['peak']}")
        self._sinks = open_sinks(
            Path(self._config.run.dir),
            resumed_step=resumed or None,
            tensorboard=self._config.log.tensorboard,
            wandb_project=self._config.log.wandb_project,
            config=self._config.model_dump(mode="json"),
        )
        self._bar = self._out.progress(self._label, total=facts["steps"], unit="steps", begun=resumed)
        self._bar.__enter__()

    def stepped(self, done: int, total: int | None) -> None:
        self._bar.update(done, total=total, note=self._note)

    def measured(self, row: Mapping[str, Any]) -> None:
        values = dict(row)
        self._log.info("%s", values)
        self._sinks.write(values.pop("step"), values)
        if "loss" in row:
            mfu = f"  mfu {row['mfu']:.1%}" if "mfu" in row else ""
            self._note = f"loss {row['loss']:.4f}  {count_text(row['tokens_per_second'])} tok/s{mfu}"
        else:
            scores = [f"{name} {value:.4g}" for name, value in row.items() if "/" in name]
            told = "  ".join(scores) or f"skipped: the gradient overflowed, loss scale is now {row['loss_scale']:g}"
            self._out.detail(f"step {row['step']}: {told}")

    def saved(self, checkpoint: Path) -> None:
        self._log.info("saved %s", checkpoint)
        self._out.detail(f"saved {checkpoint}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
        if self._sinks is not None:
            self._sinks.close()


def logged(entry: Callable[..., Outcome], folder: Path, *args: Any) -> Outcome:
    """Calls `entry(*args)` on this rank with a log in `folder`/rank-0000.log, where a failure leaves its traceback."""
    from workbench.log import get_logger, setup_logging
    from workbench.parallel.launch import rank_environment

    environment = rank_environment()
    rank, count = (environment.rank, environment.world_size) if environment is not None else (0, 1)
    setup_logging(rank=rank, folder=folder, level="warning")
    log = get_logger(__name__)
    log.info("rank %d of %d starts, process %d", rank, count, os.getpid())
    try:
        outcome = entry(*args)
        log.info("done at step %s", outcome["step"])
        return outcome
    except KeyboardInterrupt:
        log.info("interrupted")
        raise
    except Exception:
        # To the file alone: the process that started the ranks reports the first failure, once.
        log.debug("failed", exc_info=True)
        raise
    finally:
        setup_logging(level="warning")


def outcome_of(result: RunResult) -> Outcome:
    """The result of a run as plain values; KeyboardInterrupt, on every rank, when it was interrupted."""
    if result.interrupted:
        raise KeyboardInterrupt
    return dataclasses.asdict(result)


def skipped_text(outcome: Outcome) -> list[str]:
    """A line on the steps that updated nothing, if there were any."""
    skipped = outcome["skipped_steps"]
    return [f"skipped    {skipped} steps whose gradients overflowed in fp16"] if skipped else []


def best_text(outcome: Outcome) -> list[str]:
    """A line on the best evaluation of a run, if it was not the last one."""
    best = outcome["best"]
    if not best or best["step"] == outcome["step"]:
        return []
    return [f"best       step {best['step']}, {best['metric']} {best['value']:.4f}"]


def ended_text(outcome: Outcome) -> str:
    """Why a run stopped before its steps were made, if it did."""
    return " (stopped early: eval.patience)" if outcome["ended_by"] == "patience" else ""


def run_in_folder(
    out: Output,
    loaded: Loaded[Any],
    ranks: Ranks,
    entry: Callable[..., Outcome],
    *args: Any,
    lineage: Mapping[str, Any],
) -> Outcome:
    """Calls `entry(*args)` on all ranks inside the run folder of `loaded`; leaves DONE, FAILED or INTERRUPTED there.

    `lineage` says what the run was made of: the parents of its weights, and its data.

    Raises KeyboardInterrupt, with the hint how to go on, when the run was interrupted.
    """
    from workbench.checkpoint.store import Store
    from workbench.config import resolved_json
    from workbench.parallel.launch import run_on_ranks
    from workbench.run_folder import RunFolder, Status

    folder = RunFolder(Path(loaded.config.run.dir))
    if ranks.speaks:
        folder.start(config_text=loaded.text, resolved=resolved_json(loaded.config), command=[*sys.argv])
        folder.write_lineage(lineage)
    try:
        outcome = run_on_ranks(logged, entry, folder.logs, *args, nproc=ranks.count)
    except KeyboardInterrupt:
        steps = Store(folder.checkpoints).steps()
        where = f"saved at step {steps[-1]}" if steps else "nothing was saved yet"
        out.interrupt_hint = f"{folder.path}: {where}; run the same command again to go on"
        if ranks.speaks:
            folder.finish(Status.INTERRUPTED, where)
        raise
    except Exception as error:
        if ranks.speaks:
            folder.finish(Status.FAILED, str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise
    if ranks.speaks:
        folder.finish(Status.DONE, f"step {outcome['step']}")
    return outcome
