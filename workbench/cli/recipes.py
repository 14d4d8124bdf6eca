"""`wb recipes`: the models and the example runs that one may start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from workbench.cli.common import Command, Group, Output, count_text

EXAMPLES = Path(__file__).parents[2] / "examples"
INTRODUCTION = """# Presets

<!-- Written by `wb recipes ls --markdown > docs/presets.md`; a test keeps it current. -->

What `model.preset` may name; other keys of `[model]` go before it. `wb recipes cat NAME` shows the features, and
`wb recipes cp NAME FILE` writes them as a table to change. A published shape has the values of `config.json` in its
repository on huggingface.co; its weights are read with `wb import`.

| preset | parameters | source |
|---|---|---|"""
Name = Annotated[str, typer.Argument(help="A name that `wb recipes ls` shows.")]


def ls(
    out: Output,
    markdown: Annotated[bool, typer.Option("--markdown", help="A page to read instead: docs/presets.md.")] = False,
) -> None:
    """List presets of models with their size and source, and example configurations."""
    presets, about = _presets(), {name: _first_comment(path) for name, path in _examples().items()}
    if markdown:
        rows = [f"| `{n}` | {p['num_parameters']:,} | {p['source'] or 'ours'} |" for n, p in presets.items()]
        text = "\n".join([INTRODUCTION, *rows])
    else:
        rows = [f"{n:<24}{count_text(p['num_parameters']):>7}  {p['source']}".rstrip() for n, p in presets.items()]
        text = "\n".join([*rows, *(f"{name:<33}{line}" for name, line in about.items())])
    out.result({"presets": presets, "examples": about}, text=text)


def cat(out: Output, name: Name) -> None:
    """Print a recipe as TOML: the [model] table of a preset, or an example configuration."""
    text = _recipe(name)
    out.result({"name": name, "toml": text}, text=text.rstrip("\n"))


def cp(
    out: Output, name: Name, path: Annotated[Path | None, typer.Argument(help="The file to write; ./NAME.toml.")] = None
) -> None:
    """Write a recipe to a TOML file; never replaces a file."""
    from workbench.errors import ConfigError

    text, target = _recipe(name), path or Path(f"{name}.toml")
    if target.exists():
        raise ConfigError(f"{target} exists and is left as it is; name another file, or remove it first")
    if not target.parent.is_dir():
        raise ConfigError(f"{target.parent} is not a folder; make it first, or name another file")
    with target.open("x", encoding="utf-8") as file:
        file.write(text)
    out.result({"name": name, "path": str(target)}, text=f"wrote {target}")


def _presets() -> dict[str, dict[str, Any]]:
    from pretrain.presets import CATALOGUE
    from workbench.spec.model import ModelConfig
    from workbench.spec.schema import num_parameters

    return {
        name: {"num_parameters": num_parameters(ModelConfig.model_validate(preset.features)), "source": preset.source}
        for name, preset in CATALOGUE.items()
    }


def _examples() -> dict[str, Path]:
    return {path.stem: path for path in sorted(EXAMPLES.glob("*.toml"))}


def _first_comment(path: Path) -> str:
    """The first line of an example, which says what it is."""
    return path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")


def _recipe(name: str) -> str:
    """The TOML text of a preset or an example; ConfigError with the nearest name when there is neither."""
    from difflib import get_close_matches

    from pretrain.presets import CATALOGUE
    from workbench.cli._tables import toml
    from workbench.errors import ConfigError

    if name in _examples():
        return _examples()[name].read_text(encoding="utf-8")
    if name not in CATALOGUE:
        near = get_close_matches(name, [*CATALOGUE, *_examples()], n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"{name!r} is no recipe; {hint}`wb recipes ls` shows all")
    preset = CATALOGUE[name]
    lines = [f"# {name}" + (f", published as {preset.source}" if preset.source else ""), "[model]"]
    lines += [f"{key} = {toml(value)}" for key, value in preset.features.items()]
    return "\n".join(lines) + "\n"


COMMAND = Group(
    "recipes",
    "List, show and copy what one may start from: presets of models and example configurations.",
    (
        Command("ls", ls, example="wb recipes ls\nwb recipes ls --json"),
        Command("cat", cat, example="wb recipes cat llama3.1-8b"),
        Command("cp", cp, example="wb recipes cp qwen3-0.6b my-model.toml\nwb recipes cp pretrain"),
    ),
    panel="Start",
    order=30,
)
