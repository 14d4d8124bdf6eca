"""`wb reshard` of a 2 GB bf16 checkpoint, TP2 PP2 to TP4 PP1, against `cp -r` of it and against torch DCP load + save.

python benchmarks/reshard.py [--quick] [--json]

Whole processes are timed, Python's start included, in turn (A B A B), on a memory file system and on the disk, with
the source in the page cache. `wb reshard` verifies checksums on both sides and returns when all is on the disk; `cp`
does neither, so on the disk it is timed with and without a sync of what it wrote.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from _common import Claim, claim, main, median_ratio, say, seconds_of
from tests.helpers.checkpoints import checkpoint_schema, write_native
from workbench.checkpoint.fingerprint import box_fingerprint
from workbench.spec.geometry import Box, LogicalTensor
from workbench.spec.layout import ParallelLayout
from workbench.spec.model import ModelConfig
from workbench.spec.schema import num_parameters

MAX_RATIO = 1.5
MAX_PEAK_BYTES = 1 << 30
MEMORY_FOLDER = Path("/dev/shm")
DCP = """
import sys, torch, torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
source, target = sys.argv[1:]
metadata = FileSystemReader(source).read_metadata().state_dict_metadata
state = {n: torch.empty(m.size, dtype=m.properties.dtype) for n, m in metadata.items()}
dcp.load(state, checkpoint_id=source, no_dist=True)
dcp.save(state, checkpoint_id=target, no_dist=True)
"""


class Patterned:
    """A model's weights of repeated random bits: quick to make, and nothing here compresses."""

    def __init__(self, model: ModelConfig) -> None:
        self.schema = checkpoint_schema(model, "BF16", optimizer=False)
        self._block = np.random.default_rng(0).integers(0, 1 << 14, 1 << 20).astype(np.uint16)

    def read(self, name: str, box: Box) -> np.ndarray:
        """Any values of the box's shape."""
        return np.resize(self._block, box.size)


def model_of(quick: bool) -> ModelConfig:
    """About 2.07 GB in bf16, or 0.13 GB."""
    sizes = {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 20}
    if quick:
        sizes |= {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 2}
    return ModelConfig.model_validate(sizes | {"num_attention_heads": 32, "num_key_value_heads": 8})


def run(quick: bool) -> list[Claim]:
    """The ratios to `cp -r` on memory and on disk, the peak memory, and torch DCP beside them."""
    model, repeat = model_of(quick), 3 if quick else 7
    claims = [claim("checkpoint", num_parameters(model) * 2 / 1e9, unit="GB", note="bf16, tp=2 pp=2 -> tp=4 pp=1")]
    with tempfile.TemporaryDirectory(dir=MEMORY_FOLDER) as folder:
        claims += compare(Path(folder), model, "memory", repeat=repeat, quick=quick)
    with tempfile.TemporaryDirectory(dir=tempfile.gettempdir()) as folder:
        claims += compare(Path(folder), model, "disk", repeat=repeat, quick=quick)
        claims += dcp(Path(folder), model, 1 if quick else 3)
    return [*claims, fingerprint_speed()]


def wb_words(source: Path, target: Path) -> list[str]:
    """The command that is measured."""
    wb = str(Path(sys.executable).parent / "wb")
    return [wb, "reshard", str(source), str(target), "--tp", "4", "--pp", "1", "-q"]


def compare(folder: Path, model: ModelConfig, where: str, *, repeat: int, quick: bool) -> list[Claim]:
    """Reshard and cp in turn in one folder; a quick run is mostly Python's start, so it has no bar for time."""
    say(f"{where}: making the source")
    source = write_native(folder / "source", Patterned(model), model, ParallelLayout(tp=2, pp=2))
    target, copy = folder / "target", folder / "copy"
    peaks: list[int] = []
    bar = None if quick else MAX_RATIO
    bars = {"cp -r": bar if where == "memory" else None, "cp -r and sync": bar}
    works: list[Callable[[], None]] = [lambda: peaks.append(process(wb_words(source, target), target))]
    works.append(lambda: copied(source, copy, sync=False))
    works += [lambda: copied(source, copy, sync=True)] if where == "disk" else []
    durations = timed(works, (target, copy), repeat)
    claims = []
    for (name, bar), series in zip(bars.items(), durations[1:], strict=False):
        note = f"medians {median(durations[0]):.2f} s and {median(series):.2f} s"
        ratio = median_ratio(durations[0], series)
        claims.append(claim(f"{where}: wb reshard / {name}", ratio, unit="x", at_most=bar, note=note))
    claims.append(claim(f"{where}: peak memory", max(peaks) / 2**20, unit="MiB", at_most=MAX_PEAK_BYTES / 2**20))
    return claims


