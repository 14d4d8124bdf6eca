"""`wb eval`: the score of a checkpoint on the held-out rows of a task, or on public benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workbench.cli import _options as option
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
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATH", help="An adapter to the checkpoint, to judge in its place.")
    ] = None,
    best: Annotated[
        bool,
        typer.Option("--best", help="Of the judged run folder, its best checkpoint by eval.metric, not its latest."),
    ] = False,
    nproc: option.Nproc = None,
) -> None:
    """Judge a model by the valid and test rows of a task, or by public benchmarks.

    An adapter is merged into its base on the way.
    """
    from converters.merge import open_merged
    from finetune.config import FinetuneConfig
    from workbench.config import load_config
    from workbench.errors import ConfigError
    from workbench.parallel.launch import run_on_ranks

    if (task_config is None) == (not harness):
        raise ConfigError("give --task-config or --harness" + (", not both" if harness else ""))
    if task_config is None:
        _report(out, checkpoint, harness, run_harness(checkpoint, harness, limit=limit))
        return
    settings = load_config(task_config, FinetuneConfig, overrides or ()).config
    ranks = find_ranks(settings, nproc)
    metrics: dict[str, float] = {}
    for prefix, path, its_base in _judged(checkpoint, base, adapter or (), best=best):
        layout = settings.resolve_layout(open_merged(path, base=its_base).model, ranks.count)
        found = run_on_ranks(judge, settings, layout, path, its_base, nproc=ranks.count)
        metrics |= {f"{prefix}{name}": value for name, value in found.items()}
    if ranks.speaks:
        _report(out, checkpoint if adapter else path, settings.task.kind, metrics)


def _report(out: Output, checkpoint: Path, task: str, metrics: dict[str, float]) -> None:
    lines = [f"{name:<22} {value:.6g}" for name, value in metrics.items()]
    out.result({"checkpoint": str(checkpoint), "task": task, "metrics": metrics}, text="\n".join(lines))


def _judged(
    checkpoint: Path, base: Path | None, adapters: Sequence[str], *, best: bool
) -> list[tuple[str, Path, Path | None]]:
    """What stands before the names of its metrics, where it is and where its base is, of each model to be judged."""
    from workbench.checkpoint.store import CHECKPOINTS, Store
    from workbench.errors import ConfigError

    def found(path: Path) -> Path:
        return Store(path / CHECKPOINTS).best() if best else path

    if not adapters:
        return [("", found(checkpoint), base)]
    pairs = [text.partition("=") for text in adapters]
    if wrong := [text for text, (name, _, path) in zip(adapters, pairs, strict=True) if not (name and path)]:
        raise ConfigError(f"--adapter {wrong[0]!r} is not NAME=PATH; write it as sft=runs/sft")
    return [(f"{name}/", found(Path(path)), checkpoint) for name, _, path in pairs]


def judge(config: FinetuneConfig, layout: ParallelLayout, checkpoint: Path, base: Path | None) -> dict[str, float]:
    """One rank's part; the metrics on every rank."""
    from converters.merge import open_merged
    from finetune.run import evaluate_model
    from workbench.parallel.launch import choose_device
    from workbench.parallel.mesh import Mesh

    mesh = Mesh.create(layout, choose_device())
    # The parent has compared the base with the adapter's record already.
    opened = open_merged(checkpoint, base=base, check_base=False)
    return evaluate_model(config, opened.model, opened.source, opened.tokenizer, mesh)


COMMAND = Command(
    "eval",
    evaluate,
    panel="Models",
    order=70,
    example="wb eval runs/sft --task-config sft.toml --best\nwb eval out/merged --task-config sft.toml parallel.tp=2\n"
    "wb eval models/base --task-config sft.toml --adapter a=runs/a --adapter b=runs/b\n"
    "wb eval out/hf --harness hellaswag,arc_easy",
)
