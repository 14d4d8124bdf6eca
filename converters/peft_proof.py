"""Proof of an exported adapter: base and adapter merged by us, against base and adapter run by plain peft.

The comparison runs in a fresh offline process. torch is imported when logits are computed.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.family import Family, family_for, family_named
from converters.format import OpenedCheckpoint
from converters.formats._peft_table import CONFIG, PREFIX, peft_modules
from converters.job import JobOptions, make_job
from converters.logits import (
    LogitsReport,
    engine_logits,
    judge,
    probe_sequences,
    reference_request,
    require_memory,
)
from converters.merge import merge
from converters.open import get_format
from workbench.errors import VerificationError
from workbench.spec.layout import ParallelLayout
from workbench.spec.lora import MAGNITUDE, LoraSpec
from workbench.spec.model import ModelConfig

if TYPE_CHECKING:
    import numpy as np


def compare_with_peft(adapter: OpenedCheckpoint, base: OpenedCheckpoint, folder: Path) -> LogitsReport:
    """The comparison of `adapter` merged into `base` with what peft makes of the exported `folder`.

    Raises VerificationError when peft misses or passes over a name, or when logits differ by more than the tolerance.
    """
    assert adapter.adapter is not None
    merged = merge(adapter, base, check_base=False)
    require_memory(merged.model)
    sequences = probe_sequences(merged.model)
    family = family_named(base.family) if base.family else family_for(base.model)
    scalings = scalings_of(family, merged.model, adapter.adapter.lora)
    ours = engine_logits(merged.model, merged.source, sequences)
    with tempfile.TemporaryDirectory() as scratch:
        request = {
            **reference_request(merged.model, hugging_face_folder(base, Path(scratch)), sequences),
            "adapter": str(folder.absolute()),
            "num_labels": merged.model.num_labels,
        }
        theirs = peft_logits(request, folder, scalings)
    return judge(ours, theirs, sequences, folder, against="peft")


def hugging_face_folder(base: OpenedCheckpoint, scratch: Path) -> Path:
    """`base` as a folder that transformers loads: itself, or a copy of its weights under `scratch`."""
    if base.format == "huggingface":
        return base.path
    target = scratch / "base"
    options = JobOptions(layout=ParallelLayout(), optimizer="drop")
    make_job(base, get_format("huggingface"), target, options, operation="export").run(verify="none")
    return target


def peft_logits(request: Mapping[str, Any], folder: Path, scalings: Mapping[str, float]) -> list[np.ndarray]:
    """peft's logits of each sequence, from a fresh offline process that imports nothing of ours.

    VerificationError names why peft would not compute with the adapter at `folder`, scaled as `scalings` says by path.
    """
    import numpy as np

    with tempfile.TemporaryDirectory() as scratch:
        asked, output, told = (Path(scratch, name) for name in ("request.json", "logits.npz", "facts.json"))
        asked.write_text(json.dumps({**request, "base": request["folder"]}))
        script = str(Path(__file__).with_name("peft_reference.py"))
        words = [sys.executable, "-I", script, str(asked), str(output), str(told)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            last = [line for line in done.stderr.strip().splitlines() if line.strip()][-1:] or ["no message"]
            raise VerificationError(f"{folder}: peft cannot load it: {last[0]}")
        if causes := silent_failures(json.loads(told.read_text()), scalings):
            raise VerificationError(f"{folder}: peft loads it without an error, but not as it is: {'; '.join(causes)}")
        with np.load(output) as found:
            return [found[name] for name in found.files]


def scalings_of(family: Family, model: ModelConfig, lora: LoraSpec) -> dict[str, float]:
    """By what peft must scale the adapter of each module."""
    found = {}
    for module in peft_modules(family, model, lora):
        r, alpha = module.shape(rslora=lora.rslora)
        found[f"{PREFIX}{module.holder or module.path}"] = lora.scale(alpha, r)
    return found


def silent_failures(facts: Mapping[str, Any], scalings: Mapping[str, float]) -> list[str]:
    """The causes for which peft would compute something else than the adapter, from what peft_reference.py reports."""
    missing, unexpected, found = list(facts["missing"]), list(facts["unexpected"]), []
    if unprefixed := [key for key in unexpected if not key.startswith(PREFIX)]:
        found.append(
            f"{_some(unprefixed)} in the file without the prefix {PREFIX!r}, so peft uses fresh ones in its place"
        )
        missing = [key for key in missing if key.removeprefix(PREFIX) not in unprefixed]
        unexpected = [key for key in unexpected if key.startswith(PREFIX)]
    if magnitudes := [key for key in missing if key.endswith(MAGNITUDE)]:
        found.append(
            f"use_dora=true in {CONFIG}, but {_some(magnitudes)} not in the file: magnitudes are those of the base"
        )
    if factors := [key for key in missing if key not in magnitudes]:
        found.append(f"{_some(factors)} not in the file, so peft uses a fresh one: half an adapter adds nothing")
    if unexpected:
        found.append(f"target_modules or modules_to_save in {CONFIG} pass over {_some(unexpected)} in the file")
    if facts["other"]:
        found.append(f"peft holds other values than the file for {_some(facts['other'])}")
    held = facts["scaling"]
    if wrong := [
        path for path, s in scalings.items() if path in held and not math.isclose(held[path], s, rel_tol=1e-6)
    ]:
        found.append(
            f"use_rslora, lora_alpha or alpha_pattern in {CONFIG} scale {_some(wrong)} by {held[wrong[0]]:.6g}, "
            f"not {scalings[wrong[0]]:.6g}"
        )
    return found


def _some(names: Sequence[str]) -> str:
    return repr(names[0]) if len(names) == 1 else f"{names[0]!r} and {len(names) - 1} more"
