"""`wb demo`: the whole story on the Python standard library, without a network, a GPU or a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from workbench.cli.common import Command, Output

MARK = "made-by-wb-demo"


def demo(
    out: Output,
    folder: Annotated[Path, typer.Argument(help="Where everything goes; an older demo there is replaced.")] = Path(
        "demo"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="The same story in under a minute, with worse numbers.")
    ] = False,
) -> None:
    """Pretrain, reshard, finetune and export a model of 1 M parameters, and follow one number all the way."""
    import os
    import shutil

    from workbench.errors import ConfigError

    if folder.exists() and any(folder.iterdir()) and not (folder / MARK).exists():
        raise ConfigError(f"{folder} exists and was not made by wb demo; name another folder: wb demo DIR")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / MARK).touch()

    # Its ranks are up to four, each of which would need a GPU of its own: the story is told on the CPU everywhere.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from workbench.cli._demo.configs import FULL, QUICK
    from workbench.cli._demo.story import Story

    out.interrupt_hint = f"what was made so far is in {folder}; run the same command to start again"
    story = Story(out, folder, QUICK if quick else FULL)
    found = story.tell()
    out.result(found, text=story.closing_line())


COMMAND = Command("demo", demo, panel="Start", order=10, example="wb demo\nwb demo /tmp/story --quick")
