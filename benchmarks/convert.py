"""Conversions against copying, at several sizes, warm and cold, weights only and with Adam, and against other programs.

python benchmarks/convert.py [--quick] [--large] [--json]

Whole processes, Python's start included, in turn (A B A B): `cp -r`, torch DCP's and megatron-core's load and save,
transformers' load and save_pretrained, and `wb`, at 0.5 and 2 GB; with --large 8 GB too; 0.13 GB with --quick. Sources
are warm and in memory where that has room for them, else on the disk, where a copy is synced as `wb` does; cold ones
are on the disk and evicted before each run. `wb` verifies checksums on both sides; none of the others does. Beside
whole processes stands what a byte takes: the same command without its time for a checkpoint of some kilobytes.
How long a plan of 10^6 pieces takes is for benchmarks/plan.py to say.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from _race import Contender, evict, race, ratio, ratio_beyond_start
from reshard import DCP, MEMORY_FOLDER, Patterned
from xxhash import xxh3_64

from _common import Claim, claim, main, say, seconds_of
from tests.helpers.checkpoints import MOMENTS, checkpoint_schema, write_native
from workbench.checkpoint.manifest import TrainingState
from workbench.spec.dtypes import ITEM_BYTES
from workbench.spec.geometry import Box
from workbench.spec.layout import ParallelLayout
from workbench.spec.model import ModelConfig

BUDGET_BYTES = 300 << 20
ROOM = 2.2  # source, and what is being written
MORE_ROOM = 3.2  # and what was exported, or what another program holds in memory
NOTHING = ModelConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=8,
)
WB = str(Path(sys.executable).parent / "wb")
COPY_AND_SYNC = 'cp -r "$1" "$2" && find "$2" -type f -exec sync {} +'
TRANSFORMERS = """
import sys
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").save_pretrained(sys.argv[2])
"""
MEGATRON = """
import os, sys, torch
sys.path.insert(0, sys.argv[4])
from tests.helpers.megatron import gpt_model, single_rank
from workbench.spec.model import ModelConfig
if __name__ == "__main__":
    with single_rank():
        from megatron.core import dist_checkpointing
        gpt = gpt_model(ModelConfig.model_validate_json(sys.argv[3]), torch.bfloat16)
        state = dist_checkpointing.load({"model": gpt.sharded_state_dict()}, sys.argv[1])
        gpt.load_state_dict(state["model"])
        os.mkdir(sys.argv[2])
        dist_checkpointing.save({"model": gpt.sharded_state_dict()}, sys.argv[2])
