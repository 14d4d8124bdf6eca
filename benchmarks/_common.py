"""What every benchmark shares: its flags, the machine it ran on, and claims that are measured against a bar.

A benchmark is a script with one `run(quick, ...) -> list[Claim]` and `main(run)` at its end. It prints a table, or with
--json one object: versions, machine and claims. It exits with 4 when a claim misses its bar.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parents[1]))

from workbench.run_folder import environment

EXIT_MISSED = 4


@dataclass(frozen=True)
class Claim:
    """A measured value beside its bar. Without a bar it is a number for context and cannot fail."""

    name: str
    value: float
    unit: str
    bar: float | None
    ok: bool
    note: str = ""


def claim(
    name: str,
    value: float,
    *,
    unit: str = "",
    at_most: float | None = None,
    at_least: float | None = None,
    note: str = "",
) -> Claim:
    """A claim that `value` is at most, or at least, its bar; without a bar, a number for context."""
    assert at_most is None or at_least is None, "a claim has one bar"
    ok = (at_most is None or value <= at_most) and (at_least is None or value >= at_least)
    return Claim(name, value, unit, at_most if at_most is not None else at_least, ok, note)


def seconds_of(work: Callable[[], Any], *, repeat: int, warmup: int = 1) -> list[float]:
    """The duration of each of `repeat` calls, after `warmup` calls that do not count."""
    for _ in range(warmup):
        work()
    found = []
    for _ in range(repeat):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return found


def alternate(works: Sequence[Callable[[], Any]], *, repeat: int, warmup: int = 1) -> list[list[float]]:
    """The durations of several things in turn, A B A B: a noisy machine then disturbs all of them alike."""
    for work in works:
        for _ in range(warmup):
            work()
    found: list[list[float]] = [[] for _ in works]
    for _ in range(repeat):
        for index, work in enumerate(works):
            found[index] += seconds_of(work, repeat=1, warmup=0)
    return found


def median_ratio(these: Sequence[float], those: Sequence[float]) -> float:
    """The median of the pairwise ratios of two series that were measured in turn."""
    return statistics.median(one / other for one, other in zip(these, those, strict=True))


@contextlib.contextmanager
def quiet_stdout() -> Iterator[None]:
    """Sends what libraries print to stderr, so that --json stays one object."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def say(text: str) -> None:
    """Prints progress on stderr."""
    print(text, file=sys.stderr, flush=True)


def main(
    run: Callable[..., list[Claim]], *, description: str = "", flags: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Parses --quick, --json and `flags` (name -> help), runs the benchmark, prints its claims, exits with 0 or 4.

    `run` gets `quick`, and each flag by its name.
    """
    parser = argparse.ArgumentParser(description=description or None)
    parser.add_argument("--quick", action="store_true", help="smaller and fewer: whether it runs, not how fast")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    for name, told in flags.items():
        parser.add_argument(f"--{name}", action="store_true", help=told)
    asked = parser.parse_args()
    started = time.perf_counter()
    with quiet_stdout():
        claims = run(asked.quick, **{name: getattr(asked, name) for name in flags})
    found = environment()
    if asked.json:
        report = {
            "benchmark": Path(sys.argv[0]).stem,
            "quick": asked.quick,
            "seconds": round(time.perf_counter() - started, 1),
            "versions": {"python": found["python"], **found["versions"]},
            "machine": {key: found[key] for key in ("platform", "machine", "cpus", "memory_bytes")}
            | {"load": os.getloadavg()[0]},
            "claims": [asdict(one) for one in claims],
        }
        print(json.dumps(report))
    else:
        print(table(claims))
    sys.exit(0 if all(one.ok for one in claims) else EXIT_MISSED)


def table(claims: Sequence[Claim]) -> str:
    """The claims as aligned lines: value, bar and verdict."""
    rows: list[tuple[str, str, str, Literal["ok", "MISSED", ""]]] = []
    for one in claims:
        bar = "" if one.bar is None else f"{one.bar:.4g}"
        rows.append((one.name, f"{one.value:.4g} {one.unit}".strip(), bar, "" if one.bar is None else _verdict(one)))
    name_width, value_width = max(len(row[0]) for row in rows), max(max(len(row[1]) for row in rows), 5)
    lines = [f"{'claim':<{name_width}}  {'value':>{value_width}}  {'bar':>8}"]
    for row, one in zip(rows, claims, strict=True):
        note = f"  {one.note}" if one.note else ""
        lines.append(f"{row[0]:<{name_width}}  {row[1]:>{value_width}}  {row[2]:>8}  {row[3]}{note}".rstrip())
    return "\n".join(lines)


def _verdict(one: Claim) -> Literal["ok", "MISSED"]:
    return "ok" if one.ok else "MISSED"
