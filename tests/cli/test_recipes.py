"""`wb recipes` lists, shows and copies presets and examples."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from pretrain.presets import CATALOGUE, PRESETS
from workbench.cli.main import main
from workbench.cli.recipes import EXAMPLES
from workbench.spec.model import ModelConfig

ROOT = Path(__file__).parents[2]


def answer(capsys, *words: str) -> dict:
    """The object that a command prints with --json."""
    capsys.readouterr()
    assert main(["recipes", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_all_presets_and_examples_are_listed_under_names_of_their_own(capsys):
    found = answer(capsys, "ls")
    assert list(found["presets"]) == list(CATALOGUE)
    assert found["presets"]["gpt2"] == {"num_parameters": 124439808, "source": "openai-community/gpt2"}
    assert set(found["examples"]) == {path.stem for path in EXAMPLES.glob("*.toml")}
    assert not set(found["presets"]) & set(found["examples"])
    assert main(["recipes", "ls"]) == 0
    assert "llama3.1-8b" in (shown := capsys.readouterr().out) and "8.03B  meta-llama/Llama-3.1-8B" in shown


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_reads_back_from_what_is_shown(capsys, name):
    shown = tomllib.loads(answer(capsys, "cat", name)["toml"])
    assert ModelConfig.model_validate(shown["model"]) == ModelConfig.model_validate(dict(PRESETS[name]))


def test_an_example_is_copied_as_it_is_and_no_file_replaced(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert answer(capsys, "cp", "pretrain") == {"name": "pretrain", "path": "pretrain.toml"}
    assert Path("pretrain.toml").read_text() == (EXAMPLES / "pretrain.toml").read_text()
    assert main(["recipes", "cp", "gpt2", "pretrain.toml"]) == 2
    assert "pretrain.toml exists and is left as it is" in capsys.readouterr().err
    assert main(["recipes", "cp", "gpt2", "nowhere/a.toml"]) == 2
    assert "nowhere is not a folder" in capsys.readouterr().err


def test_an_unknown_recipe_is_answered_with_the_nearest(capsys):
    assert main(["recipes", "cat", "lama3.1-8b"]) == 2
    assert "'lama3.1-8b' is no recipe; did you mean 'llama3.1-8b'?" in capsys.readouterr().err


def test_the_page_of_presets_is_current(capsys):
    assert main(["recipes", "ls", "--markdown"]) == 0
    shown = capsys.readouterr().out
    assert shown == (ROOT / "docs" / "presets.md").read_text(), "run: wb recipes ls --markdown > docs/presets.md"
