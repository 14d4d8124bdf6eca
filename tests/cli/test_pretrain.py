"""`wb pretrain` from a TOML file to a run folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pretrain.data.indexed import IndexedWriter
from workbench.checkpoint.manifest import read_manifest
from workbench.checkpoint.store import Store
from workbench.cli.main import main
from workbench.log import read_metrics
from workbench.run_folder import RunFolder, Status

TOML = """
[model]
preset = "llama-tiny"
vocab_size = 61
hidden_size = 32
head_dim = 8
intermediate_size = 48

[data]
train = "{folder}/train"
valid = "{folder}/valid"

[batch]
global_size = 4
micro_size = 2
seq_len = 16

[log]
every = 1
tensorboard = false

[run]
dir = "{folder}/run"
steps = 4
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration of four small steps, with its data."""
    for name, documents in (("train", 10), ("valid", 2)):
        with IndexedWriter(tmp_path / name, vocab_size=61) as writer:
            for start in range(documents):
                writer.add(np.arange(start, start + 150) ** 2 % 61)
                writer.end_document()
    path = tmp_path / "tiny.toml"
    path.write_text(TOML.format(folder=tmp_path))
    return path


def test_a_run_leaves_its_checkpoint_metrics_and_marker(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pretrain", str(config), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    run = RunFolder(tmp_path / "run")
    assert (result["step"], result["samples"], result["tokens"]) == (4, 16, 256)
    assert (run.status(), run.note()) == (Status.DONE, "step 4")
    assert Store(run.checkpoints).steps() == (4,)
    rows = read_metrics(run.metrics)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert rows[-1]["valid/loss"] == result["metrics"]["valid/loss"]
    assert (run.path / "config.toml").read_text() == config.read_text()
    assert [source["tokens"] for source in run.lineage()["data"]] == [1500]
    assert read_manifest(run.checkpoints / "step-00000004").lineage == (run.lineage(),)


def test_a_longer_run_goes_on_by_itself_and_repeats_no_row(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["pretrain", str(config), "-q"])
    assert main(["pretrain", str(config), "run.steps=6"]) == 0
    assert "resumed at step 4" in capsys.readouterr().err
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]


def test_a_dry_run_starts_nothing(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", str(config), "parallel.pp=2", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["ranks"], plan["layout"]["pp"], plan["step_tokens"]) == (2, 2, 64)
    assert not (tmp_path / "run").exists()


def test_a_pipeline_says_how_long_it_waits(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", str(config), "parallel.pp=2", "--dry-run"]) == 0
    # Two stages and two microbatches: (S - 1) / (M + S - 1) of the time.
    assert "tp 1 x pp 2 x dp 1 = 2 ranks, fp32, 1f1b waits 33% of the time" in capsys.readouterr().out
    vee = ["parallel.pp=2", "parallel.vpp=2", "parallel.schedule=zbv", "batch.micro_size=1"]
    assert main(["pretrain", str(config), *vee, "--dry-run"]) == 0
    # Of the 6 x 4 computations of a stage, the last one waits for the first forward of the other to end.
    assert "zbv in 2 chunks waits 4% of the time" in capsys.readouterr().out


def test_another_seed_in_the_same_folder_is_refused_and_the_run_is_marked_failed(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["pretrain", str(config), "-q"])
    assert main(["pretrain", str(config), "run.seed=9", "run.steps=6"]) == 2
    assert "run.seed is 9, was 1234" in capsys.readouterr().err
    assert RunFolder(tmp_path / "run").status() is Status.FAILED


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["optim.wramup=3"], 2, "optim.wramup: unknown key; did you mean 'warmup'?"),
        (["--nproc", "3", "parallel.tp=2"], 3, "3 ranks were given, but tp=2 x pp=1 needs a multiple of 2"),
        (["data.train=nowhere"], 5, "nowhere"),
    ],
)
def test_a_fault_is_told_before_any_rank_starts(
    words: list[str], code: int, message: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = main(["pretrain", str(config), *words])
    assert found == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_token_that_the_model_does_not_have_ends_the_run_with_both_numbers(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pretrain", str(config), "model.vocab_size=50"]) == 5
    assert "model's vocab_size is 50" in capsys.readouterr().err
    assert "vocab_size is 50" in RunFolder(tmp_path / "run").note()


@pytest.mark.slow
def test_ranks_that_wb_starts_train_like_one_process(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["pretrain", str(config), "-q", f"run.dir={tmp_path / 'one'}"])
    assert main(["pretrain", str(config), "parallel.tp=2", "--json", f"run.dir={tmp_path / 'two'}"]) == 0
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [row["step"] for row in two] == [row["step"] for row in one]
    for row, other in zip(one, two, strict=True):
        for name in ("loss", "grad_norm", "valid/loss"):
            assert other.get(name, 0.0) == pytest.approx(row.get(name, 0.0), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_saves_marks_the_run_and_tells_how_to_go_on(ranks: int, config: Path, tmp_path: Path) -> None:
    words = ["pretrain", str(config), "run.steps=100000", f"parallel.tp={ranks}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "workbench.cli.main", *words],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    run = RunFolder(tmp_path / "run")
    try:
        deadline = time.monotonic() + 120
        while len(read_metrics(run.metrics)) < 3 and time.monotonic() < deadline:
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, told
    step = Store(run.checkpoints).steps()[-1]
    assert f"saved at step {step}; run the same command again to go on" in told
    assert run.status() is Status.INTERRUPTED
    assert len(Store(run.checkpoints).steps()) == 1


def test_auto_says_which_backend_it_took_and_why(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", str(config), "kernels.backend=auto", "--dry-run"]) == 0
    assert (
        "kernels    torch (Transformer Engine runs on NVIDIA GPUs, and this run is on a CPU" in capsys.readouterr().out
    )


def test_a_backend_that_is_not_there_is_refused_before_anything_starts(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pretrain", str(config), "kernels.backend=te"]) == 6
    error = capsys.readouterr().err
    assert "kernels.backend='te': Transformer Engine runs on NVIDIA GPUs" in error and "backend = 'torch'" in error
    assert not (tmp_path / "run").exists()
