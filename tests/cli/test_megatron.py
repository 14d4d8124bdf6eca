"""Megatron's rank folders at the terminal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.megatron_cases import Case
from tests.helpers.megatron_saved import LLAMA, save
from workbench.cli.main import main


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A run at tp=2 that does not tell how large its vocabulary is."""
    return save(Case(LLAMA, tp=2), tmp_path / "run", vocab_size=None)


def test_a_run_of_megatron_goes_to_native_and_back_at_another_layout(saved: Path, tmp_path: Path) -> None:
    native, again, folder = (str(tmp_path / name) for name in ("native", "again", "megatron"))
    assert main(["import", str(saved), native, "--vocab-size", "100", "--tp", "1", "-q"]) == 0
    assert main(["export", native, folder, "--to", "megatron", "--tp", "2", "--pp", "2", "--vpp", "2", "-q"]) == 0
    names = sorted(path.name for path in Path(folder, "release").iterdir())
    assert names == ["mp_rank_00_000", "mp_rank_00_001", "mp_rank_01_000", "mp_rank_01_001"]
    assert Path(folder, "latest_checkpointed_iteration.txt").read_text() == "release"
    assert main(["import", folder, again, "--tp", "4", "--pp", "1", "--vpp", "1", "-q"]) == 0
    assert main(["verify", native, again, "-q"]) == 0
    assert main(["verify", native, folder, "-q"]) == 0


def test_inspect_tells_format_layout_and_vocabulary(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(saved), "--vocab-size", "100", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["format"], found["layout"]["tp"], found["model"]["vocab_size"]) == ("megatron", 2, 100)


def test_the_vocabulary_that_nobody_tells_is_asked_for(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(saved)]) == 3
    assert "only padded_vocab_size=112; say how many words the tokenizer has" in capsys.readouterr().err


def test_a_format_without_a_layout_takes_no_options_of_one(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    native = str(tmp_path / "native")
    assert main(["import", str(saved), native, "--vocab-size", "100", "-q"]) == 0
    assert main(["export", native, str(tmp_path / "hf"), "--tp", "2", "--vocab-multiple", "8"]) == 2
    assert "--tp, --vocab-multiple: only folders of Megatron are written so" in capsys.readouterr().err