"""


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


def run(quick: bool, large: bool = False) -> list[Claim]:
    """Every comparison at every size."""
    cases = [(0.13, False)] if quick else [(0.5, False), (0.5, True), (2.0, False)]
    cases += [(2.0, True), (8.0, False)] if large else []
    return [one for gigabytes, moments in cases for one in Case(gigabytes, moments=moments, barred=not quick).claims()]


class Case:
    """One size. barred: whether its claims have bars; a quick run is mostly Python's start."""

    def __init__(self, gigabytes: float, *, moments: bool, barred: bool) -> None:
        self.model, self.moments, self._barred = model_of(gigabytes), moments, barred
        self.repeat = 3 if gigabytes <= 2 else 1
        self.weights = (WithMoments if moments else Patterned)(self.model)
        self.num_bytes = sum(t.numel * ITEM_BYTES[t.dtype] for t in self.weights.schema.values())
        self.in_memory, self.roomy = (room * self.num_bytes < _available_bytes() for room in (ROOM, MORE_ROOM))
        place = "" if self.in_memory else ", disk"
        self.title = f"{self.num_bytes / 1e9:.2f} GB{' with Adam' if moments else ''}{place}"

    def bar(self, value: float) -> float | None:
        """A bar, if this case has any."""
        return value if self._barred else None

    def claims(self) -> list[Claim]:
        """All programs. Without much room some are left out, and Hugging Face, whose source is removed, is the last."""
        groups = [self.reshard, self.lazy]
        if self.roomy and not self.moments:
            groups += [self.megatron] if self.num_bytes < 1e9 and find_spec("megatron.core") else []
            groups += [self.dcp, self.transformers]
        groups += [] if self.moments else [self.hugging_face]
        found: list[Claim] = []
        with tempfile.TemporaryDirectory(dir=MEMORY_FOLDER if self.in_memory else None) as folder:
            source = self.made(Path(folder))
            self.nothing = write_native(
                Path(folder) / "nothing", Patterned(NOTHING), NOTHING, ParallelLayout(tp=2, pp=2)
            )
            for group in groups:
                found += group(Path(folder), source)
        with tempfile.TemporaryDirectory() as folder:
            return found + self.cold(Path(folder), self.made(Path(folder)))

    def made(self, folder: Path) -> Path:
        """The source: a native checkpoint at tp=2 pp=2."""
        say(f"{self.title}: making the source in {folder}")
        state = TrainingState(step=1) if self.moments else None
        return write_native(folder / "source", self.weights, self.model, ParallelLayout(tp=2, pp=2), training=state)

    def reshard(self, folder: Path, source: Path) -> list[Claim]:
        """Another layout, against copying; what checksums cost."""
        ours = wb("wb reshard", folder, "reshard", source, "--tp", 4, "--pp", 1)
        unread = wb("wb reshard --verify none", folder, "reshard", source, "--tp", 4, "--pp", 1, "--verify", "none")
        start = wb("wb reshard of nothing", folder, "reshard", self.nothing, "--tp", 4, "--pp", 1)
        copy = self.cp(folder, source)
        race([ours, unread, copy, start], self.repeat)
        hashing = 200 * hash_seconds(self.num_bytes) / statistics.median(ours.cpu_seconds)
        reading = 100 * statistics.median(ours.seconds) / statistics.median(unread.seconds) - 100
        title = self.title
        return [
            *(one.claim(title) for one in (copy, unread, start)),
            ours.claim(title, budget_bytes=BUDGET_BYTES),
            claim(f"{title}: memcpy", memcpy_seconds(self.num_bytes), unit="s", note="into fresh memory, one thread"),
            ratio(title, copy, ours, self.bar(0.85)),
            ratio_beyond_start(title, copy, ours, start, self.bar(0.85)),
            ours.rate(title, self.num_bytes),
            claim(f"{title}: inline checksums", hashing, unit="%", at_most=self.bar(10), note="of its CPU time"),
            claim(f"{title}: reading back", reading, unit="%", note="of --verify none"),
        ]

    def hugging_face(self, folder: Path, source: Path) -> list[Claim]:
        """Export and import, each against a copy of what it reads."""
        export, copy = wb("wb export", folder, "export", source, "--verify", "crc"), self.cp(folder, source)
        start = wb("wb export of nothing", folder, "export", self.nothing, "--verify", "crc")
        race([export, copy, start], self.repeat)
        found = [ratio(self.title, copy, export, self.bar(0.8))]
        found.append(ratio_beyond_start(self.title, copy, export, start, self.bar(0.8)))
        exported, nothing = self.exported(folder, source), self.exported(folder, self.nothing)
        if not self.roomy:
            shutil.rmtree(source)
        words = (folder, "import", exported, "--verify", "crc")
        ours, copy = (wb("wb import", *words), wb("wb import --tp 2", *words, "--tp", 2)), self.cp(folder, exported)
        start = wb("wb import of nothing", folder, "import", nothing, "--verify", "crc")
        race([*ours, copy, start], self.repeat)
        shutil.rmtree(exported)
        return [
            copy.claim(self.title),
            *(one.claim(self.title, budget_bytes=BUDGET_BYTES) for one in (export, *ours)),
            *found,
            *(ratio(self.title, copy, one, self.bar(0.8)) for one in ours),
            *(ratio_beyond_start(self.title, copy, one, start, self.bar(0.8)) for one in ours),
            *(one.rate(self.title, self.num_bytes) for one in (export, *ours)),
        ]

    def transformers(self, folder: Path, source: Path) -> list[Claim]:
        """transformers' load and save_pretrained."""
        export = wb("wb export", folder, "export", source, "--verify", "crc")
        exported = self.exported(folder, source)
        theirs = python("save_pretrained", folder, TRANSFORMERS, exported)
        race([export, theirs], self.repeat)
        shutil.rmtree(exported)
        return [theirs.claim(self.title), ratio(self.title, theirs, export)]

    def exported(self, folder: Path, source: Path) -> Path:
        """The source as a Hugging Face folder."""
        exported = folder / f"{source.name}-exported"
        subprocess.run([WB, "export", source, exported, "--verify", "crc", "-q"], check=True, capture_output=True)
        return exported

    def cp(self, folder: Path, source: Path) -> Contender:
        """A plain copy; on a disk one that is there when it ends, as what `wb` writes is."""
        words = ["cp", "-r"] if self.in_memory else ["sh", "-c", COPY_AND_SYNC, "sh"]
        return Contender("cp -r", [*words, str(source), str(folder / "copy")], folder / "copy")

    def dcp(self, folder: Path, source: Path) -> list[Claim]:
        """torch DCP's load and save of the same tensors."""
        import torch
        import torch.distributed.checkpoint as checkpoint

        state = {
            name: torch.from_numpy(self.weights.read(name, Box.whole(tensor.shape)).view(np.int16)).view(torch.bfloat16)
            for name, tensor in self.weights.schema.items()
        }
        checkpoint.save(state, checkpoint_id=folder / "dcp", no_dist=True)
        del state
        ours = wb("wb reshard", folder, "reshard", source, "--tp", 4, "--pp", 1)
        theirs = python("DCP load + save", folder, DCP, folder / "dcp")
        race([ours, theirs], self.repeat)
        shutil.rmtree(folder / "dcp")
        return [theirs.claim(self.title), ratio(self.title, theirs, ours, self.bar(3))]

    def megatron(self, folder: Path, source: Path) -> list[Claim]:
        """megatron-core's load and save in one process, without the optimizer."""
        exported = folder / "megatron"
        words = [WB, "export", source, exported, "--to", "megatron-dist", "--tp", "1", "--pp", "1", "--verify", "crc"]
        subprocess.run([*words, "-q"], check=True, capture_output=True)
        ours = wb("wb reshard", folder, "reshard", source, "--tp", 4, "--pp", 1)
        import_ = wb("wb import from Megatron", folder, "import", exported, "--tp", 4, "--verify", "crc")
        root = Path(__file__).parents[1]
        more = (self.model.model_dump_json(), str(root))
        theirs = python("megatron-core load + save", folder, MEGATRON, next(exported.glob("*/")), *more)
        race([ours, import_, theirs], 1)
        shutil.rmtree(exported)
        return [
            theirs.claim(self.title),
            import_.claim(self.title, budget_bytes=BUDGET_BYTES),
            ratio(self.title, theirs, ours, self.bar(10)),
            ratio(self.title, theirs, import_),
        ]

    def cold(self, folder: Path, source: Path) -> list[Claim]:
        """Another layout from a disk that must be read, to one that is synced."""
        ours = wb("wb reshard, cold", folder, "reshard", source, "--tp", 4, "--pp", 1)
        target = folder / "copy"
        copy = Contender("cp -r and sync, cold", ["sh", "-c", COPY_AND_SYNC, "sh", str(source), str(target)], target)
        race([ours, copy], self.repeat, before=lambda: evict(source))
        return [ours.claim(self.title), copy.claim(self.title), ratio(self.title, copy, ours)]

    def lazy(self, folder: Path, source: Path) -> list[Claim]:
        """A change of pipeline and of its chunks that copies nothing."""
        found = []
        for words in (("--pp", "1"), ("--vpp", "1", "--pp", "1")):
            command = [WB, "reshard", str(source), str(folder / "lazy"), *words, "--lazy", "-q"]
            one = Contender(f"--lazy {' '.join(words)}", command, folder / "lazy")
            race([one], 3)
            found.append(claim(f"{self.title}: {one.name}", one.median, unit="s", at_most=1.0))
        return found


