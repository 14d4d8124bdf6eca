"""`wb init`: a configuration to start from."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from workbench.cli.common import Command, Output


class Kind(StrEnum):
    """What a configuration is for."""

    PRETRAIN = "pretrain"
    FINETUNE = "finetune"


def init(
    out: Output,
    path: Annotated[Path, typer.Argument(help="The TOML file to write.")] = Path("pretrain.toml"),
    kind: Annotated[Kind, typer.Option("--for", help="The command that will read it.")] = Kind.PRETRAIN,
) -> None:
    """Write a commented configuration with every key and its default; never replaces a file."""
    from workbench.cli._template import template
    from workbench.errors import ConfigError

    if path.exists():
        raise ConfigError(f"{path} exists and is left as it is; name another file, or remove it first")
    if not path.parent.is_dir():
        raise ConfigError(f"{path.parent} is not a folder; make it first, or name another file")
    with path.open("x", encoding="utf-8") as file:
        file.write(template(kind.value, path.stem))
    out.result({"path": str(path), "for": kind.value}, text=f"wrote {path}\n{_next_steps(kind, path)}")


def _next_steps(kind: Kind, path: Path) -> str:
    if kind is Kind.FINETUNE:
        return f"set base and task.train in it, then: wb check {path} && wb finetune {path}"
    return (
        "its data, if you have none: wb tokenizer train stdlib:train data/tokenizer --vocab-size 2048\n"
        "                           wb data build stdlib:train data/corpus-train --tokenizer data/tokenizer\n"
        "                           wb data build stdlib:valid data/corpus-valid --tokenizer data/tokenizer\n"
        f"then: wb check {path} && wb pretrain {path}"
    )


COMMAND = Command("init", init, panel="Start", order=20, example="wb init tiny.toml\nwb init sft.toml --for finetune")
