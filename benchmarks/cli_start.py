"""How long a user waits for `wb --help`: the median of whole processes, against 0.35 s.

python benchmarks/cli_start.py [--quick] [--json]
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
from pathlib import Path

from _common import Claim, alternate, claim, main

BAR_SECONDS = 0.35


def run(quick: bool) -> list[Claim]:
    """The medians of `wb --help`, of the help of one command, and of a Python that does nothing."""
    wb = str(Path(sys.executable).parent / "wb")
    commands = ([wb, "--help"], [wb, "runs", "--help"], [sys.executable, "-c", "pass"])
    works = [lambda words=words: subprocess.run(words, check=True, capture_output=True) for words in commands]
    times = alternate(works, repeat=5 if quick else 20, warmup=2)
    whole, one, nothing = (statistics.median(series) for series in times)
    before = _child_seconds()
    works[0]()
    return [
        claim("wb --help", whole, unit="s", at_most=BAR_SECONDS, note=f"best {min(times[0]):.3f} s"),
        claim("wb runs --help", one, unit="s", at_most=BAR_SECONDS),
        claim("wb --help, CPU time", _child_seconds() - before, unit="s", note="without waiting for other programs"),
        claim("python -c pass", nothing, unit="s", note="what no program can be faster than"),
    ]


def _child_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main(run, description=__doc__)
