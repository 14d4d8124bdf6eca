"""`wb check`: whether a configuration will run, found out without running it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.cli.common import Command, Output, count_text, size_text

if TYPE_CHECKING:
    from finetune.config import FinetuneConfig
    from pretrain.config import EngineConfig, PretrainConfig
    from workbench.spec.model import ModelConfig


def check(
    out: Output,
    config: Annotated[Path, typer.Argument(help="A configuration of `wb pretrain` or `wb finetune`.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Keys to change, as table.key=value.")] = None,
    nproc: Annotated[
        int | None, typer.Option(help="Ranks to plan for; by default what the layout needs.", min=1)
    ] = None,
) -> int | None:
    """Resolve configuration, model, layout, data and memory of a run, and train nothing.

    The exit code is 6 when the estimate does not fit into the memory of this machine.
    """
    from workbench.cli._tables import kind_of, models, presets
    from workbench.config import load_config
    from workbench.run_folder import memory_bytes

    kind = kind_of(config)
    loaded: Any = load_config(config, models()[kind], overrides or (), presets())
    model, data = _pretraining(loaded.config) if kind == "pretrain" else _finetuning(loaded.config)
    found = {"config": str(config), "for": kind, **_engine(loaded.config, model, nproc), "data": data}
    have, need = memory_bytes(), found["memory"]["all_ranks_bytes"]
    found["memory"]["machine_bytes"] = have
    fits = not have or need <= have or found["device"] != "cpu"
    if not fits:
        out.warn(
            f"the ranks need about {size_text(need)} together, but this machine has {size_text(have)}; "
            "lower batch.micro_size or the model, or use more machines"
        )
    out.result({**found, "fits": fits}, text=_text(found))
    return None if fits else 6


def _pretraining(config: PretrainConfig) -> tuple[ModelConfig, dict[str, Any]]:
    from pretrain.data.config import open_data

    opened = open_data(config.data, seq_len=config.batch.seq_len, vocab_size=config.model.vocab_size)
    steps = config.planned_steps()
    found: dict[str, Any] = {
        "train_tokens": opened.train_tokens,
        "train_documents": opened.train_documents,
        "has_validation": opened.valid is not None,
        "tokenizer": str(opened.tokenizer) if opened.tokenizer else None,
    }
    if steps is not None:
        found["epochs"] = steps * config.step_tokens / opened.train_tokens
    return config.model, found


def _finetuning(config: FinetuneConfig) -> tuple[ModelConfig, dict[str, Any]]:
    from converters.open import open_checkpoint
    from finetune.adapter import require_fit
    from finetune.config import adapter_of, task_of
    from finetune.rows import parts_of
    from finetune.task import files_of
    from pretrain.config import length_faults
    from workbench.errors import ConfigError

    opened = open_checkpoint(Path(config.base))
    model = opened.model
    require_fit(adapter_of(config), config.method, config, model)
    if faults := length_faults(model, config.batch.seq_len):
        raise ConfigError("; ".join(faults))
    paths = [*config.task.train, *(path for paths in files_of(config.task).values() for path in paths)]
    files = [part for path in paths for part in parts_of(path)]
    return model, {
        "base": config.base,
        "base_format": opened.format,
        "task": task_of(config).name,
        "method": adapter_of(config).name,
        "files": files,
    }


def _engine(config: EngineConfig, model: ModelConfig, nproc: int | None) -> dict[str, Any]:
    """Layout, sizes and memory: what every run has."""
    from pretrain.execution import choose_executor
    from pretrain.memory import estimate_memory
    from pretrain.simulate import simulate_step
    from workbench.parallel.launch import choose_device
    from workbench.spec.schema import num_active_parameters, num_parameters

    num_ranks = nproc or config.parallel.num_ranks()
    layout = config.resolve_layout(model, num_ranks)
    device = choose_device().type
    choice = choose_executor(config, model, layout, device)
    stages = estimate_memory(model, layout, config, on_cpu=device == "cpu")
    worst = max(stages, key=lambda stage: stage.total)
    return {
        "model": model.model_dump(mode="json", exclude_defaults=True),
        "parameters": num_parameters(model),
        "active_parameters": num_active_parameters(model),
        "layout": layout.model_dump(mode="json", exclude_none=True),
        "ranks": num_ranks,
        "layers_per_stage": [len(layout.layers(model.num_hidden_layers, stage)) for stage in range(layout.pp)],
        "microbatches": config.batch.num_microbatches(layout.dp),
        "schedule": config.parallel.schedule,
        "bubble": simulate_step(config, layout).bubble,
        "step_tokens": config.step_tokens,
        "steps": config.planned_steps(),
        "seconds": config.run.seconds,
        "device": device,
        "backend": choice.backend,
        "backend_reason": choice.reason,
        "memory": {
            "worst_rank": {**asdict(worst), "total": worst.total},
            "all_ranks_bytes": sum(stage.total for stage in stages) * layout.tp * layout.replicas,
        },
    }


def _text(found: dict[str, Any]) -> str:
    layout, worst, data = found["layout"], found["memory"]["worst_rank"], found["data"]
    length = f"{found['steps']} steps" if found["steps"] else f"{found['seconds']:g} seconds"
    parts = ("parameters", "working", "gradients", "optimizer", "activations")
    rows = [
        ("for", f"wb {found['for']}, {length} of {count_text(found['step_tokens'])} tokens"),
        ("model", _model(found)),
        (
            "layout",
            f"tp={layout['tp']} cp={layout['cp']} pp={layout['pp']} dp={layout['dp']}"
            f"{_experts(layout)} on {found['ranks']} ranks; "
            "layers a stage: "
            f"{', '.join(map(str, found['layers_per_stage']))}; {found['microbatches']} microbatches a step",
        ),
        *_pipeline(found),
        ("data", ", ".join(f"{name}: {_shown(value)}" for name, value in data.items())),
        (
            "memory",
            f"about {size_text(worst['total'])} on the fullest rank (stage {worst['stage']}): "
            + ", ".join(f"{part} {size_text(worst[part])}" for part in parts if worst[part])
            + (f"; in the host's memory {size_text(worst['host'])} of moments" if worst["host"] else ""),
        ),
        ("", f"about {size_text(found['memory']['all_ranks_bytes'])} on all ranks, without what torch itself needs"),
    ]
    return "\n".join(f"{name:<8}{value}" for name, value in rows)


def _experts(layout: dict[str, Any]) -> str:
    return (f" ep={layout['ep']}" if layout["ep"] > 1 else "") + (f" etp={layout['etp']}" if "etp" in layout else "")


def _model(found: dict[str, Any]) -> str:
    size, active = found["parameters"], found["active_parameters"]
    of_a_token = f" ({count_text(active)} of them compute a token)" if active < size else ""
    return f"{count_text(size)} parameters{of_a_token} in {sum(found['layers_per_stage'])} layers"


def _pipeline(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What the schedule costs, where there is more than one stage."""
    layout = found["layout"]
    if layout["pp"] == 1:
        return []
    chunks = f" with {layout['vpp']} chunks a stage" if layout["vpp"] > 1 else ""
    return [("", f"{found['schedule']}{chunks} waits {found['bubble']:.1%} of the time, when stages are equally fast")]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}"
    return count_text(value) if isinstance(value, int) and not isinstance(value, bool) else str(value)


COMMAND = Command(
    "check", check, panel="Runs", order=10, example="wb check tiny.toml\nwb check tiny.toml parallel.tp=2 --nproc 4"
)
