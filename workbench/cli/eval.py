"""`wb eval`: the score of a checkpoint on the held-out rows of a task, or on public benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workbench.cli._harness import run_harness
from workbench.cli._training import find_ranks
from workbench.cli.common import Command, Output

if TYPE_CHECKING:
    from finetune.config import FinetuneConfig
    from workbench.spec.layout import ParallelLayout


def evaluate(
    out: Output,
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, a run folder, an adapter, a Hugging Face folder.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Values over those of the file.")] = None,
    task_config: Annotated[Path | None, typer.Option(help="The TOML file of the task: that of `wb finetune`.")] = None,
    harness: Annotated[
        str, typer.Option(help="Tasks of lm-evaluation-harness instead, with commas between them, on an export.")
    ] = "",
    limit: Annotated[int | None, typer.Option(min=1, help="Rows of each harness task at most.")] = None,
    base: Annotated[Path | None, typer.Option(help="Where an adapter's base is, if not where it remembers.")] = None,
    best: Annotated[
        bool, typer.Option("--best", help="Of a run folder, its best checkpoint by eval.metric, not its latest.")
    ] = False,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Ranks to start here; by default what [parallel] asks for.")
    ] = None,
) -> None:
    """Judge a model by the valid and test rows of a task, or by public benchmarks.

    An adapter is merged into its base on the way.
    """
    from converters.merge import open_merged
    from finetune.config import FinetuneConfig
    from workbench.checkpoint.store import CHECKPOINTS, Store
    from workbench.config import load_config
    from workbench.errors import ConfigError
    from workbench.parallel.launch import run_on_ranks

    if (task_config is None) == (not harness):
        raise ConfigError("give --task-config or --harness" + (", not both" if harness else ""))
    if task_config is None:
        _report(out, checkpoint, harness, run_harness(checkpoint, harness, limit=limit))
        return
    if best:
        checkpoint = Store(checkpoint / CHECKPOINTS).best()
    settings = load_config(task_config, FinetuneConfig, overrides or ()).config
    opened = open_merged(checkpoint, base=base)
    ranks = find_ranks(settings, nproc)
    layout = settings.resolve_layout(opened.model, ranks.count)
    metrics = run_on_ranks(judge, settings, layout, checkpoint, base, nproc=ranks.count)
    if ranks.speaks:
        _report(out, checkpoint, settings.task.kind, metrics)


def _report(out: Output, checkpoint: Path, task: str, metrics: dict[str, float]) -> None:
    lines = [f"{name:<22} {value:.6g}" for name, value in metrics.items()]
    out.result({"checkpoint": str(checkpoint), "task": task, "metrics": metrics}, text="\n".join(lines))


def judge(config: FinetuneConfig, layout: ParallelLayout, checkpoint: Path, base: Path | None) -> dict[str, float]:
    """One rank's part; the metrics on every rank."""
    from converters.merge import open_merged
    from finetune.run import evaluate_model
    from workbench.parallel.launch import choose_device, rank_environment
    from workbench.parallel.mesh import Mesh

    environment = rank_environment()
    mesh = Mesh.create(layout, choose_device(environment.local_rank if environment is not None else 0))
    # The parent has compared the base with the adapter's record already.
    opened = open_merged(checkpoint, base=base, check_base=False)
    return evaluate_model(config, opened.model, opened.source, opened.tokenizer, mesh)


COMMAND = Command(
    "eval",
    evaluate,
    panel="Models",
    order=70,
    example="wb eval runs/sft --task-config sft.toml --best\nwb eval out/merged --task-config sft.toml parallel.tp=2\n"
    "wb eval out/hf --harness hellaswag,arc_easy",
)
