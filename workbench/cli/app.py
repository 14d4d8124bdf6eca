"""The Typer application, made of whatever command modules lie in this folder."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from workbench import registry
from workbench.cli.common import Command, Group, Output, only_json_on_stdout, run_command

PACKAGE = "workbench.cli"
HELPERS = ("app", "main", "common", "progress")
PANELS = ("Core", "Models", "Data", "Runs", "Start")
EPILOG = (
    "Exit codes: 0 done; 2 usage or config; 3 not representable; 4 verification failed; 5 source unreadable; "
    "6 not enough space, memory or ranks; 130 interrupted."
)


def build(words: Sequence[str]) -> typer.Typer:
    """The application that answers `words`: one command when the first word names it, else all of them.

    Only the modules that are needed are imported, so a command starts as fast with fifty neighbours as with none.
    """
    modules = registry.module_names(PACKAGE, HELPERS)
    chosen = [name for name in modules if words and _module_of(words[0]) == name.rstrip("_")] or modules
    declared = [registry.load(PACKAGE, name, "COMMAND") for name in chosen]
    declared.sort(key=lambda item: (PANELS.index(item.panel), item.order, item.name))
    app = typer.Typer(
        name="wb",
        cls=_in_order([command.name for command in declared]),
        add_completion=False,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
    )
    app.callback(epilog=EPILOG)(_about)
    for command in declared:
        if isinstance(command, Group):
            app.add_typer(_group(command), name=command.name, help=command.help, rich_help_panel=command.panel)
        else:
            _add(app, command, rich_help_panel=command.panel)
    return app


def is_command(word: str) -> bool:
    """Whether `word` is the name of a command or of a group of them."""
    return _module_of(word) in {name.rstrip("_") for name in registry.module_names(PACKAGE, HELPERS)}


def _module_of(word: str) -> str:
    return word.replace("-", "_")


def _in_order(names: list[str]) -> type[TyperGroup]:
    """The class of a group that lists its commands in this order; Typer's own puts groups behind commands."""

    class InOrder(TyperGroup):
        def list_commands(self, ctx: Any) -> list[str]:
            return sorted(super().list_commands(ctx), key=names.index)

    return InOrder


def _about() -> None:
    """Pretrain, reshard, finetune and export language models. `wb COMMAND --help` shows an example of each."""


def _group(group: Group) -> typer.Typer:
    app = typer.Typer(add_completion=False, rich_markup_mode="rich", no_args_is_help=False)
    app.callback()(lambda: None)
    for command in group.commands:
        _add(app, command, rich_help_panel=None)
    return app


def _add(app: typer.Typer, command: Command, *, rich_help_panel: str | None) -> None:
    examples = "\n\n".join(f"  {line}" for line in command.example.strip().splitlines())
    epilog = f"[bold]Example[/bold]\n\n{examples}" if examples else None
    register: Any = app.command(command.name, epilog=epilog, rich_help_panel=rich_help_panel)
    register(_with_common_options(command.run))


def _with_common_options(run: Callable[..., int | None]) -> Callable[..., int]:
    """`run` without its Output parameter, and with --json, -q and -v; returns the exit code."""

    @functools.wraps(run)
    def call(*, as_json: bool, quiet: bool, verbose: bool, **values: Any) -> int:
        if not as_json:
            out = Output(quiet=quiet, verbose=verbose)
            return run_command(lambda: run(out, **values), out)
        with only_json_on_stdout() as stdout:
            out = Output(json=True, quiet=quiet, verbose=verbose, stdout=stdout)
            return run_command(lambda: run(out, **values), out)

    first, *own = inspect.signature(run, eval_str=True).parameters.values()
    assert first.name == "out", f"the first parameter of {run.__module__}.{run.__name__} must be `out: Output`"
    parameters = [*(one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own), *_common_options()]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {one.name: one.annotation for one in parameters}
    del call.__wrapped__
    return call


def _common_options() -> list[inspect.Parameter]:
    options = (
        ("as_json", ("--json",), "Print one JSON object on stdout and nothing else."),
        ("quiet", ("--quiet", "-q"), "Print the result and nothing else."),
        ("verbose", ("--verbose", "-v"), "Say more; with an error, where it happened."),
    )
    return [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=False,
            annotation=Annotated[bool, typer.Option(*words, help=text, rich_help_panel="Output")],
        )
        for name, words, text in options
    ]
