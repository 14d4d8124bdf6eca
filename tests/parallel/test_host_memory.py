"""Freed memory stays with the process that asked for it."""

from __future__ import annotations

import subprocess
import sys

import pytest

_PROGRAM = """
import resource, sys
one = sys.argv[1][:1].encode()
from workbench.parallel.host_memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
data = (one * (16 << 20), one * (64 << 20))
del data
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    data = (one * (16 << 20), one * (64 << 20))
    del data
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", _PROGRAM, how], check=True, capture_output=True, text=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is what is spoken to")
def test_memory_that_is_freed_and_taken_again_costs_no_page_faults_once_it_is_kept() -> None:
    assert _faults("returned") > 4 * 10_000
    assert _faults("kept") < 1_000
