"""Proof by logits: the engine's from a tensor source against plain transformers' from a folder, in another process.

This is the one place in converters that computes with a model; torch is imported when it does.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

from converters.auto import auto_class
from converters.divergence import engine_states, first_divergence
from workbench.checkpoint.source import TensorSource
from workbench.errors import ResourceError, VerificationError
from workbench.spec.model import ModelConfig
from workbench.spec.schema import num_parameters

if TYPE_CHECKING:
    import numpy as np

TOLERANCE: Final = 1e-4
"""Largest absolute difference of fp32 logits that passes, for logits up to 10; for larger ones in proportion."""
_LENGTHS: Final = (1, 17, 64, 192)
_SEED: Final = 20240229


@dataclass(frozen=True)
class LogitsReport:
    """How far apart the logits are at most, what was allowed, over how many tokens, and against whose."""

    difference: float
    tolerance: float
    tokens: int
    against: str = "transformers"
    name: ClassVar[str] = "logits"

    def describe(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)

    def text(self) -> str:
        """The report in a line."""
        return (
            f"logits equal those of {self.against} within {self.difference:.2g} over {self.tokens} tokens "
            f"({self.tolerance:.1g} allowed, fp32)"
        )


def compare_logits(model: ModelConfig, source: TensorSource, folder: Path) -> LogitsReport:
    """The comparison of `source`, run by the engine at tp=1, with `folder`, run by transformers in a fresh process.

    Raises VerificationError when they differ by more than the tolerance, with the first layer where they do, or when
    transformers cannot load the folder; and ResourceError when the model does not fit into memory.
    """
    require_memory(model)
    sequences = probe_sequences(model)
    ours = engine_logits(model, source, sequences)
    theirs = reference_logits(model, folder, sequences)
    with _divergence_named(model, source, sequences[-1], lambda: reference_states(model, folder, sequences[-1])):
        return judge(ours, theirs, sequences, folder)


def compare_sources(model: ModelConfig, source: TensorSource, written: TensorSource, folder: Path) -> LogitsReport:
    """The comparison of `source` with what was `written` from it into `folder`, both run by the engine at tp=1.

    Raises as `compare_logits` does.
    """
    require_memory(model)
    sequences = probe_sequences(model)
    ours = engine_logits(model, source, sequences)
    theirs = engine_logits(model, written, sequences)
    inputs = probe_inputs(model, sequences[-1])
    with _divergence_named(model, source, sequences[-1], lambda: engine_states(model, written, inputs)):
        return judge(ours, theirs, sequences, folder, against="the copy")


@contextmanager
def _divergence_named(
    model: ModelConfig, source: TensorSource, sequence: Sequence[int], theirs: Callable[[], list[np.ndarray]]
) -> Iterator[None]:
    """Adds to a VerificationError the first layer that differs, by the states of `sequence` on both sides."""
    try:
        yield
    except VerificationError as error:
        ours = engine_states(model, source, probe_inputs(model, sequence))
        raise VerificationError(f"{error}; {first_divergence(model, ours, theirs(), TOLERANCE)}") from error


def probe_sequences(model: ModelConfig) -> list[list[int]]:
    """Token sequences of several lengths, as long as the model allows; the same ones every time.

    They hold the first and the last token of the vocabulary, and no padding, which a sequence head would skip.
    """
    draw = random.Random(_SEED)
    tokens = [token for token in range(model.vocab_size) if token != model.pad_token_id]
    lengths = sorted({min(length, model.max_length) for length in _LENGTHS})
    sequences = [[draw.choice(tokens) for _ in range(length)] for length in lengths]
    sequences[-1][:2] = [tokens[0], tokens[-1]][: len(sequences[-1])]
    return sequences


def probe_inputs(model: ModelConfig, sequence: Sequence[int]) -> dict[str, list[int]]:
    """What the model reads with a sequence, by transformers' names: where it knows segments, the last half is of the
    second kind; a decoder that has an encoder reads half of it backwards."""
    found = {"input_ids": list(sequence)}
    if model.type_vocab_size > 1:
        found["token_type_ids"] = [int(2 * index >= len(sequence)) for index in range(len(sequence))]
    if model.num_encoder_layers:
        found["decoder_input_ids"] = found["input_ids"][::-2]
    return found


def engine_logits(model: ModelConfig, source: TensorSource, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """The engine's logits of each sequence, of one head after the other, in fp32 on the CPU at tp=1."""
    from workbench.models.generate import load_model, outputs

    stage = load_model(model, source)
    inputs = [probe_inputs(model, sequence) for sequence in sequences]
    return [outputs(stage, row, name).float().numpy() for name in auto_class(model).outputs for row in inputs]


