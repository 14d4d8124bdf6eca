"""What reshard, import and export share: options from words, the plan shown, the copy run with progress."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, get_args

from workbench.cli.common import Output, size_text, time_text
from workbench.errors import ConfigError

if TYPE_CHECKING:
    from converters.format import Format, OpenedCheckpoint
    from converters.job import Job, JobOptions
    from workbench.checkpoint.source import TensorSource
    from workbench.spec.layout import ParallelLayout

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
VERIFY = ("none", "crc", "full", "logits")


class Report(Protocol):
    """What a proof has found, called `name` in the command's result."""

    @property
    def name(self) -> str: ...

    def describe(self) -> dict[str, Any]: ...

    def text(self) -> str: ...


Proof = Callable[[Path, "TensorSource"], Sequence[Report]]
"""Gets the unfinished result, as a folder and as a source; raises when it must not appear."""


def parse_size(text: str, option: str) -> int:
    """Bytes from '512MiB', '5GB' or '1000'; ConfigError names the option."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = match[2].upper() if match else "?"
    unit = unit.removesuffix("B") + "B" if unit in ("K", "M", "G", "T") else unit.removeprefix("B")
    if match is None or unit not in _UNITS:
        raise ConfigError(f"{option} {text!r} is not a size; write it as 512MiB, 2GiB or 5GB")
    return int(float(match[1]) * _UNITS[unit])


def choice(value: str, allowed: tuple[str, ...], option: str) -> Any:
    """`value` when it is one of `allowed`; ConfigError lists them otherwise."""
    if value not in allowed:
        raise ConfigError(f"{option} {value!r} is not known; use one of {', '.join(allowed)}")
    return value


def new_layout(
    opened: OpenedCheckpoint,
    *,
    tp: int | None = None,
    pp: int | None = None,
    vpp: int | None = None,
    ep: int | None = None,
    etp: int | None = None,
    pp_layout: str = "",
    vocab_multiple: int | None = None,
) -> ParallelLayout:
    """The layout to write: what is not given is the source's, as far as it has one and still fits.

    Where fewer tensor ranks share an expert than share the rest, they have to share tokens as well.
    """
    from pydantic import ValidationError

    from workbench.spec.layout import ParallelLayout

    old = opened.layout or ParallelLayout()
    stages = parse_stages(pp_layout)
    new_vpp = old.vpp if vpp is None else vpp
    new_pp = pp if pp is not None else max(len(stages) // max(new_vpp, 1), 1) if stages else old.pp
    if stages is None and (new_pp, new_vpp) == (old.pp, old.vpp):
        stages = old.pp_layout
    new_ep, new_tp = old.ep if ep is None else ep, old.tp if tp is None else tp
    new_etp = etp or (1 if old.etp == 1 else None)
    apart = new_etp is not None and new_etp != new_tp
    try:
        return ParallelLayout(
            tp=new_tp,
            dp=new_ep,
            ep=new_ep,
            etp=new_etp if apart else None,
            sequence_parallel=apart,
            pp=new_pp,
            vpp=new_vpp,
            pp_layout=stages,
            placement=old.placement if new_vpp == old.vpp else "loop",
            vocab_multiple=old.vocab_multiple if vocab_multiple is None else vocab_multiple,
        )
    except ValidationError as error:
        fault = error.errors()[0]
        name = str(fault["loc"][0]).replace("_", "-")
        raise ConfigError(f"--{name} {fault['input']}: {fault['msg'].lower()}") from None


def parse_stages(text: str) -> tuple[int, ...] | None:
    """Layers per virtual stage from '6,8,8,6'; None for an empty text."""
    if not text:
        return None
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise ConfigError(f"--pp-layout {text!r} is not a list of layer counts; write it as 6,8,8,6") from None


def job_options(
    layout: ParallelLayout,
    *,
    dtype: str,
    optimizer: str,
    mem: str,
    workers: int,
    max_shard_size: str = "5GB",
    allow_drop: Sequence[str] = (),
) -> JobOptions:
    """The options of a conversion from the words of the command line."""
    from converters.cast import FLOATS
    from converters.job import JobOptions, Optimizer

    names = {"fp32": "F32", "float32": "F32", "bfloat16": "BF16", "fp16": "F16", "float16": "F16", "half": "F16"}
    wanted = names.get(dtype.lower(), dtype.upper()) if dtype else ""
    return JobOptions(
        layout=layout,
        dtype=choice(wanted, FLOATS, "--dtype") if wanted else None,
        optimizer=choice(optimizer, get_args(Optimizer), "--optimizer"),
        workers=workers,
        budget_bytes=parse_size(mem, "--mem"),
        max_shard_bytes=parse_size(max_shard_size, "--max-shard-size"),
        allow_drop=tuple(allow_drop),
    )


@dataclass(frozen=True)
class Conversion:
    """A conversion as a command asks for it. proof: what --verify logits means, if not the engine run on both sides."""

    opened: OpenedCheckpoint
    target: Format
    destination: Path
    options: JobOptions
    operation: str
    verify: str = "crc"
    proof: Proof | None = None
    dry_run: bool = False
    resume: bool = False


def convert(out: Output, asked: Conversion) -> None:
    """Plans, shows the plan, runs it (or links files) unless it is a dry run, and gives the command's result.

    Whatever fails, and when what was written does not pass the verification, nothing is left at the destination.
    """
    from converters.checked import CheckedFormat
    from converters.job import make_job

    verify = choice(asked.verify, VERIFY, "--verify")
    reports: list[Report] = []

    def check(folder: Path, written: TensorSource) -> None:
        out.say("comparing logits")
        reports.extend(proof(folder, written))

    started = time.monotonic()
    proof = asked.proof or _engine_proof(asked)
    options = replace(asked.options, read_back=verify != "none")
    target = CheckedFormat(asked.target, check) if verify == "logits" else asked.target
    job = make_job(asked.opened, target, asked.destination, options, operation=asked.operation)
    result: dict[str, Any] = {
        "source": str(asked.opened.path),
        "destination": str(asked.destination),
        "format": target.name,
        **job.describe(),
        "layout": options.layout.model_dump(mode="json"),
        "dry_run": asked.dry_run,
    }
    out.say(plan_text(job, target))
    if asked.dry_run:
        out.result(result, text="The plan covers every element exactly once; nothing was written.")
        return
    if options.lazy:
        job.link()
        out.result(
            {**result, "lazy": True, "seconds": time.monotonic() - started},
            text=f"{asked.destination}: shares its files with {asked.opened.path}; nothing was copied or read, "
            "`wb verify` does.",
        )
        return
    seconds = run_job(out, job, verify="crc" if verify == "logits" else verify, asked=asked)
    total = time.monotonic() - started
    rate = job.plan.num_bytes / max(seconds, 1e-9)
    result |= {"verify": verify, "seconds": total, "bytes_per_second": rate}
    text = (
        f"{asked.destination}: {size_text(job.plan.num_bytes)} in {time_text(total)} ({size_text(rate)}/s), "
        f"verified: {verify}."
    )
    if verify == "full":
        compared = "has the fingerprint that the edits gave it" if asked.opened.edits else "is equal, bit for bit"
        text += f"\nevery tensor {compared}, as read by other code than wrote it"
    for report in reports:
        result[report.name] = report.describe()
        text += f"\n{report.text()}"
    out.result(result, text=text)


def _engine_proof(asked: Conversion) -> Proof:
    """The logits of the source, cast as it is written, against those of what was written, both by the engine."""

    def proof(folder: Path, written: TensorSource) -> Sequence[Report]:
        from converters.cast import cast_to
        from converters.logits import compare_sources

        opened, dtype = asked.opened, asked.options.dtype
        if opened.adapter is not None:
            raise ConfigError(f"{opened.path}: an adapter alone has no logits; use --verify full")
        return [compare_sources(opened.model, cast_to(opened.source, dtype), written, folder)]

    return proof


def run_job(out: Output, job: Job, *, verify: Any, asked: Conversion) -> float:
    """Runs a planned conversion with a progress bar; the seconds that it took."""
    from converters.copy import work_bytes

    path = asked.destination
    out.interrupt_hint = (
        f"nothing is at {path}, what was written is in {path.name}.partial; run the same command with --resume to go "
        "on, or without to start again"
    )
    started = time.monotonic()
    with out.progress(asked.operation, total=work_bytes(job.plan, verify), unit="B") as bar:
        job.run(verify=verify, resume=asked.resume, progress=bar.advance)
    return time.monotonic() - started


def plan_text(job: Job, target: Format) -> str:
    """The plan for people."""
    from converters.drops import reasons

    plan, opened = job.plan, job.opened
    lines = [
        f"from  {opened.path} ({describe_layout(opened)})",
        f"to    {job.destination.path} ({target.name})",
        f"      {len(plan.tensors)} tensors, {size_text(plan.num_bytes)}, {plan.num_pieces} pieces in "
        f"{len(plan.files)} files; at most {size_text(plan.peak_bytes)} of memory, about {time_text(plan.seconds)}",
    ]
    lines += [f"edit  {edit}" for edit in opened.edits]
    for why, names in reasons(job.dropped).items():
        more = f" and {len(names) - 2} more kinds" if len(names) > 2 else ""
        lines.append(f"drops {', '.join(names[:2])}{more}: {why}")
    return "\n".join(lines)


def describe_layout(opened: OpenedCheckpoint) -> str:
    """A checkpoint's format and layout in a few words."""
    layout = opened.layout
    if layout is None:
        return opened.format
    stages = f" pp_layout={','.join(map(str, layout.pp_layout))}" if layout.pp_layout else ""
    chunks = f" vpp={layout.vpp}" if layout.vpp > 1 else ""
    experts = f" ep={layout.ep}" if layout.ep > 1 else ""
    return f"{opened.format}, tp={layout.tp} pp={layout.pp}{chunks}{stages}{experts}"
