"""`wb finetune`: train a model further on a task, whole or through an adapter."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.cli import _options as option
from workbench.cli._preview import column_overrides
from workbench.cli._training import (
    Outcome,
    Ranks,
    Terminal,
    Voice,
    best_text,
    ended_text,
    find_ranks,
    outcome_of,
    plan_facts,
    run_in_folder,
    say_plan,
    skipped_text,
    voice_of,
)
from workbench.cli.common import Command, Output, count_text, time_text

if TYPE_CHECKING:
    from converters.format import OpenedCheckpoint
    from finetune.config import FinetuneConfig
    from finetune.run import Base
    from finetune.task import Prepared
    from workbench.spec.layout import ParallelLayout


def finetune(
    out: Output,
    config: Annotated[
        Path, typer.Argument(help="A TOML file with base, [task], [method], [run] and more.", metavar="CONFIG.toml")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(help="Values over those of the file: method.r=8")] = None,
    column: option.Columns = None,
    nproc: option.Nproc = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check config, base, data and layout only.")] = False,
) -> None:
    """Train a model further on a task: whole, or a LoRA adapter beside its frozen weights.

    The base may be a native checkpoint at any layout, a run folder, a Hugging Face folder or an adapter (which is
    merged first). Goes on by itself when the run folder already holds a checkpoint.
    """
    from converters.merge import base_fingerprint
    from finetune.adapter import require_fit
    from finetune.config import FinetuneConfig, adapter_of
    from workbench.config import load_config

    loaded = load_config(config, FinetuneConfig, [*(overrides or ()), *column_overrides(column or ())])
    settings = loaded.config
    ranks = find_ranks(settings, nproc)
    opened = open_base_of(settings)
    require_fit(adapter_of(settings), settings.method, settings, opened.model)
    layout = settings.resolve_layout(opened.model, ranks.count)
    prepared: Prepared | None = None
    facts = {**plan_facts(settings, opened.model, layout), "base": settings.base, "method": settings.method.kind}
    if ranks.speaks:
        out.say(f"base       {settings.base} ({opened.format}), {settings.method.kind} on {settings.task.kind}")
        say_plan(out, facts, settings, opened.model)
        seen, prepared = preflight(out, settings, _base(settings, opened, ""))
    if dry_run:
        if ranks.speaks:
            out.result({"dry_run": True, **facts, **seen}, text="nothing was started (--dry-run)")
        return
    fingerprint = base_fingerprint(opened)
    lineage = {"kind": "finetune", "parents": list(_base(settings, opened, fingerprint).lineage)}
    with _for_ranks(prepared, ranks) as rows:
        given = (settings, layout, voice_of(out), fingerprint, rows)
        outcome = run_in_folder(out, loaded, ranks, tune, *given, lineage=lineage)
    if ranks.speaks:
        out.result({**facts, **outcome}, text=_summary(outcome, settings))


@contextmanager
def _for_ranks(prepared: Prepared | None, ranks: Ranks) -> Iterator[Prepared | None]:
    """The data as ranks that are started here share it; one that a launcher started has what it has read itself."""
    from finetune.encoded import stored

    if prepared is None or ranks.joined or ranks.count == 1:
        yield prepared
        return
    with tempfile.TemporaryDirectory(prefix="wb-rows-") as folder:
        yield stored(prepared, Path(folder))


def tune(
    config: FinetuneConfig, layout: ParallelLayout, voice: Voice, fingerprint: str, prepared: Prepared | None
) -> Outcome:
    """One rank's part of a run; the outcome as plain values. Without `prepared` data the rank reads it itself."""
    from finetune.run import Finetuning
    from workbench.parallel.launch import choose_device
    from workbench.parallel.mesh import Mesh

    mesh = Mesh.create(layout, choose_device())
    base = _base(config, open_base_of(config), fingerprint)
    terminal = Terminal(voice, config, "finetune") if mesh.world.rank == 0 else None
    try:
        run = Finetuning(config, base, mesh, watcher=terminal, prepared=prepared)
        outcome = outcome_of(run.run())
    finally:
        if terminal is not None:
            terminal.close()
    return {**outcome, "trained_parameters": run.num_trained}


def preflight(out: Output, config: FinetuneConfig, base: Base) -> tuple[dict[str, Any], Prepared]:
    """What the data holds, and the data, read and checked before any rank starts; warns of what is suspicious."""
    from finetune.preflight import survey
    from finetune.run import prepare, tokenizer_of, tuned_model

    prepared = prepare(config, base.model, tokenizer_of(base, config.tokenizer))
    tuned_model(base.model, prepared)
    found = survey(prepared, seed=config.task.seed, packed_tokens=config.packed_tokens)
    for line in found.told:
        out.say(line)
    for warning in found.warnings:
        out.warn(warning)
    return found.facts, prepared


def open_base_of(config: FinetuneConfig) -> OpenedCheckpoint:
    """The checkpoint that a run starts from; an adapter is merged into its own base."""
    from converters.merge import open_merged

    return open_merged(Path(config.base))


def _base(config: FinetuneConfig, opened: OpenedCheckpoint, fingerprint: str) -> Base:
    from finetune.run import Base

    step = opened.training.step if opened.training is not None else None
    parent = {
        "kind": "finetune",
        "base": config.base,
        "fingerprint": fingerprint,
        "format": opened.format,
        "step": step,
    }
    return Base(
        model=opened.model,
        source=opened.source,
        tokenizer=opened.tokenizer,
        path=str(opened.path.absolute()),
        fingerprint=fingerprint,
        lineage=(*opened.lineage, parent),
    )


def _summary(outcome: Outcome, config: FinetuneConfig) -> str:
    """What a finished run is told as."""
    lines = [
        f"done       step {outcome['step']}{ended_text(outcome)}, {count_text(outcome['tokens'])} tokens, "
        f"{time_text(outcome['seconds'])}, {count_text(outcome['trained_parameters'])} parameters trained",
        *skipped_text(outcome),
        *best_text(outcome),
        *(f"{name:<22} {_number(value)}" for name, value in outcome["metrics"].items()),
        f"checkpoint {outcome['checkpoint']}",
    ]
    if config.method.kind in ("full", "freeze"):
        lines.append(f"next       wb export {config.run.dir} DST")
    else:
        lines.append(f"next       wb export {config.run.dir} DST --to peft    wb merge {config.run.dir} DST")
    return "\n".join(lines)


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) and not value.is_integer() else f"{value:g}"


COMMAND = Command(
    "finetune",
    finetune,
    panel="Core",
    order=30,
    example=(
        "wb finetune sft.toml\nwb finetune sft.toml base=runs/tiny method.kind=lora method.r=16 parallel.tp=2\n"
        "wb finetune sft.toml task.train=answers.csv --map prompt=question --map completion=answer"
    ),
)
