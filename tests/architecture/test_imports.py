"""Who imports whom, and what stays free of torch."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "peft", "megatron", "tensorboard")
TORCH_FREE = (
    "workbench.errors",
    "workbench.config",
    "workbench.registry",
    "workbench.log",
    "workbench.run_folder",
    "workbench.tokenizer",
    "workbench.spec.*",
    "workbench.checkpoint.*",
    "converters.*",
    "converters.families.*",
    "converters.formats.*",
    "converters.untrusted.*",
    "pretrain.config",
    "pretrain.presets",
    "pretrain.lr",
    "pretrain.schedules.*",
    "pretrain.simulate",
    "pretrain.data.config",
    "finetune.config",
)
WITH_TORCH = frozenset({"converters.logits", "converters.logits_probe"})
"""Modules of those packages that compute with a model, so that torch is what they are for."""


def imported_by(modules: list[str]) -> set[str]:
    """The top-level packages that a fresh process has loaded after importing `modules`."""
    program = (
        "import importlib, json, sys\n"
        "for name in json.loads(sys.argv[1]):\n"
        "    importlib.import_module(name)\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(modules)], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def modules_of(pattern: str) -> list[str]:
    """The modules that a name or a `package.*` stands for, those that exist."""
    if not pattern.endswith(".*"):
        try:
            return [pattern] if importlib.util.find_spec(pattern) else []
        except ModuleNotFoundError:
            return []
    package = pattern.removesuffix(".*")
    folder = ROOT / package.replace(".", "/")
    return [f"{package}.{path.stem}" for path in sorted(folder.glob("*.py")) if path.stem != "__init__"]


def test_no_command_module_imports_anything_heavy():
    commands = modules_of("workbench.cli.*")
    loaded = imported_by(commands)
    assert not loaded & {*HEAVY, "numpy", "pydantic", "safetensors", "tokenizers"}, "import it inside the command"


def test_what_works_without_torch_does_not_import_it():
    modules = [name for pattern in TORCH_FREE for name in modules_of(pattern) if name not in WITH_TORCH]
    assert len(modules) > 20
    loaded = imported_by(modules)
    if loaded & set(HEAVY):
        guilty = [name for name in modules if imported_by([name]) & set(HEAVY)]
        pytest.fail(f"these import one of {HEAVY}: {', '.join(guilty)}")


@pytest.mark.parametrize("package", ["workbench", "converters", "pretrain", "finetune"])
def test_importing_a_package_imports_nothing_else(package):
    assert (ROOT / package / "__init__.py").read_text() == ""


def test_the_import_contracts_hold():
    program = str(Path(sys.executable).parent / "lint-imports")
    done = subprocess.run([program, "--no-cache", "--no-logo"], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_contracts_place_every_package_of_the_core():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    placed = {name.strip(" ()") for layer in contracts[0]["layers"] for name in layer.split("|")}
    folders = {path.parent for path in (ROOT / "workbench").glob("*/__init__.py")}
    files = set((ROOT / "workbench").glob("*.py")) - {ROOT / "workbench" / "__init__.py"}
    assert placed - {"converters", "pretrain", "finetune"} == {f"workbench.{path.stem}" for path in folders | files}
