"""`wb schema`: the configuration for editors and for readers."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated

import typer

from workbench.cli.common import Command, Output


class Kind(StrEnum):
    """Which configuration."""

    ALL = "all"
    PRETRAIN = "pretrain"
    FINETUNE = "finetune"


def schema(
    out: Output,
    kind: Annotated[Kind, typer.Option("--for", help="The command whose keys to describe.")] = Kind.ALL,
    markdown: Annotated[bool, typer.Option("--markdown", help="A page to read instead: docs/config.md.")] = False,
) -> None:
    """Print the JSON schema of the configuration, for editors that complete and check TOML."""
    from workbench.cli._reference import json_schema, reference

    if markdown:
        text = reference()
        out.result({"markdown": text}, text=text.rstrip("\n"))
        return
    found = json_schema(kind.value)
    out.result(found, text=json.dumps(found, indent=2))


COMMAND = Command("schema", schema, panel="Start", order=50, example="wb schema > workbench.schema.json")
