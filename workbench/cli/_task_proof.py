"""The metrics of a task in the proof of an export: by the engine, and by transformers or peft in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

from workbench.errors import ConfigError, VerificationError

if TYPE_CHECKING:
    from converters.format import OpenedCheckpoint
    from finetune.config import FinetuneConfig
    from finetune.task import Example
    from workbench.tokenizer import Tokenizer

_TASKS: Final = ("classification", "pair", "token_classification", "sft", "lm", "masked_lm")
"""Those that are judged by one of several labels, for a row or for tokens."""
_SHARES: Final = {"accuracy": "near_labels", "token_accuracy": "near_labels", "exact_match": "near_rows"}
"""Metrics that count, and the share of what they count that rounding may decide."""


@dataclass(frozen=True)
class TaskReport:
    """Metrics that are the same by the engine and by `against`, by `<evaluation>/<metric>`."""

    metrics: Mapping[str, float]
    against: str
    name: ClassVar[str] = "task"

    def describe(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {"metrics": dict(self.metrics), "against": self.against}

    def text(self) -> str:
        """The report in a line."""
        told = ", ".join(f"{name} {value:.6g}" for name, value in self.metrics.items())
        return f"the task's metrics equal those of {self.against}: {told}"


def compare_task(
    config: FinetuneConfig, ours: OpenedCheckpoint, folder: Path, *, adapter: Path | None = None
) -> TaskReport:
    """The metrics of `ours` on the task's held-out rows, by the engine, compared with those that transformers finds for
    `folder`, or peft for `adapter` to it.

    Raises ConfigError for a task that plain transformers does not judge, and VerificationError when a loss differs by
    more than the tolerance of logits, or a share by more than what lies within it, or when the tokenizer that was
    written makes other ids of a row's text in transformers.
    """
    from finetune.run import Base, evaluate_model, prepare, tokenizer_of
    from workbench.parallel.mesh import Mesh

    base = Base(ours.model, ours.source, ours.tokenizer, str(ours.path), "")
    tokenizer = tokenizer_of(base, config.tokenizer)
    prepared = prepare(config, ours.model, tokenizer)
    found = evaluate_model(config, ours.model, ours.source, ours.tokenizer, Mesh.single(), prepared=prepared)
    against, same, faults = "transformers" if adapter is None else "peft", {}, []
    for evaluation, examples in prepared.held_out.items():
        theirs = _reference_metrics(ours, examples, folder, adapter, tokenizer)
        for metric, there in theirs.items():
            name = f"{evaluation}/{metric}"
            if name not in found:
                continue
            here, same[name] = found[name], found[name]
            if not abs(here - there) <= _allowed(metric, theirs):
                faults.append(f"{name} is {there:.6g} by {against}, and {here:.6g} by the engine")
    if faults:
        raise VerificationError(f"{adapter or folder}: {'; '.join(faults)}")
    return TaskReport(same, against)


def require_judged(config: FinetuneConfig, model_labels: str | None) -> None:
    """ConfigError when a task is not judged by one of several labels. model_labels: the model's problem_type."""
    kind = config.task.kind
    if kind not in _TASKS or model_labels == "multi_label_classification":
        raise ConfigError(
            f"--task-config: plain transformers is not asked for the metrics of task {kind!r}"
            f"{' with several labels a row' if kind in _TASKS else ''}; it is for {', '.join(_TASKS)}"
        )


def _allowed(metric: str, theirs: Mapping[str, float]) -> float:
    from converters.logits import TOLERANCE

    # A share is a quotient of whole numbers, but for its own rounding.
    return theirs[_SHARES[metric]] + 1e-9 if metric in _SHARES else TOLERANCE * max(1.0, theirs["loss"])


def _reference_metrics(
    ours: OpenedCheckpoint, examples: Sequence[Example], folder: Path, adapter: Path | None, tokenizer: Tokenizer
) -> dict[str, float]:
    from converters.auto import auto_class
    from converters.logits import TOLERANCE
    from converters.task_reference import __file__ as script
    from workbench.tokenizer import tokenizer_files

    loader = auto_class(ours.model)
    with tempfile.TemporaryDirectory() as scratch:
        asked, rows, answer = (Path(scratch, name) for name in ("request.json", "rows.jsonl", "answer.json"))
        request = {
            "folder": str(folder.absolute()),
            "adapter": None if adapter is None else str(adapter.absolute()),
            "tokenizer": next((str(one.absolute()) for one in (adapter, folder) if one and tokenizer_files(one)), None),
            "loader": loader.name,
            "num_labels": ours.model.num_labels,
            "output": loader.outputs["logits"],
            "rows": str(rows),
            "near": 2 * TOLERANCE,
        }
        asked.write_text(json.dumps(request))
        with rows.open("w") as file:
            file.writelines(_lines(examples, tokenizer))
        words = [sys.executable, "-I", script, str(asked), str(answer)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            last = [line for line in done.stderr.strip().splitlines() if line.strip()][-1:] or ["no message"]
            raise VerificationError(f"{adapter or folder}: plain transformers cannot judge it: {last[0]}")
        found: dict[str, Any] = json.loads(answer.read_text())
        if "fault" in found:
            raise VerificationError(f"{request['tokenizer']}: {found['fault']}")
        return found


def _lines(examples: Sequence[Example], tokenizer: Tokenizer) -> Iterator[str]:
    for example in examples:
        inputs = {"input_ids": example.input_ids.tolist()}
        text = tokenizer.decode(inputs["input_ids"], skip_special_tokens=False)
        if example.segments is not None:
            inputs["token_type_ids"] = example.segments.tolist()
        row = {"inputs": inputs, "labels": example.labels.tolist(), "text": text, "ids": tokenizer.encode(text)}
        yield json.dumps(row) + "\n"
