"""`wb inspect`: what a checkpoint holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.cli import _options as option
from workbench.cli.common import Command, Output, as_lines, count_text, size_text

if TYPE_CHECKING:
    from converters.format import OpenedCheckpoint


def inspect(
    out: Output,
    path: Annotated[Path, typer.Argument(help="A checkpoint, a run folder or a folder of another format.")],
    tensors: Annotated[str, typer.Option(help="List the tensors whose names match this pattern.")] = "",
    vocab_size: option.VocabSize = None,
) -> None:
    """Show what a checkpoint holds: format, layout, step, sizes. Reads headers only; safe on untrusted files."""
    from fnmatch import fnmatchcase

    from converters.open import open_checkpoint
    from workbench.errors import ConfigError

    opened = open_checkpoint(path, vocab_size=vocab_size)
    result = _summary(opened)
    text = as_lines(_shown(result))
    if tensors:
        names = [name for name in opened.source.schema if fnmatchcase(name, tensors)]
        if not names:
            raise ConfigError(f"--tensors {tensors!r} matches none of {len(opened.source.schema)} tensors of {path}")
        listed = [_tensor(opened, name) for name in names]
        result["matches"] = listed
        text = "\n".join(_line(tensor) for tensor in listed)
    out.result(result, text=text)


def _summary(opened: OpenedCheckpoint) -> dict[str, Any]:
    from converters.plan import tensor_bytes
    from workbench.spec.schema import OPTIMIZER_PREFIX

    schema = opened.source.schema.values()
    weights = [tensor for tensor in schema if not tensor.name.startswith(OPTIMIZER_PREFIX)]
    moments = sorted({t.name.split("/")[0] for t in schema if t.name.startswith(OPTIMIZER_PREFIX)})
    training = opened.training
    return {
        "path": str(opened.path),
        "format": opened.format,
        "family": opened.family,
        "layout": opened.layout.model_dump(mode="json") if opened.layout else None,
        "step": training.step if training else None,
        "tokens": training.tokens if training else None,
        "parameters": sum(tensor.numel for tensor in weights),
        "dtypes": sorted({tensor.dtype for tensor in weights}),
        "weight_bytes": sum(map(tensor_bytes, weights)),
        "tensors": len(weights),
        "optimizer": dict(training.optimizer) if training else {},
        "moments": moments,
        "optimizer_bytes": sum(tensor_bytes(t) for t in schema if t.name.startswith(OPTIMIZER_PREFIX)),
        "adapter": opened.adapter.model_dump(mode="json") if opened.adapter else None,
        "tokenizer": str(opened.tokenizer) if opened.tokenizer else None,
        "model": opened.model.model_dump(mode="json", exclude_defaults=True),
        "parents": [f"{p.get('operation')} of {p.get('path')}" for p in opened.lineage if "operation" in p],
        "optimizer_fault": opened.optimizer_fault,
        **opened.info,
    }


def _shown(result: dict[str, Any]) -> dict[str, Any]:
    """The summary for people: sizes with units, nothing that is absent."""
    shown = {key: value for key, value in result.items() if value not in (None, [], {})}
    if result["layout"]:
        layout = (f"{key}={value}" for key, value in result["layout"].items() if value is not None)
        shown["layout"] = " ".join(layout)
    shown["parameters"] = f"{count_text(result['parameters'])} ({result['parameters']:,})"
    shown["weight_bytes"] = size_text(result["weight_bytes"])
    shown["optimizer_bytes"] = size_text(result["optimizer_bytes"])
    for key in ("dtypes", "moments", "parents"):
        if key in shown:
            shown[key] = ", ".join(map(str, shown[key]))
    return {key.replace("_", " "): value for key, value in shown.items()}


def _tensor(opened: OpenedCheckpoint, name: str) -> dict[str, Any]:
    tensor = opened.source.schema[name]
    return {
        "name": name,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "pieces": len(opened.source.chunks(name)),
        "fingerprint": opened.fingerprints.get(name),
    }


def _line(tensor: dict[str, Any]) -> str:
    pieces = f"{tensor['pieces']} piece{'s' if tensor['pieces'] != 1 else ''}"
    return f"{tensor['name']}  {tensor['dtype']} {tensor['shape']}  {pieces}  {tensor['fingerprint'] or ''}".rstrip()


COMMAND = Command(
    "inspect",
    inspect,
    panel="Models",
    order=30,
    example="wb inspect runs/tiny\nwb inspect my-model --tensors 'layers.0.*'",
)