def reference_logits(model: ModelConfig, folder: Path, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """transformers' logits, as those of the engine, from a fresh offline process that imports nothing of ours."""
    return _reference(folder, reference_request(model, folder, sequences))


def reference_states(model: ModelConfig, folder: Path, sequence: Sequence[int]) -> list[np.ndarray]:
    """transformers' hidden states of one sequence, of an encoder before those of its decoder; likewise."""
    names = ("encoder_hidden_states", "decoder_hidden_states") if model.num_encoder_layers else ("hidden_states",)
    return _reference(folder, {**reference_request(model, folder, [sequence]), "states": names})


def _reference(folder: Path, request: Mapping[str, Any]) -> list[np.ndarray]:
    import numpy as np

    with tempfile.TemporaryDirectory() as scratch:
        asked, output = Path(scratch, "request.json"), Path(scratch, "logits.npz")
        asked.write_text(json.dumps(request))
        script = str(Path(__file__).with_name("reference.py"))
        words = [sys.executable, "-I", script, str(asked), str(output)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            last = [line for line in done.stderr.strip().splitlines() if line.strip()][-1:] or ["no message"]
            raise VerificationError(f"{folder}: transformers cannot load it: {last[0]}")
        with np.load(output) as found:
            return [found[name] for name in found.files]


def reference_request(model: ModelConfig, folder: Path, sequences: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What reference.py is asked for."""
    loader = auto_class(model)
    return {
        "folder": str(folder.absolute()),
        "loader": loader.name,
        "inputs": [probe_inputs(model, sequence) for sequence in sequences],
        "outputs": list(loader.outputs.values()),
    }


def judge(
    ours: Sequence[np.ndarray],
    theirs: Sequence[np.ndarray],
    sequences: Sequence[Sequence[int]],
    folder: Path,
    *,
    against: str = "transformers",
) -> LogitsReport:
    """The report, when the logits agree; VerificationError names the first token where they do not."""
    import numpy as np

    largest = max(float(np.abs(array).max()) for array in theirs)
    tolerance = TOLERANCE * max(1.0, largest / 10)
    worst = 0.0
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        index = number % len(sequences)
        if a.shape != b.shape:
            raise VerificationError(
                f"{folder}: logits have shape {list(b.shape)} by {against}, {list(a.shape)} by the engine"
            )
        gap = np.abs(a.astype(np.float64) - b.astype(np.float64))
        gap = np.where(np.isfinite(gap), gap, np.inf)
        worst = max(worst, float(gap.max()))
        if worst > tolerance:
            at = np.argwhere(gap > tolerance)[0].tolist()
            raise VerificationError(
                f"{folder}: logits differ from the source's by {worst:.3g}, and {tolerance:.1g} is allowed; "
                f"first in probe sequence {index} of {len(sequences[index])} tokens at {at}: {against} "
                f"{float(b[tuple(at)]):.6g}, source {float(a[tuple(at)]):.6g}"
            )
    return LogitsReport(worst, tolerance, sum(map(len, sequences)), against)


def require_memory(model: ModelConfig) -> None:
    """ResourceError unless the machine has room for the model in fp32."""
    needed = int(4 * num_parameters(model) * 1.2) + (1 << 29)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return
    if needed > free:
        raise ResourceError(
            f"comparing logits needs about {needed / 2**30:.1f} GiB of memory for the model in fp32, and "
            f"{free / 2**30:.1f} GiB are free; use --verify full, which compares the weights bit for bit"
        )
