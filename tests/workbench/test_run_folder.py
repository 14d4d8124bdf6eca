"""The run folder."""

from __future__ import annotations

import json

import pytest

from workbench.errors import ConfigError
from workbench.log import JsonLines
from workbench.run_folder import RunFolder, Status, find_runs, write_atomically


def started(path, text="[run]\n") -> RunFolder:
    run = RunFolder(path)
    run.start(config_text=text, resolved='{"run": {}}\n', command=["wb", "pretrain", "a b.toml"])
    return run


def test_a_started_run_holds_what_was_asked_and_where(tmp_path):
    run = started(tmp_path / "runs" / "tiny")
    assert (run.path / "config.toml").read_text() == "[run]\n"
    assert run.resolved() == {"run": {}}
    assert (run.path / "command.txt").read_text().strip().endswith("wb pretrain 'a b.toml'")
    environment = json.loads((run.path / "environment.json").read_text())
    assert environment["versions"]["torch"] and environment["cpus"] >= 1
    assert run.checkpoints.is_dir() and run.logs.is_dir()


def test_the_status_follows_the_markers_and_a_restart_clears_them(tmp_path):
    run = RunFolder(tmp_path / "tiny")
    assert run.status() is Status.NEW
    started(run.path)
    assert run.status() is Status.UNFINISHED
    run.finish(Status.FAILED, "LaunchError: rank 1 died")
    assert (run.status(), run.note()) == (Status.FAILED, "LaunchError: rank 1 died")
    run.finish(Status.INTERRUPTED)
    assert run.status() is Status.INTERRUPTED and not (run.path / "FAILED").exists()
    started(run.path)
    assert run.status() is Status.UNFINISHED
    assert len((run.path / "command.txt").read_text().splitlines()) == 2


def test_lineage_reads_back(tmp_path):
    run = started(tmp_path / "tiny")
    assert run.lineage() == {}
    run.write_lineage({"parents": [{"path": "runs/base", "fingerprint": "ab"}]})
    assert run.lineage()["parents"][0]["fingerprint"] == "ab"


def test_a_summary_shows_the_last_value_of_each_metric(tmp_path):
    run = started(tmp_path / "tiny")
    sink = JsonLines(run.metrics)
    sink.write(10, {"loss": 3.0, "lr": 0.1})
    sink.write(20, {"loss": 2.0})
    summary = run.summary()
    assert (summary["step"], summary["loss"], summary["lr"], summary["status"]) == (20, 2.0, 0.1, "unfinished")


def test_runs_are_found_under_their_root_and_other_folders_are_not(tmp_path):
    started(tmp_path / "one")
    started(tmp_path / "two")
    (tmp_path / "notes").mkdir()
    assert {run.name for run in find_runs(tmp_path)} == {"one", "two"}
    assert [run.name for run in find_runs(tmp_path / "one")] == ["one"]
    assert find_runs(tmp_path / "nothing") == []


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "tiny").write_text("mine")
    with pytest.raises(ConfigError, match="a file stands where the run folder should be"):
        started(tmp_path / "tiny")
    assert (tmp_path / "tiny").read_text() == "mine"


def test_an_atomic_write_leaves_no_scratch_file(tmp_path):
    write_atomically(tmp_path / "a.json", "1")
    write_atomically(tmp_path / "a.json", "2")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "2"
