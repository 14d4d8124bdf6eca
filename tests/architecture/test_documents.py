"""What the documents tell a reader to type is what `wb` understands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from workbench.cli import app
from workbench.cli.app import build
from workbench.cli.common import Group
from workbench.registry import load, module_names

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```[a-z]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands_in(text: str) -> Iterator[str]:
    """The `wb` commands of a text, one a line, without prompts and comments; a `\\` joins lines."""
    for line in text.replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|;|\|", line):
            found = part.strip().removeprefix("$ ").strip()
            if re.match(r"wb [a-z-]", found):
                yield re.split(r"\s#\s|\s>\s", found)[0].strip()


def documented() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for block in FENCE.findall(page.read_text()):
            found += [(str(page.relative_to(ROOT)), command) for command in commands_in(block)]
    for module in module_names(app.PACKAGE, app.HELPERS):
        entry = load(app.PACKAGE, module, "COMMAND")
        for command in entry.commands if isinstance(entry, Group) else (entry,):
            found += [(f"wb {command.name} --help", line) for line in commands_in(command.example)]
    return found


@pytest.mark.parametrize("place, command", documented())
def test_every_documented_command_is_one_that_wb_understands(place, command):
    words = shlex.split(command)[1:]
    if words[0].startswith("-"):
        return
    group = get_command(build(words))
    parse(group, words)


def parse(command, words, parent=None):
    """Parses words as the command line does, without running anything; a usage error is raised."""
    context = command.make_context("wb" if parent is None else command.name, list(words), parent=parent)
    if hasattr(command, "resolve_command"):
        rest = [*context._protected_args, *context.args]
        _, inner, rest = command.resolve_command(context, rest)
        parse(inner, rest, context)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("command", ["reshard a b --no-such-flag", "inspect", "data biuld x y"])
def test_a_command_that_wb_does_not_understand_is_noticed(command):
    with pytest.raises(typer.TyperException):
        parse(get_command(build(command.split())), command.split())
