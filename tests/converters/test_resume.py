"""A killed conversion goes on where it was: the result is byte-equal to that of an undisturbed run."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from tests.helpers.checkpoints import random_native, tiny_model
from tests.helpers.killed import Forks, copied_names, kill_after, same_folders
from workbench.checkpoint.writer import JOURNAL
from workbench.cli.main import main
from workbench.spec.layout import ParallelLayout

TARGETS = {"native": ["reshard", "--tp", "4", "--pp", "1"], "huggingface": ["export", "--verify", "crc"]}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("source") / "a"
    random_native(path, tiny_model(hidden_size=64, intermediate_size=96), ParallelLayout(tp=2, pp=2))
    return path


def words_for(kind: str, source: Path, target: Path) -> list[str]:
    command, *options = TARGETS[kind]
    return [command, str(source), str(target), *options, "-q"]


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("undisturbed")
    for kind in TARGETS:
        assert main(words_for(kind, source, folder / kind)) == 0
    return {kind: folder / kind for kind in TARGETS}


@pytest.mark.parametrize("kind", TARGETS)
def test_what_was_noted_before_a_kill_is_not_copied_again(source, tmp_path, monkeypatch, undisturbed, kind):
    words = words_for(kind, source, tmp_path / kind)
    assert kill_after(12, [*words, "--workers", "1"]) == -9
    noted = (tmp_path / f"{kind}.partial" / JOURNAL).read_text().splitlines()[1:]
    copied = copied_names(monkeypatch)
    assert main([*words, "--resume"]) == 0
    units = len(json.loads((undisturbed["native"] / "manifest.json").read_text())["tensors"])
    assert len(noted) == 12 and (kind != "native" or len(copied) == units - 12)
    assert same_folders(tmp_path / kind, undisturbed[kind])


@pytest.mark.parametrize("kind", TARGETS)
def test_what_is_noted_but_lost_is_copied_again(source, tmp_path, monkeypatch, undisturbed, kind):
    words = words_for(kind, source, tmp_path / kind)
    assert kill_after(12, words) == -9
    for file in (tmp_path / f"{kind}.partial").rglob("*.safetensors"):
        size, start = file.stat().st_size, 8 + int.from_bytes(file.read_bytes()[:8], "little")
        with file.open("r+b") as opened:  # as a loss of power may leave it
            opened.truncate(start)
            opened.truncate(size)
    copied = copied_names(monkeypatch)
    assert main([*words, "--resume"]) == 0
    assert len(copied) > 12
    assert same_folders(tmp_path / kind, undisturbed[kind])


def test_a_line_that_the_kill_has_cut_short_does_not_count(source, tmp_path, undisturbed):
    words = words_for("native", source, tmp_path / "x")
    assert kill_after(5, words) == -9
    journal = tmp_path / "x.partial" / JOURNAL
    journal.write_bytes(journal.read_bytes()[:-7])
    assert main([*words, "--resume"]) == 0
    assert same_folders(tmp_path / "x", undisturbed["native"])


def test_resume_refuses_another_plan_or_source_with_both_digests(source, tmp_path, capsys):
    words = words_for("native", source, tmp_path / "x")
    assert kill_after(5, words) == -9
    assert main([*words, "--resume", "--tp", "1"]) == 2
    assert "x.partial: was begun with another plan (digest " in capsys.readouterr().err
    touched = tmp_path / "touched"
    shutil.copytree(source, touched)
    assert kill_after(5, words_for("native", touched, tmp_path / "y")) == -9
    os.utime(touched / "model-tp00-pp00.safetensors", (1, 1))
    assert main([*words_for("native", touched, tmp_path / "y"), "--resume"]) == 2
    assert "y.partial: was begun with another source (digest " in capsys.readouterr().err
    assert (tmp_path / "y.partial" / JOURNAL).exists(), "nothing is lost by a refusal"


def test_without_resume_it_starts_again_and_with_nothing_left_it_starts(source, tmp_path, monkeypatch, undisturbed):
    words = words_for("native", source, tmp_path / "x")
    assert kill_after(5, words) == -9
    copied = copied_names(monkeypatch)
    assert main(words) == 0
    first = len(copied)
    assert main([*words_for("native", source, tmp_path / "y"), "--resume"]) == 0
    assert len(copied) == 2 * first
    assert same_folders(tmp_path / "x", undisturbed["native"]) and same_folders(tmp_path / "y", undisturbed["native"])


def kill_often(kind: str, source: Path, folder: Path, undisturbed: Path, kills: int) -> int:
    """Kills at random moments and resumes, again and again; the number of results that were finished and compared."""
    target = folder / kind
    forks = Forks([*words_for(kind, source, target), "--resume"], seed=kills)
    started = time.monotonic()
    assert forks.run() == 0
    seconds, finished = (time.monotonic() - started) * 1.1, 0
    shutil.rmtree(target)
    for _ in range(kills):
        status = forks.run(seconds=seconds)
        assert status in (0, 9)
        if target.exists():  # killed after the rename, or not at all
            assert same_folders(target, undisturbed)
            shutil.rmtree(target)
            finished += 1
    if (folder / f"{kind}.partial").exists():
        assert forks.run() == 0
        assert same_folders(target, undisturbed)
        finished += 1
    return finished


@pytest.mark.parametrize("kind", TARGETS)
def test_kills_at_random_moments_change_no_byte(source, tmp_path, undisturbed, kind):
    kill_often(kind, source, tmp_path, undisturbed[kind], 4)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", TARGETS)
def test_a_hundred_kills_at_random_moments_change_no_byte(source, tmp_path, undisturbed, kind):
    assert kill_often(kind, source, tmp_path, undisturbed[kind], 100) > 1
