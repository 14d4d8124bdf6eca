"""Conversions against copying, at several sizes, weights only and with Adam: `cp`, memcpy, DCP, transformers and `wb`.

python benchmarks/convert.py [--quick] [--json]

Whole processes, Python's start included, in turn (A B A B), on a memory file system with warm sources; 0.5 and 2 GB,
or 0.13 GB with --quick. The roofline is the faster of `cp -r` and a memcpy of the same bytes in this process. `wb`
verifies checksums on both sides; none of the others does.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from reshard import DCP, MEMORY_FOLDER, Patterned, copied, median, process, timed

from _common import Claim, claim, main, median_ratio, say
from tests.helpers.checkpoints import MOMENTS, checkpoint_schema, write_native
from workbench.checkpoint.manifest import TrainingState
from workbench.spec.dtypes import ITEM_BYTES
from workbench.spec.geometry import Box
from workbench.spec.layout import ParallelLayout
from workbench.spec.model import ModelConfig

BUDGET_BYTES = 300 << 20
TRANSFORMERS = """
import sys, torch
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").save_pretrained(sys.argv[2])
"""
WB = str(Path(sys.executable).parent / "wb")


class WithMoments(Patterned):
    """Weights in bf16 and Adam's moments in fp32, of repeated random bits."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model)
        self.schema = checkpoint_schema(model, "BF16")

    def read(self, name: str, box: Box) -> np.ndarray:
        """Any values of the box's shape."""
        values = super().read(name, box)
        return values.astype(np.float32) if name.startswith(MOMENTS) else values


def model_of(gigabytes: float) -> ModelConfig:
    """A dense model of about so many GB in bf16."""
    sizes = {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32}
    layers = max(2, round((gigabytes * 5e8 - 2 * 32000 * 2048) / 45_100_000 / 2) * 2)
    if gigabytes < 0.5:
        sizes |= {"hidden_size": 1024, "intermediate_size": 2816}
        layers = 2
    return ModelConfig.model_validate(sizes | {"num_key_value_heads": 8, "num_hidden_layers": layers})


def run(quick: bool) -> list[Claim]:
    """Every comparison at every size."""
    claims: list[Claim] = []
    for gigabytes, moments in ((0.13, False),) if quick else ((0.5, False), (0.5, True), (2.0, False)):
        with tempfile.TemporaryDirectory(dir=MEMORY_FOLDER) as folder:
            claims += compare(Path(folder), model_of(gigabytes), moments=moments, barred=not quick)
    return claims


def compare(folder: Path, model: ModelConfig, *, moments: bool, barred: bool) -> list[Claim]:
    """All programs at one size."""
    weights = WithMoments(model) if moments else Patterned(model)
    num_bytes = sum(t.numel * ITEM_BYTES[t.dtype] for t in weights.schema.values())
    title = f"{num_bytes / 1e9:.2f} GB{' with Adam' if moments else ''}"
    say(f"{title}: making the source")
    state = TrainingState(step=1) if moments else None
    source = write_native(folder / "source", weights, model, ParallelLayout(tp=2, pp=2), training=state)
    claims = reshard(folder, source, title, num_bytes, barred=barred)
    if not moments:
        claims += hugging_face(folder, source, title, barred=barred)
        claims += dcp(folder, weights, title, barred=barred)
    return [*claims, *lazy(folder, source, title)]


def wb(*words: object) -> list[str]:
    """A command of ours, within the budget."""
    return [WB, *map(str, words), "--mem", f"{BUDGET_BYTES}", "-q"]


