"""Planning a reshard of a model of 10^12 parameters and its Adam moments between layouts of 4096 ranks.

python benchmarks/plan.py [--quick] [--json]

From geometry alone, without I/O: more than 10^6 pieces on either side. Memory is the growth of the process, as the
kernel counts it, while the plan is made; --quick has an eighth of the layers and ranks, which shows how cost grows.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from _common import Claim, claim, main, say

ROOT = Path(__file__).parents[1]
MAX_SECONDS = 5.0
MAX_BYTES = 500_000_000
PROGRAM = """
import json, sys, time
from pathlib import Path
from tests.helpers.geometry import geometry_request, GeometrySource, large_model
from converters.formats.native import FORMAT
from converters.plan import make_plan
from workbench.spec.layout import ParallelLayout

def peak():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))

shrink = int(sys.argv[1])
model = large_model(shrink)
before, after = (ParallelLayout(tp=tp, pp=pp // shrink, dp=ep, ep=ep) for tp, pp, ep in ((8, 64, 8), (8, 32, 16)))
began = peak()
source = GeometrySource(model, before)
request = geometry_request(source, model, after, Path("/nowhere/target"))
held = peak()
started, computed = time.perf_counter(), time.process_time()
plan = make_plan(source, FORMAT.destination(request))
seconds, computed = time.perf_counter() - started, time.process_time() - computed
print(json.dumps({
    "seconds": seconds, "computed": computed, "bytes": peak() - held, "all_bytes": peak(), "pieces": plan.num_pieces,
    "chunks": sum(len(source.chunks(name)) for name in source.schema), "files": len(plan.files),
    "tensors": len(plan.tensors), "parameters": sum(t.numel for n, t in plan.tensors.items() if n[:6] != "optim."),
    "units": len(plan.sweeps), "ranks": before.world_size,
}))
"""


def measure(shrink: int) -> dict[str, float]:
    """The plan of a model and ranks that are so many times smaller, made in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(shrink)], cwd=ROOT, check=True, capture_output=True, text=True
    )
    found: dict[str, float] = json.loads(done.stdout)
    say(f"  {found}")
    return found


def run(quick: bool) -> list[Claim]:
    """Seconds and memory of the plan, and how they grow."""
    small = measure(8)
    if quick:
        return [claim("plan of an eighth", small["seconds"], unit="s"), claim("pieces", small["pieces"])]
    full = measure(1)
    note = f"{full['parameters'] / 1e12:.2f} T parameters, {full['tensors']:.0f} tensors, {full['ranks']:.0f} ranks"
    pieces = f"{full['chunks']:.0f} at the source, {full['pieces']:.0f} in {full['files']:.0f} files"
    grows = full["computed"] / small["computed"] / (full["pieces"] / small["pieces"])
    return [
        claim("plan", full["seconds"], unit="s", at_most=MAX_SECONDS, note=note),
        claim("of which computing", full["computed"], unit="s", note="the rest is waiting for a core"),
        claim("memory of the whole process", full["all_bytes"] / 1e6, unit="MB", at_most=MAX_BYTES / 1e6),
        claim("memory of the plan", full["bytes"] / 1e6, unit="MB"),
        claim("pieces", full["pieces"], at_least=1e6, note=pieces),
        claim("time a piece / that of an eighth", grows, unit="x", note="1 is linear"),
    ]


if __name__ == "__main__":
    main(run, description=__doc__)