def wb(name: str, folder: Path, command: str, source: Path, *options: object) -> Contender:
    """A command of ours, within the budget."""
    words = [WB, command, str(source), str(folder / "target"), *map(str, options), "--mem", str(BUDGET_BYTES), "-q"]
    return Contender(name, words, folder / "target")


def python(name: str, folder: Path, program: str, source: Path, *more: str) -> Contender:
    """A program of another library, which loads `source` and saves it."""
    return Contender(
        name, [sys.executable, "-c", program, str(source), str(folder / "theirs"), *more], folder / "theirs"
    )


def memcpy_seconds(num_bytes: int) -> float:
    """How long this process takes to copy so many bytes in memory."""
    block = np.ones(min(num_bytes, 1 << 29), np.uint8)
    return statistics.median(seconds_of(block.copy, repeat=3)) * num_bytes / block.nbytes


def hash_seconds(num_bytes: int) -> float:
    """How long a checksum of so many bytes takes, in blocks that are in the cache."""
    block, hasher = np.ones(256 << 10, np.uint8).data, xxh3_64()
    return statistics.median(seconds_of(lambda: hasher.update(block), repeat=99)) * num_bytes / block.nbytes


def _available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


if __name__ == "__main__":
    main(run, description=__doc__, flags={"large": "8 GB too, and 2 GB of weights with Adam"})
