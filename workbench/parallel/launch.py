"""How ranks come to life: joined when torchrun or Slurm started them, else started here with torchrun's own agent."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from workbench import errors
from workbench.errors import LaunchError, WorkbenchError

_PRELOAD = ["torch", "torch.distributed.fsdp", "workbench.parallel.launch"]
_CHATTY_LOGGERS = (
    "torch.distributed.elastic.agent.server.api",
    "torch.distributed.elastic.multiprocessing.api",
    "torch.multiprocessing.spawn",
)
"""What they would say of a failed or stopped rank is told once and better by `_first_failure`."""
_INTERRUPTED = 130
_SHUTDOWN_SECONDS = "600"
"""How long ranks that were told to stop may take to finish their step and save."""


@dataclass(frozen=True, slots=True)
class RankEnvironment:
    """What a launcher told this process about itself."""

    rank: int
    local_rank: int
    world_size: int


def rank_environment() -> RankEnvironment | None:
    """This process's place among ranks that torchrun or srun started; None when nobody did.

    For Slurm, the rendezvous address that torch expects is filled in from the job's first node.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return RankEnvironment(int(env["RANK"]), int(env.get("LOCAL_RANK", "0")), int(env["WORLD_SIZE"]))
    if "SLURM_STEP_NUM_TASKS" in env and int(env["SLURM_STEP_NUM_TASKS"]) > 1:
        env.setdefault("MASTER_ADDR", _first_host(env.get("SLURM_STEP_NODELIST", "localhost")))
        env.setdefault("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000))
        return RankEnvironment(
            int(env["SLURM_PROCID"]), int(env.get("SLURM_LOCALID", "0")), int(env["SLURM_STEP_NUM_TASKS"])
        )
    return None


def choose_device() -> torch.device:
    """The accelerator of this rank if there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    environment = rank_environment()
    return torch.device("cuda", environment.local_rank % torch.cuda.device_count() if environment is not None else 0)


def require_devices(nproc: int) -> None:
    """LaunchError unless this machine has an accelerator for each of `nproc` ranks, or none at all."""
    gpus = torch.cuda.device_count()
    if 0 < gpus < nproc:
        raise LaunchError(
            f"{nproc} ranks need {nproc} GPUs, and this machine has {gpus}; ask for no more than {gpus}, start them on "
            "several machines with torchrun, or set CUDA_VISIBLE_DEVICES= (to nothing) to run on the CPU"
        )


def run_on_ranks(entry: Callable[..., Any], *args: Any, nproc: int) -> Any:
    """Calls `entry(*args)` on every rank and returns what rank 0 returned, where the ranks were started here.

    In a rank that a launcher started, this process joins the others and `nproc` is not used. With one process `entry`
    runs in this one. Else `nproc` ranks are started, for which `entry` and `args` must be picklable. Raises the first
    failing rank's own WorkbenchError, or LaunchError with its rank and traceback; KeyboardInterrupt after SIGINT or
    SIGTERM, which the ranks get as well, with time to save.
    """
    environment = rank_environment()
    if environment is not None:
        return _join_and_call(environment, entry, args)
    if nproc == 1:
        return entry(*args)
    multiprocessing.set_forkserver_preload(_PRELOAD)
    for name in _CHATTY_LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _SHUTDOWN_SECONDS)
    threads = max(1, (os.cpu_count() or 1) // nproc)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="forkserver",
    )
    with tempfile.TemporaryDirectory(prefix="wb-ranks-") as reports, _kept_signal_handlers():
        try:
            results = elastic_launch(config, _rank_main)(entry, args, threads, reports)
        except ChildFailedError as error:
            if all(failure.exitcode == _INTERRUPTED for failure in error.failures.values()):
                raise KeyboardInterrupt from None
            raise _first_failure(Path(reports), error) from None
        except SignalException:
            raise KeyboardInterrupt from None
    return results[0]


@contextmanager
def _kept_signal_handlers() -> Iterator[None]:
    """Puts back the handlers that torch's agent replaces and leaves behind."""
    kept = {
        number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    }
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in kept.items():
                signal.signal(number, handler)


def _rank_main(entry: Callable[..., Any], args: tuple[Any, ...], threads: int, reports: str) -> Any:
    torch.set_num_threads(threads)
    environment = rank_environment()
    assert environment is not None
    try:
        return _join_and_call(environment, entry, args)
    except KeyboardInterrupt:
        # Not by returning: torch lets a rank that returns wait until its result is read, and nobody will read it.
        sys.exit(_INTERRUPTED)
    except Exception as error:
        report = {
            "when": time.time(),
            "rank": environment.rank,
            "kind": type(error).__name__,
            "message": str(error),
            "traceback": traceback.format_exc(),
        }
        Path(reports, f"{environment.rank}.json").write_text(json.dumps(report))
        # The report is told once by the process that started the ranks; here it would be printed by every rank.
        sys.exit(1)


def _join_and_call(environment: RankEnvironment, entry: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    # A kernel that is loaded at its first call waits for the device, and there for messages that a neighbour may send
    # only when it has heard from this rank (CUDA C++ Programming Guide, Lazy Loading, Concurrent Execution).
    os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")
    device = choose_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if environment.world_size > 1 and not dist.is_initialized():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            rank=environment.rank,
            world_size=environment.world_size,
            timeout=timedelta(minutes=30),
        )
    result = entry(*args)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return result


def _first_failure(reports: Path, error: ChildFailedError) -> WorkbenchError:
    """The failure that came first; those of other ranks, whose neighbour was gone, are its consequences."""
    found = [json.loads(path.read_text()) for path in reports.glob("*.json")]
    if not found:
        rank, failure = error.get_first_failure()
        return LaunchError(f"rank {rank} ended with exit code {failure.exitcode} and left no message; see its log")
    first = min(found, key=lambda report: report["when"])
    kind = getattr(errors, first["kind"], None)
    if isinstance(kind, type) and issubclass(kind, WorkbenchError):
        return kind(first["message"])
    return LaunchError(f"rank {first['rank']} failed:\n{first['traceback'].rstrip()}")


def _first_host(nodes: str) -> str:
    """The first host of a Slurm node list such as `gpu[003-017,021]`."""
    found = re.match(r"([^\[,]+)(?:\[(\d+))?", nodes)
    return f"{found[1]}{found[2] or ''}" if found else "localhost"
