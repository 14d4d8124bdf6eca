"""`wb export`: a checkpoint in the format of another program."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.cli import _options as option
from workbench.cli._start import quick_imports
from workbench.cli.common import Command, Output

if TYPE_CHECKING:
    from converters.format import OpenedCheckpoint
    from finetune.config import FinetuneConfig
    from workbench.checkpoint.source import TensorSource
    from workbench.cli._conversion import Report
    from workbench.spec.layout import ParallelLayout

_FORMATS = {
    "hf": "huggingface",
    "huggingface": "huggingface",
    "peft": "peft",
    "megatron": "megatron",
    "megatron-dist": "megatron_dist",
    "dcp": "dcp",
    "torchtitan": "torchtitan",
}
_FOR_INFERENCE = ("huggingface", "peft")
_WITH_LAYOUT = ("megatron", "megatron_dist")
_LAYERS = ("transformer_engine", "local")
_MEGATRON_MULTIPLE = 128  # --make-vocab-size-divisible-by, unless a run says otherwise


def export(
    out: Output,
    source: Annotated[Path, typer.Argument(help="A checkpoint at any layout, or a run folder (its latest).")],
    destination: option.NewFolder,
    to: Annotated[
        str,
        typer.Option(
            help="hf (a folder for transformers), peft (an adapter), megatron (a folder a rank), megatron-dist, dcp or "
            "torchtitan."
        ),
    ] = "hf",
    tp: option.Tp = None,
    pp: option.Pp = None,
    vpp: option.Vpp = None,
    ep: option.Ep = None,
    etp: option.Etp = None,
    pp_layout: option.PpLayout = "",
    vocab_multiple: option.VocabMultiple = None,
    transformer_impl: Annotated[
        str, typer.Option(help="Whose layers Megatron will have: transformer_engine, its default, or local.")
    ] = "",
    distributed_optimizer: Annotated[
        bool,
        typer.Option(
            "--distributed-optimizer", help="Write a folder a rank for Megatron's --use-distributed-optimizer."
        ),
    ] = False,
    base: Annotated[
        Path | None, typer.Option(help="Where the base of an adapter is, if not where it was in training.")
    ] = None,
    family: Annotated[str, typer.Option(help="The model family; found by the model's features by default.")] = "",
    dtype: option.WeightDtype = "",
    optimizer: Annotated[
        str, typer.Option(help="keep, drop or require its state; dropped for hf and peft, else kept.")
    ] = "",
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file: 5GB, 500MB.")] = "5GB",
    mem: option.CopyMem = "2GiB",
    workers: option.Workers = 2,
    allow_drop: option.AllowDrop = None,
    verify: Annotated[
        str, typer.Option(help=f"{option.VERIFY_HELP} By default logits with transformers or peft, else full.")
    ] = "",
    task_config: Annotated[
        Path | None,
        typer.Option(
            help="The TOML file of a task: what is written must score on its held-out rows as the engine does."
        ),
    ] = None,
    resume: option.Resume = False,
    dry_run: option.DryRun = False,
) -> None:
    """Write a checkpoint in another program's format; a Hugging Face folder is kept only if its logits agree."""
    with quick_imports():
        import converters.job  # noqa: F401 (wanted later, and quicker here)
        from converters.format import MegatronRun
        from converters.open import get_format, open_checkpoint
        from workbench.cli._conversion import Conversion, choice, convert, job_options
        from workbench.errors import ConversionError

        target = get_format(_FORMATS[choice(to, tuple(_FORMATS), "--to")])
    opened = open_checkpoint(source, family=family or None, allow_drop=allow_drop or ())
    if target.name == "peft" and opened.adapter is None:
        raise ConversionError(f"{opened.path}: holds a whole model and no adapter; export it with --to hf")
    if target.name != "peft":
        opened = _merged(opened, base)
    run = {"transformer_impl": transformer_impl, "distributed_optimizer": distributed_optimizer}
    asked = {"tp": tp, "pp": pp, "vpp": vpp, "ep": ep, "etp": etp, "pp_layout": pp_layout}
    asked |= {"vocab_multiple": vocab_multiple}
    options = job_options(
        _layout(opened, target.name, asked, run),
        dtype=dtype,
        optimizer=optimizer or ("drop" if target.name in _FOR_INFERENCE else "keep"),
        mem=mem,
        workers=workers,
        max_shard_size=max_shard_size,
        allow_drop=allow_drop or (),
    )
    own_layers = choice(transformer_impl or _LAYERS[0], _LAYERS, "--transformer-impl") == "local"
    options = replace(options, megatron=MegatronRun(own_layers, distributed_optimizer))

    for_inference = target.name in _FOR_INFERENCE
    verify = verify or ("logits" if for_inference else "full")
    task = _task(task_config, opened, proves=for_inference and verify == "logits")

    def proof(folder: Path, _: TensorSource) -> Sequence[Report]:
        return _prove(opened, options.dtype, base, folder, task)

    with_proof = proof if for_inference else None
    convert(out, Conversion(opened, target, destination, options, "export", verify, with_proof, dry_run, resume))
    if target.name == "huggingface" and not dry_run:
        _say_what_is_left_out(out, opened, destination)


