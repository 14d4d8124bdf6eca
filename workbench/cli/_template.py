"""A configuration to start from: what must be set is set, everything else is there as a comment with its default."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workbench.cli._tables import Key, Table, models, presets, tables, toml

FIRST = ("", "model", "data", "task", "method", "run", "batch", "parallel", "optim")
NOT_SET = "(not set)"
PRESET = "llama-tiny"


def template(kind: str, name: str) -> str:
    """The text of a TOML file for `wb pretrain` or `wb finetune`; `name` names its run."""
    chosen = _starting_values(kind, name)
    found = [one for one in tables(models()[kind]) if one.keys and _is_chosen(one, chosen.get(one.header, {}))]
    found.sort(key=_place)
    head = [
        f"# A run of `wb {kind}`; start it with: wb {kind} {name}.toml",
        "# Lines that are commented out show the defaults. `wb check` says whether everything fits.",
    ]
    return "\n".join([*head, *(_table(one, chosen.get(one.header, {})) for one in found)]) + "\n"


def _place(table: Table) -> int:
    outermost = table.header.strip("[]").partition(".")[0]
    return FIRST.index(outermost) if outermost in FIRST else len(FIRST)


def _starting_values(kind: str, name: str) -> dict[str, dict[str, Any]]:
    """What has no default, and what one changes first, by table and key."""
    run = {"dir": f"runs/{name}", "steps": 1000}
    if kind == "finetune":
        return {
            "": {"base": "runs/pretrain"},
            "task": {"kind": "sft", "train": "train.jsonl"},
            "method": {"kind": "lora"},
            "run": run,
            "optim": {"lr": 1e-4, "weight_decay": 0.0},
        }
    return {
        "model": {"preset": PRESET},
        "data": {"train": "data/corpus-train", "valid": "data/corpus-valid", "tokenizer": "data/tokenizer"},
        "run": run,
    }


def _is_chosen(table: Table, values: Mapping[str, Any]) -> bool:
    """Of a table that may be of several kinds, only the chosen one is shown."""
    kinds = [key.default for key in table.keys if key.name == "kind" and key.default]
    return not kinds or kinds == [toml(values.get("kind", ""))]


def _table(table: Table, values: Mapping[str, Any]) -> str:
    optional = not values and (table.header.startswith("[") or any(key.default is None for key in table.keys))
    header = [f"[{table.header}]"] if table.header else []
    lines = ["", f"# {table.help}", *(f"# {line}" if optional else line for line in header)]
    if "preset" in values:
        lines.append(f"preset = {toml(values['preset'])}  # or another that `wb recipes ls` shows")
    shape = presets().get(table.header, {}).get(values.get("preset", ""), {})
    lines += [_line(key, values, shape) for key in table.keys]
    return "\n".join(lines)


def _line(key: Key, values: Mapping[str, Any], shape: Mapping[str, Any]) -> str:
    note = f"{key.help.rstrip('.')} ({key.kind})" if key.help else key.kind
    if key.name in values:
        return f"{key.name} = {toml(values[key.name])}  # {note}"
    default = toml(shape[key.name]) if key.name in shape else key.default
    return f"# {key.name} = {default or NOT_SET}  # {note}"
