"""What import and export share: a planned conversion whose result is proven by logits before it appears."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.cli._conversion import choice, plan_text, run_job
from workbench.cli.common import Output, size_text, time_text

if TYPE_CHECKING:
    from converters.format import Format, OpenedCheckpoint
    from converters.job import JobOptions
    from converters.logits import LogitsReport
    from workbench.checkpoint.source import TensorSource

VERIFY = ("none", "crc", "full", "logits")
Proof = Callable[[Path, "TensorSource"], "LogitsReport"]
"""Gets the unfinished result, as a folder and as a source."""


def convert_with_proof(
    out: Output,
    opened: OpenedCheckpoint,
    target: Format,
    destination: Path,
    options: JobOptions,
    *,
    words: tuple[str, str],
    proof: Proof,
    dry_run: bool,
    resume: bool,
) -> None:
    """Plans, runs unless `dry_run`, proves if --verify says logits, and gives the command's result.

    words: the operation and the --verify option. Whatever fails, nothing is left at the destination.
    """
    from converters.checked import CheckedFormat
    from converters.job import make_job

    operation, verify = words[0], choice(words[1], VERIFY, "--verify")
    reports: list[LogitsReport] = []

    def check(folder: Path, written: TensorSource) -> None:
        out.say("comparing logits with transformers, in a fresh offline process")
        reports.append(proof(folder, written))

    started = time.monotonic()
    job = make_job(
        opened,
        CheckedFormat(target, check) if verify == "logits" else target,
        destination,
        options,
        operation=operation,
    )
    result: dict[str, Any] = {
        "source": str(opened.path),
        "destination": str(destination),
        "format": target.name,
        **job.plan.describe(),
        "layout": options.layout.model_dump(mode="json"),
        "dry_run": dry_run,
    }
    out.say(plan_text(job, target))
    if dry_run:
        out.result(result, text="The plan covers every element exactly once; nothing was written.")
        return
    run_job(out, job, verify="crc" if verify == "logits" else verify, label=operation, resume=resume)
    seconds = time.monotonic() - started
    result |= {"verify": verify, "seconds": seconds}
    text = f"{destination}: {size_text(job.plan.num_bytes)} in {time_text(seconds)}, verified: {verify}"
    if reports:
        report = reports[0]
        result["logits"] = report.describe()
        text += (
            f"\nlogits equal transformers' within {report.difference:.2g} over {report.tokens} tokens "
            f"({report.tolerance:.1g} allowed, fp32)"
        )
    out.result(result, text=text)