def timed(works: Sequence[Callable[[], None]], outputs: Sequence[Path], repeat: int) -> list[list[float]]:
    """Durations in turn; what each run wrote is removed outside of the clock, so that memory holds one at a time."""
    durations: list[list[float]] = [[] for _ in works]
    for round_ in range(repeat + 1):
        for index, work in enumerate(works):
            (seconds,) = seconds_of(work, repeat=1, warmup=0)
            for output in outputs:
                shutil.rmtree(output, ignore_errors=True)
            if round_:
                durations[index].append(seconds)
            say(f"  {index}: {seconds:.2f} s")
    return durations


def median(series: Sequence[float]) -> float:
    """The median of a series."""
    return sorted(series)[len(series) // 2]


def process(words: Sequence[str], made: Path) -> int:
    """Runs a command that must make a path; the bytes of its peak memory, as the kernel counts them until its end.

    (`ru_maxrss` of a child begins with that of its parent, so it is no measure here.)
    """
    child = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    status, peak = Path(f"/proc/{child.pid}/status"), 0
    while child.poll() is None:
        lines = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        peak = int(lines[0].split()[1]) * 1024 if lines else peak
        time.sleep(0.01)
    if child.returncode or not made.exists():
        raise RuntimeError(f"{' '.join(words)} ended with {child.returncode}")
    return peak


def copied(source: Path, copy: Path, *, sync: bool) -> None:
    """Copies with cp, and syncs the copies if asked."""
    subprocess.run(["cp", "-r", str(source), str(copy)], check=True)
    if sync:
        subprocess.run(["sync", *map(str, sorted(copy.iterdir()))], check=True)


def dcp(folder: Path, model: ModelConfig, repeat: int) -> list[Claim]:
    """The same tensors through torch's distributed checkpoint: load, then save, in one process."""
    import torch
    import torch.distributed.checkpoint as checkpoint

    say("torch DCP: making its source")
    source, target, mine = folder / "dcp", folder / "dcp-target", folder / "target"
    weights = Patterned(model)
    state = {
        name: torch.from_numpy(weights.read(name, Box.whole(tensor.shape)).view(np.int16)).view(torch.bfloat16)
        for name, tensor in weights.schema.items()
    }
    checkpoint.save(state, checkpoint_id=source, no_dist=True)
    del state
    peaks: list[int] = []
    own_peaks: list[int] = []
    works: list[Callable[[], None]] = [
        lambda: own_peaks.append(process(wb_words(folder / "source", mine), mine)),
        lambda: peaks.append(process([sys.executable, "-c", DCP, str(source), str(target)], target)),
    ]
    ours, theirs = timed(works, (target, mine), repeat)
    note = f"medians {median(theirs):.2f} s and {median(ours):.2f} s; DCP neither syncs nor verifies"
    return [
        claim("disk: torch DCP load + save / wb reshard", median_ratio(theirs, ours), unit="x", note=note),
        claim("disk: peak memory of torch DCP", max(peaks) / 2**20, unit="MiB"),
    ]


def fingerprint_speed() -> Claim:
    """GB/s of fingerprints on one core."""
    tensor = LogicalTensor("x", (4096, 4096), "BF16")
    array = np.random.default_rng(0).integers(0, 1 << 16, tensor.shape, np.uint16)
    whole = Box.whole(tensor.shape)
    box_fingerprint(tensor, whole, array)
    started = time.process_time()
    for _ in range(5):
        box_fingerprint(tensor, whole, array)
    return claim("fingerprints", 5 * array.nbytes / (time.process_time() - started) / 1e9, unit="GB/s per core")


if __name__ == "__main__":
    main(run, description=__doc__)
