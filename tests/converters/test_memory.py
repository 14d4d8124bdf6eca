"""A tensor larger than the memory budget is streamed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.helpers.checkpoints import MemorySource, checkpoint_schema, tiny_model, write_native
from workbench.spec.layout import ParallelLayout


def test_a_tensor_larger_than_the_budget_is_streamed_within_it(tmp_path):
    model = tiny_model(vocab_size=60_001, hidden_size=1024, intermediate_size=64, num_hidden_layers=1)
    schema = checkpoint_schema(model, "F32", optimizer=False)
    arrays = {name: np.zeros(tensor.shape, np.float32) for name, tensor in schema.items()}
    source = write_native(tmp_path / "a", MemorySource(schema, arrays), model, ParallelLayout(tp=2))
    assert arrays["embed_tokens.weight"].nbytes > 245_000_000
    arrays.clear()
    # The peak is read by the process itself: ru_maxrss of a child begins with that of its parent.
    code = (
        "import sys\nfrom workbench.cli.main import main\ncode = main(sys.argv[1:])\n"
        "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(peak, file=sys.stderr)\nsys.exit(code)\n"
    )
    words = ["reshard", str(source), str(tmp_path / "b"), "--tp", "1", "--mem", "128MiB", "--verify", "full", "-q"]
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=root, capture_output=True, text=True, check=True)
    peak_kib = int(done.stderr.split()[1])
    assert peak_kib < 160 << 10