def _layout(opened: OpenedCheckpoint, target: str, asked: dict[str, Any], run: dict[str, Any]) -> ParallelLayout:
    """The layout to write: what is not asked for is the source's; ConfigError when the target has none.

    run: what is asked for of the program that loads it, which likewise Megatron alone can be told.
    """
    from workbench.cli._conversion import new_layout
    from workbench.errors import ConfigError
    from workbench.spec.layout import ParallelLayout

    if target in _WITH_LAYOUT:
        return new_layout(opened, **asked | {"vocab_multiple": asked["vocab_multiple"] or _MEGATRON_MULTIPLE})
    if given := [f"--{name.replace('_', '-')}" for name, value in (asked | run).items() if value]:
        raise ConfigError(
            f"{', '.join(given)}: only folders of Megatron are written so; use --to megatron, or leave it out"
        )
    return ParallelLayout()


def _merged(opened: OpenedCheckpoint, base: Path | None) -> OpenedCheckpoint:
    """`opened`, or the model that the adapter in it makes of its base."""
    if opened.adapter is None:
        return opened
    from converters.merge import merge, open_base

    return merge(opened, open_base(opened, base))


def _say_what_is_left_out(out: Output, opened: OpenedCheckpoint, folder: Path) -> None:
    """One line if the written configuration lacks what the model was trained with."""
    from converters.family import detect_family
    from converters.formats._huggingface_files import CONFIG, read_json

    family = detect_family(read_json(folder / CONFIG), str(folder / CONFIG))
    if left_out := family.left_out(opened.model):
        said = ", ".join(f"model.{name}={value}" for name, value in left_out.items())
        out.say(f"used in training, and not part of {folder / CONFIG}: {said}")


def _task(path: Path | None, opened: OpenedCheckpoint, *, proves: bool) -> FinetuneConfig | None:
    """The task whose metrics are to be compared; ConfigError when they cannot be."""
    if path is None:
        return None
    from finetune.config import FinetuneConfig
    from workbench.cli._task_proof import require_judged
    from workbench.config import load_config
    from workbench.errors import ConfigError

    if not proves:
        raise ConfigError(
            "--task-config is judged by transformers or peft: use it --to hf or peft, with --verify logits"
        )
    config = load_config(path, FinetuneConfig, ()).config
    require_judged(config, opened.model.problem_type)
    return config


def _prove(
    opened: OpenedCheckpoint, dtype: str | None, base: Path | None, folder: Path, task: FinetuneConfig | None
) -> Sequence[Report]:
    """The comparison of what is exported, cast as it is written, with `folder`: of logits, and of a task's metrics."""
    from converters.cast import cast_to
    from converters.logits import compare_logits
    from workbench.cli._task_proof import compare_task

    ours = replace(opened, source=cast_to(opened.source, dtype))
    if opened.adapter is None:
        reports: list[Report] = [compare_logits(ours.model, ours.source, folder)]
        return reports if task is None else [*reports, compare_task(task, ours, folder)]
    from converters.merge import merge, open_base
    from converters.peft_proof import compare_with_peft, hugging_face_folder

    found = open_base(opened, base)
    wide = replace(found, source=cast_to(found.source, "F32"), fingerprints={})  # peft adds in fp32, without rounding
    reports = [compare_with_peft(ours, wide, folder)]
    if task is None:
        return reports
    with tempfile.TemporaryDirectory() as scratch:
        merged = merge(ours, wide, check_base=False)
        return [*reports, compare_task(task, merged, hugging_face_folder(wide, Path(scratch)), adapter=folder)]


COMMAND = Command(
    "export",
    export,
    panel="Core",
    order=40,
    example="wb export runs/tiny out/tiny-hf\nwb export runs/tiny out/tiny-bf16 --dtype bf16 --max-shard-size 2GB\n"
    "wb export runs/my-lora out/adapter --to peft --task-config my-lora.toml\n"
    "wb export runs/tiny out/megatron --to megatron --tp 2 --pp 2\n"
    "wb export runs/tiny out/tiny-dcp --to dcp",
)
