"""The configuration described: as a JSON schema and as the page docs/config.md."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from workbench.cli._tables import Table, models, presets, tables

INTRODUCTION = """\
# Configuration

<!-- Written by `wb schema --markdown > docs/config.md`; a test keeps it current. Edit the models, not this page. -->

One TOML file describes a run. `wb init FILE` writes one with every key and its default, `wb check FILE` says whether it
fits together, and `wb schema` prints the JSON schema for editors.

- **Precedence**: defaults < `preset` < the file < `key=value` on the command line: `wb pretrain tiny.toml optim.lr=1e-3
  model.num_hidden_layers=8`. Values are TOML; plain text needs no quotes there.
- **Nothing is ignored.** An unknown key, a wrong type or a value out of range is an error with file, line and the
  nearest name, and all of them are listed at once, before any process starts (exit code 2). Text is never read as a
  number.
- `[[table]]` is a list of tables. A table with a `kind` has the keys of that kind.
"""
CHAPTERS = {
    "shared": "## Every run\n\nThe tables that `wb pretrain` and `wb finetune` both read.",
    "pretrain": "## wb pretrain",
    "finetune": "## wb finetune",
}


def json_schema(kind: str) -> dict[str, Any]:
    """The JSON schema (2020-12) of the files that a command reads; 'all' describes any file."""
    chosen = models() if kind == "all" else {kind: models()[kind]}
    schema: dict[str, Any] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Workbench configuration" if kind == "all" else f"Configuration of wb {kind}",
        "type": "object",
        "additionalProperties": False,
        "properties": {},
        "$defs": {},
    }
    for model in chosen.values():
        found = model.model_json_schema()
        schema["properties"] |= found["properties"]
        schema["$defs"] |= found.get("$defs", {})
        if kind != "all":
            schema["required"] = found.get("required", [])
    for table, known in presets().items():
        if table in schema["properties"]:
            _add_preset(schema, table, list(known))
    return schema


def _add_preset(schema: dict[str, Any], table: str, names: list[str]) -> None:
    """Lets a table name a preset, which then stands for the keys that it would have to have."""
    definition = schema["$defs"][schema["properties"][table]["$ref"].rpartition("/")[2]]
    required = definition.pop("required", [])
    definition["properties"] = {"preset": {"enum": names, "title": "Preset"}, **definition["properties"]}
    definition["anyOf"] = [{"required": ["preset"]}, {"required": required}]


def reference() -> str:
    """The text of docs/config.md."""
    found = {kind: list(tables(model)) for kind, model in models().items()}
    shared = [one for one in found["pretrain"] if one in found["finetune"]]
    parts = [INTRODUCTION, CHAPTERS["shared"], *map(_section, shared)]
    for kind, all_of_it in found.items():
        parts += [CHAPTERS[kind], *map(_section, (one for one in all_of_it if one not in shared))]
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def _section(table: Table) -> str:
    if not table.keys:
        return f"{table.help}" if not table.header else ""
    title = f"### `[{table.header}]`" if table.header else "### Top of the file"
    kinds = [key.default for key in table.keys if key.name == "kind" and key.default]
    if kinds:
        title += f" with `kind = {kinds[0]}`"
    return "\n".join([title, "", table.help, "", *_rows(table)])


def _rows(table: Table) -> Iterator[str]:
    yield "| key | value | default | what it does |"
    yield "|---|---|---|---|"
    if table.header in presets():
        yield "| `preset` | one of [the presets](presets.md) | not set | Values to start from; others go before it. |"
    for key in table.keys:
        default = "**required**" if key.default is None else f"`{key.default}`" if key.default else "not set"
        yield f"| `{key.name}` | {_escaped(key.kind)} | {default} | {_escaped(key.help)} |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
