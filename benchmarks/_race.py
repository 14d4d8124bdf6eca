"""Programs that do the same work, run in turn as whole processes: how long each takes, and how much memory."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from _common import Claim, claim, median_ratio, say


@dataclass
class Contender:
    """A command that makes a folder, and what each of its runs took."""

    name: str
    words: Sequence[str]
    made: Path
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def run(self, *, watched: bool) -> tuple[float, float]:
        """Wall and CPU time of one run. What it made is removed outside of the clock.

        watched: its memory too, which takes a program of two threads on two cores a tenth longer.
        """
        with tempfile.TemporaryFile() as errors:
            started, ended = time.perf_counter(), 0
            child = subprocess.Popen(self.words, stdout=subprocess.DEVNULL, stderr=errors, env=environment())
            while not ended:
                if watched:
                    self.peak_bytes = max(self.peak_bytes, _peak_bytes(child.pid))
                    time.sleep(0.005)
                ended, status, used = os.wait4(child.pid, os.WNOHANG if watched else 0)
            seconds = time.perf_counter() - started
            child.returncode = os.waitstatus_to_exitcode(status)
            if child.returncode or not self.made.exists():
                errors.seek(0)
                told = errors.read().decode()[-2000:]
                raise RuntimeError(f"{' '.join(self.words)} ended with {child.returncode}: {told}")
        shutil.rmtree(self.made)
        return seconds, used.ru_utime + used.ru_stime

    @property
    def median(self) -> float:
        """The median of its durations."""
        return statistics.median(self.seconds)

    def claim(self, title: str, *, budget_bytes: int | None = None) -> Claim:
        """How long it takes; with a budget, that it keeps to it."""
        peak = f"peak memory {self.peak_bytes / 2**20:.0f} MiB"
        if budget_bytes is not None and self.peak_bytes > budget_bytes:
            return claim(f"{title}: {self.name}", self.peak_bytes, at_most=budget_bytes, note="bytes of memory")
        return claim(f"{title}: {self.name}", self.median, unit="s", note=peak)

    def rate(self, title: str, num_bytes: int) -> Claim:
        """Bytes a second of CPU time, the start of the program included: no other program's load enters it."""
        rate = num_bytes / 1e9 / statistics.median(self.cpu_seconds)
        return claim(f"{title}: {self.name}, a second of CPU time", rate, unit="GB")


def race(
    contenders: Sequence[Contender], repeat: int, *, warmup: int = 1, before: Callable[[], None] = lambda: None
) -> None:
    """Runs all in turn, A B A B; of the first rounds only memory counts. `before` each run, outside of the clock."""
    for round_ in range(warmup + repeat):
        for one in contenders:
            before()
            seconds, cpu_seconds = one.run(watched=round_ < warmup)
            say(f"  {one.name}: {seconds:.2f} s")
            if round_ >= warmup:
                one.seconds.append(seconds)
                one.cpu_seconds.append(cpu_seconds)


def ratio(title: str, slow: Contender, fast: Contender, at_least: float | None = None) -> Claim:
    """How many times as long `slow` takes, as the median of rounds."""
    name = f"{title}: {slow.name} / {fast.name}"
    return claim(name, median_ratio(slow.seconds, fast.seconds), unit="x", at_least=at_least)


def ratio_beyond_start(
    title: str, slow: Contender, fast: Contender, start: Contender, at_least: float | None = None
) -> Claim:
    """How many times as long `slow` takes as `fast` without its start, which is the time of `start`: `fast` on next to
    nothing. What `slow` needs to start counts for it."""
    begun = statistics.median(start.seconds)
    name = f"{title}: {slow.name} / {fast.name} beyond its start"
    beyond = [seconds - begun for seconds in fast.seconds]
    return claim(name, median_ratio(slow.seconds, beyond), unit="x", at_least=at_least)


def environment() -> dict[str, str]:
    """This process's, with bytecode kept between runs, and BLAS's choice of kernels, as for any installed program."""
    unusual = ("PYTHONDONTWRITEBYTECODE", "OPENBLAS_CORETYPE")
    return {name: value for name, value in os.environ.items() if name not in unusual}


def evict(folder: Path) -> None:
    """Has the kernel forget the pages of a folder's files (where they are on a disk)."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _peak_bytes(pid: int) -> int:
    """Peak memory of a process and its children so far, as the kernel counts it; 0 when it has ended.

    (`ru_maxrss` of a child begins with that of its parent, so it is no measure here.)
    """
    try:
        children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    lines = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return sum((int(line.split()[1]) << 10 for line in lines), start=sum(map(_peak_bytes, children)))
