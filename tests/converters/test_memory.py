"""Checkpoints larger than the memory budget are streamed, with moments and all, to any format."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.checkpoints import MemorySource, checkpoint_schema, tiny_model, write_native
from workbench.spec.geometry import Box
from workbench.spec.layout import ParallelLayout

PROGRAM = """
import sys
from workbench.cli.main import main
code = main(sys.argv[1:])
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(peak, file=sys.stderr)
sys.exit(code)
"""
"""The peak is read by the process itself: ru_maxrss of a child begins with that of its parent."""


class Zeros(MemorySource):
    """Tensors that take no memory."""

    def read(self, name: str, box: Box) -> np.ndarray:
        return np.zeros(box.size, np.float32)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A checkpoint of 740 MB of which the largest tensors have 246 MB."""
    model = tiny_model(vocab_size=60_001, hidden_size=1024, intermediate_size=64, num_hidden_layers=1)
    schema = checkpoint_schema(model, "F32")
    path = write_native(tmp_path_factory.mktemp("source") / "a", Zeros(schema, {}), model, ParallelLayout(tp=2))
    assert sum(file.stat().st_size for file in path.iterdir()) > 740_000_000
    return path


@pytest.mark.parametrize(
    ("words", "mebibytes"),
    [
        (["reshard", "--tp", "1", "--verify", "full"], 128),
        (["reshard", "--tp", "4", "--workers", "8"], 300),
        (["export", "--verify", "crc", "--max-shard-size", "100MB"], 300),
    ],
    ids=["tp1", "tp4 with 8 workers", "hugging face"],
)
def test_a_checkpoint_larger_than_the_budget_is_streamed_within_it(source, tmp_path, words, mebibytes):
    command, *options = words
    more = [*options, "--mem", f"{mebibytes}MiB", "-q"]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, command, str(source), str(tmp_path / "b"), *more],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stderr.split()[1]) <= mebibytes << 10
