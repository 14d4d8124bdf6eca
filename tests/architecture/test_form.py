"""Budgets of size, and names that have no place in the core."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("workbench", "converters", "pretrain", "finetune")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 8
FAMILIES = re.compile(
    r"llama|gpt-?[2j]|gptneo|mistral|mixtral|qwen|bert|gemma|phi-?\d|falcon|deepseek|olmo", re.IGNORECASE
)


def sources(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_no_file_is_longer_than_its_budget():
    lengths = {path: len(path.read_text().splitlines()) for path in sources(*PACKAGES, "tests", "benchmarks")}
    too_long = {str(path.relative_to(ROOT)): count for path, count in lengths.items() if count > MAX_FILE_LINES}
    assert not too_long


def test_no_function_is_longer_than_its_budget():
    too_long = {}
    for path in sources(*PACKAGES):
        for function in functions(path):
            assert function.end_lineno is not None
            length = function.end_lineno - function.lineno + 1
            if length > MAX_FUNCTION_LINES and not is_command(path):
                too_long[f"{path.relative_to(ROOT)}:{function.lineno} {function.name}"] = length
    assert not too_long


def test_no_function_takes_more_parameters_than_its_budget():
    too_many = {}
    for path in sources(*PACKAGES):
        for function in functions(path):
            arguments = function.args
            names = [one.arg for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
            count = len([name for name in names if name not in ("self", "cls")])
            if count > MAX_PARAMETERS and not is_command(path):
                too_many[f"{path.relative_to(ROOT)}:{function.lineno} {function.name}"] = count
    assert not too_many


def is_command(path: Path) -> bool:
    """Whether the parameters of a function there may be the options of a command, whose number its user sets."""
    return path.parent == ROOT / "workbench" / "cli"


def test_the_core_names_features_and_no_model_family():
    """A family is a table in converters/families; the CLI, which names examples and presets, is not the core."""
    named = []
    for path in sources("workbench"):
        if is_command(path):
            continue
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            code = line.partition("#")[0]
            # A source that fixed a constant is cited by its name: (GPT-2, sec. 2.3), modeling_rope_utils.py.
            if FAMILIES.search(code) and not is_citation(code):
                named.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not named


def is_citation(line: str) -> bool:
    return bool(re.search(r"sec\.|\.py\b|[Pp]aper|_compute_", line))