def reshard(folder: Path, source: Path, title: str, num_bytes: int, *, barred: bool) -> list[Claim]:
    """Another layout with and without checksums, against the roofline."""
    target, copy = folder / "target", folder / "copy"
    block, peaks = np.ones(num_bytes, np.uint8), []
    words = wb("reshard", source, target, "--tp", 4, "--pp", 1)
    works: list[Callable[[], object]] = [
        lambda: peaks.append(process(words, target)),
        lambda: process([*words, "--verify", "none"], target),
        lambda: copied(source, copy, sync=False),
        lambda: block.copy(),
    ]
    ours, unread, cp, memcpy = timed(works, (target, copy), 5)  # type: ignore[arg-type]
    roofline = [min(a, b) for a, b in zip(cp, memcpy, strict=True)]
    note = f"medians: wb {median(ours):.2f}, cp {median(cp):.2f}, memcpy {median(memcpy):.2f} s"
    return [
        claim(f"{title}: cp -r / wb reshard", median_ratio(cp, ours), unit="x", at_least=bar(0.85, barred), note=note),
        claim(f"{title}: roofline / wb reshard", median_ratio(roofline, ours), unit="x"),
        claim(f"{title}: reading back", median_ratio(ours, unread) * 100 - 100, unit="%", note="of --verify none"),
        claim(f"{title}: peak memory", max(peaks) / 2**20, unit="MiB", at_most=BUDGET_BYTES / 2**20),
    ]


def hugging_face(folder: Path, source: Path, title: str, *, barred: bool) -> list[Claim]:
    """Export and import, against cp and against transformers' load and save."""
    exported, target, copy = folder / "exported", folder / "target", folder / "copy"
    process(wb("export", source, exported, "--verify", "crc"), exported)
    works: list[Callable[[], object]] = [
        lambda: process(wb("export", source, target, "--verify", "crc"), target),
        lambda: process(wb("import", exported, target, "--tp", 2, "--verify", "crc"), target),
        lambda: copied(exported, copy, sync=False),
        lambda: process([sys.executable, "-c", TRANSFORMERS, str(exported), str(target)], target),
    ]
    export, import_, cp, theirs = timed(works, (target, copy), 3)  # type: ignore[arg-type]
    shutil.rmtree(exported)
    note = f"medians {median(export):.2f}, {median(import_):.2f}, cp {median(cp):.2f}, {median(theirs):.2f} s"
    return [
        claim(f"{title}: cp -r / wb export", median_ratio(cp, export), unit="x", at_least=bar(0.8, barred), note=note),
        claim(f"{title}: cp -r / wb import", median_ratio(cp, import_), unit="x", at_least=bar(0.8, barred)),
        claim(f"{title}: save_pretrained / wb export", median_ratio(theirs, export), unit="x"),
    ]


def dcp(folder: Path, weights: Patterned, title: str, *, barred: bool) -> list[Claim]:
    """torch DCP's load and save of the same tensors, in a process of its own."""
    import torch
    import torch.distributed.checkpoint as checkpoint

    source, target, mine = folder / "dcp", folder / "dcp-target", folder / "target"
    state = {
        name: torch.from_numpy(weights.read(name, Box.whole(tensor.shape)).view(np.int16)).view(torch.bfloat16)
        for name, tensor in weights.schema.items()
    }
    checkpoint.save(state, checkpoint_id=source, no_dist=True)
    del state
    works: list[Callable[[], object]] = [
        lambda: process(wb("reshard", folder / "source", mine, "--tp", 4, "--pp", 1), mine),
        lambda: process([sys.executable, "-c", DCP, str(source), str(target)], target),
    ]
    ours, theirs = timed(works, (target, mine), 3)  # type: ignore[arg-type]
    shutil.rmtree(source)
    ratio = median_ratio(theirs, ours)
    note = f"median {median(theirs):.2f} s"
    return [claim(f"{title}: DCP load + save / wb reshard", ratio, unit="x", at_least=bar(3, barred), note=note)]


def lazy(folder: Path, source: Path, title: str) -> list[Claim]:
    """A change of pipeline and of its chunks that copies nothing."""
    claims = []
    for words in (("--pp", "1"), ("--vpp", "1", "--pp", "1")):
        started = time.perf_counter()
        subprocess.run(
            [WB, "reshard", source, folder / "lazy", *words, "--lazy", "-q"], check=True, capture_output=True
        )
        seconds = time.perf_counter() - started
        shutil.rmtree(folder / "lazy")
        claims.append(claim(f"{title}: --lazy {' '.join(words)}", seconds, unit="s", at_most=1.0))
    return claims


def bar(value: float, barred: bool) -> float | None:
    """The bar, unless the run is a quick one, which is mostly Python's start."""
    return value if barred else None


if __name__ == "__main__":
    main(run, description=__doc__)
