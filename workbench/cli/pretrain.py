"""`wb pretrain`: train a model from initial weights, or go on where a run stopped."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.cli import _options as option
from workbench.cli._training import (
    Outcome,
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
    from pretrain.config import PretrainConfig
    from workbench.spec.layout import ParallelLayout


def pretrain(
    out: Output,
    config: Annotated[
        Path, typer.Argument(help="A TOML file with [model], [data], [run] and more.", metavar="CONFIG.toml")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(help="Values over those of the file: optim.lr=3e-4")] = None,
    nproc: option.Nproc = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check config, data and layout; train nothing.")] = False,
) -> None:
    """Train from scratch, or go on by itself when the run folder already holds a checkpoint.

    Under torchrun or Slurm this process joins the other ranks; else it starts them.
    """
    from pretrain.config import PretrainConfig
    from pretrain.data.config import open_data
    from pretrain.presets import PRESETS
    from workbench.config import load_config

    loaded = load_config(config, PretrainConfig, overrides or (), presets={"model": PRESETS})
    settings = loaded.config
    ranks = find_ranks(settings, nproc)
    layout = settings.resolve_layout(settings.model, ranks.count)
    data = open_data(settings.data, seq_len=settings.batch.seq_len, vocab_size=settings.model.vocab_size)
    facts = {**plan_facts(settings, settings.model, layout), "train_tokens": data.train_tokens}
    if ranks.speaks:
        say_plan(out, facts, settings, settings.model)
        valid = "none" if data.valid is None else f"{data.valid.num_samples} sequences"
        out.say(f"data       {count_text(data.train_tokens)} tokens to train on; to evaluate: {valid}")
    if dry_run:
        if ranks.speaks:
            out.result({"dry_run": True, **facts}, text="nothing was started (--dry-run)")
        return
    lineage = lineage_of(settings)
    outcome = run_in_folder(out, loaded, ranks, train, settings, layout, voice_of(out), lineage=lineage)
    if ranks.speaks:
        out.result({**facts, **outcome}, text=_summary(outcome, settings))


def train(config: PretrainConfig, layout: ParallelLayout, voice: Voice) -> Outcome:
    """One rank's part of a run; the outcome as plain values."""
    from pretrain.data.config import open_data
    from pretrain.engine import NextToken, Subject, Trainer
    from workbench.models.build import initialise
    from workbench.parallel.host_products import quicken_products
    from workbench.parallel.launch import choose_device
    from workbench.parallel.mesh import Mesh

    mesh = Mesh.create(layout, choose_device())
    if mesh.device.type == "cpu":
        quicken_products()
    data = open_data(config.data, seq_len=config.batch.seq_len, vocab_size=config.model.vocab_size)
    subject = Subject(
        config.model,
        fill=lambda parameters: initialise(parameters, config.model, seed=config.run.seed),
        tokenizer=data.tokenizer,
        lineage=(lineage_of(config),),
    )
    terminal = Terminal(voice, config, "pretrain") if mesh.world.rank == 0 else None
    try:
        trainer = Trainer(config, subject, NextToken(data, seed=config.data.seed), mesh, watcher=terminal)
        return outcome_of(trainer.run())
    finally:
        if terminal is not None:
            terminal.close()


def lineage_of(config: PretrainConfig) -> dict[str, Any]:
    """What a run is made of: its token files, each with a hash over the hashes of all that went into it."""
    import hashlib

    from pretrain.data.indexed import IndexedTokens
    from pretrain.data.manifest import manifest_path

    found = []
    for source in config.data.train:
        tokens = IndexedTokens(source.path)
        manifest = manifest_path(tokens.prefix)
        digest = hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else None
        found.append({"path": source.path, "tokens": tokens.num_tokens, "manifest_sha256": digest})
    return {"kind": "pretrain", "run": config.run.dir, "seed": config.run.seed, "data": found}


def _summary(outcome: Outcome, config: PretrainConfig) -> str:
    """What a finished run is told as."""
    scores = {name: value for name, value in outcome["metrics"].items() if not name.endswith("/tokens")}
    speak = f"wb generate {config.run.dir} --prompt '...'    " if config.data.objective == "causal" else ""
    lines = [
        f"done       step {outcome['step']}{ended_text(outcome)}, {count_text(outcome['tokens'])} tokens in "
        f"{time_text(outcome['seconds'])}",
        *skipped_text(outcome),
        *best_text(outcome),
        *(f"{name:<22} {_number(value)}" for name, value in scores.items()),
        f"checkpoint {outcome['checkpoint']}",
        f"next       {speak}wb export {config.run.dir} DST",
    ]
    if outcome["loss"] is not None:
        lines.insert(1, f"{'train/loss':<22} {outcome['loss']:.4f}")
    return "\n".join(lines)


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


COMMAND = Command(
    "pretrain",
    pretrain,
    panel="Core",
    order=10,
    example=(
        "wb pretrain tiny.toml\n"
        "wb pretrain tiny.toml optim.lr=1e-3 parallel.tp=2 --nproc 2\n"
        "torchrun --nproc-per-node 8 -m workbench.cli.main pretrain tiny.toml"
    ),
)
