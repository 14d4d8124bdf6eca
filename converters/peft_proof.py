"""Proof of an exported adapter: base and adapter merged by us, against base and adapter run by plain peft.

The comparison runs in a fresh offline process. torch is imported when logits are computed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from converters.format import OpenedCheckpoint
from converters.job import JobOptions, make_job
from converters.logits import LogitsReport, engine_logits, judge, probe_sequences, require_memory
from converters.merge import merge
from converters.open import get_format
from workbench.errors import VerificationError
from workbench.spec.layout import ParallelLayout

if TYPE_CHECKING:
    import numpy as np


def compare_with_peft(adapter: OpenedCheckpoint, base: OpenedCheckpoint, folder: Path) -> LogitsReport:
    """The comparison of `adapter` merged into `base` with what peft makes of the exported `folder`.

    Raises VerificationError when peft misses or passes over a name, or when logits differ by more than the tolerance.
    """
    merged = merge(adapter, base, check_base=False)
    require_memory(merged.model)
    sequences = probe_sequences(merged.model)
    ours = engine_logits(merged.model, merged.source, sequences)
    with tempfile.TemporaryDirectory() as scratch:
        theirs = peft_logits(hugging_face_folder(base, Path(scratch)), folder, merged.model.num_labels, sequences)
    return judge(ours, theirs, sequences, folder)


def hugging_face_folder(base: OpenedCheckpoint, scratch: Path) -> Path:
    """`base` as a folder that transformers loads: itself, or a copy of its weights under `scratch`."""
    if base.format == "huggingface":
        return base.path
    target = scratch / "base"
    options = JobOptions(layout=ParallelLayout(), optimizer="drop")
    make_job(base, get_format("huggingface"), target, options, operation="export").run(verify="none")
    return target


def peft_logits(base: Path, adapter: Path, num_labels: int, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """peft's logits of each sequence, from a fresh offline process that imports nothing of ours."""
    import numpy as np

    with tempfile.TemporaryDirectory() as scratch:
        rows, output = Path(scratch, "sequences.json"), Path(scratch, "logits.npz")
        rows.write_text(json.dumps([list(sequence) for sequence in sequences]))
        script = str(Path(__file__).with_name("peft_reference.py"))
        words = [str(base.absolute()), str(adapter.absolute()), str(num_labels), str(rows), str(output)]
        done = subprocess.run([sys.executable, "-I", script, *words], capture_output=True, text=True, check=False)
        if done.returncode:
            last = [line for line in done.stderr.strip().splitlines() if line.strip()][-1:] or ["no message"]
            raise VerificationError(f"{adapter}: peft does not load it as it is: {last[0]}")
        with np.load(output) as found:
            return [found[str(index)] for index in range(len(sequences))]
