"""A pool of ranks per world size and kind of device, started once and kept for the whole test session."""

from __future__ import annotations

import atexit
import faulthandler
import gc
import multiprocessing as mp
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

_POOLS: dict[tuple[int, str], RankPool] = {}
_TIMEOUT_SECONDS = 120


class RankFailed(AssertionError):
    """A function failed on a rank; the message holds that rank's traceback."""


class RankPool:
    """`world_size` processes joined in one group, waiting for functions to call: forked ones that talk through gloo, or
    with `device` "cuda" fresh ones that talk through NCCL as well."""

    def __init__(self, world_size: int, device: str = "cpu") -> None:
        context = mp.get_context("fork" if device == "cpu" else "spawn")
        handle, self._store = tempfile.mkstemp(prefix="ranks-")
        os.close(handle)
        os.unlink(self._store)
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, self._store, theirs, device), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(*args)` on every rank; the results in rank order. A failure ends the pool."""
        try:
            for pipe in self._pipes:
                pipe.send((function, args))
        except BrokenPipeError as error:
            self.close()
            raise RankFailed("a rank died after the call before this one") from error
        outcomes = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(_TIMEOUT_SECONDS if not any(not o[0] for o in outcomes) else 5):
                outcomes.append((False, f"no answer from rank {rank}"))
                continue
            try:
                outcomes.append(pipe.recv())
            except (EOFError, ConnectionResetError):
                outcomes.append((False, f"rank {rank} died"))
        failures = [f"rank {rank}: {value}" for rank, (ok, value) in enumerate(outcomes) if not ok]
        if failures:
            self.close()
            raise RankFailed("\n".join(failures))
        return [value for _, value in outcomes]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for key, pool in list(_POOLS.items()):
            if pool is self:
                del _POOLS[key]
        if os.path.exists(self._store):
            os.unlink(self._store)


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, device: str = "cpu") -> list[Any]:
    """Results of `function(*args)`, a module-level function, on each of `world_size` ranks, in rank order."""
    key = (world_size, device)
    if key not in _POOLS:
        if not _POOLS:
            atexit.register(close_pools)
        _POOLS[key] = RankPool(world_size, device)
    return _POOLS[key].run(function, *args)


def close_pools() -> None:
    for pool in list(_POOLS.values()):
        pool.close()


def _serve(rank: int, world_size: int, store: str, pipe: Connection, device: str) -> None:
    torch.set_num_threads(1)
    backend = "gloo"
    if device == "cuda":
        backend = "cpu:gloo,cuda:nccl"
        # NCCL refuses two ranks of one machine on one GPU. As if on machines of their own they talk through sockets.
        os.environ.update(NCCL_HOSTID=f"rank-{rank}", NCCL_SOCKET_IFNAME="lo", NCCL_IB_DISABLE="1")
        os.environ["CUDA_MODULE_LOADING"] = "EAGER"  # as workbench/parallel/launch.py
        torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=120)
    )
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        faulthandler.dump_traceback_later(0.8 * _TIMEOUT_SECONDS)
        try:
            pipe.send((True, function(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
        else:
            _destroy_groups()
        faulthandler.cancel_dump_traceback_later()


def _destroy_groups() -> None:
    """Ends all groups but the world's: each keeps threads that wake a hundred times a second."""
    dist.barrier()
    # What keeps a mesh, and so its groups, alive after the function: cycles, and the sharding caches of DTensor.
    _clear_sharding_prop_cache()
    gc.collect()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
