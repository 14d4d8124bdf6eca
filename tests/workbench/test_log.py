"""Log lines and metrics."""

from __future__ import annotations

import io
import json
import sys

import pytest

from workbench.errors import ConfigError
from workbench.log import JsonLines, get_logger, open_sinks, read_metrics, setup_logging


def test_each_rank_writes_its_own_file_and_only_the_first_speaks_freely(tmp_path):
    for rank in (0, 3):
        console = io.StringIO()
        setup_logging(rank=rank, folder=tmp_path, console=console)
        get_logger("pretrain.trainer").info("starting")
        get_logger("pretrain.trainer").warning("careful")
        assert console.getvalue() == ("starting\ncareful\n" if rank == 0 else "[rank 3] WARNING: careful\n")
        lines = (tmp_path / f"rank-{rank:04d}.log").read_text().splitlines()
        assert [line.split(": ")[-1] for line in lines] == ["starting", "careful"]
        assert f"[{rank}] INFO workbench.pretrain.trainer" in lines[0]
    setup_logging()


def test_metrics_survive_a_kill_and_a_resumed_run_writes_each_step_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(path)
    for step in (1, 2, 3):
        sink.write(step, {"loss": 1.0 / step})
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # the process died here
    sink = JsonLines(path, resumed_step=2)
    sink.write(3, {"loss": 9.0})
    sink.close()
    assert [(row["step"], row["loss"]) for row in read_metrics(path)] == [(1, 1.0), (2, 0.5), (3, 9.0)]


def test_an_unfinished_last_line_is_cut_before_appending(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2')
    JsonLines(path, resumed_step=5).write(6, {})
    assert [row["step"] for row in read_metrics(path)] == [1, 6]


def test_a_run_from_the_start_drops_the_rows_of_an_earlier_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    JsonLines(path).write(0, {"loss": 1.0})
    JsonLines(path).write(0, {"loss": 2.0})
    assert read_metrics(path) == [{"step": 0, "loss": 2.0}]


def test_what_is_not_a_number_stays_valid_json(tmp_path):
    JsonLines(tmp_path / "metrics.jsonl").write(1, {"loss": float("nan"), "norm": float("inf")})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=lambda name: pytest.fail(name)) == {"step": 1, "loss": "nan", "norm": "inf"}


def test_tensorboard_holds_the_scalars(tmp_path):
    pytest.importorskip("tensorboard")
    sinks = open_sinks(tmp_path)
    sinks.write(3, {"train/loss": 2.5, "note": "text is no scalar"})
    sinks.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(3, 2.5)]
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["note"] == "text is no scalar"


def test_asking_for_weights_and_biases_without_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install 'workbench\[track\]'"):
        open_sinks(tmp_path, tensorboard=False, wandb_project="mine")
