"""A pool of gloo ranks per world size, forked once and kept for the whole test session."""

from __future__ import annotations

import atexit
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

_POOLS: dict[int, RankPool] = {}
_TIMEOUT_SECONDS = 120


class RankFailed(AssertionError):
    """A function failed on a rank; the message holds that rank's traceback."""


class RankPool:
    """`world_size` forked processes joined in one gloo group, waiting for functions to call."""

    def __init__(self, world_size: int) -> None:
        context = mp.get_context("fork")
        handle, self._store = tempfile.mkstemp(prefix="ranks-")
        os.close(handle)
        os.unlink(self._store)
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, self._store, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(*args)` on every rank; the results in rank order. A failure ends the pool."""
        for pipe in self._pipes:
            pipe.send((function, args))
        outcomes = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(_TIMEOUT_SECONDS if not any(not o[0] for o in outcomes) else 5):
                outcomes.append((False, f"no answer from rank {rank}"))
                continue
            try:
                outcomes.append(pipe.recv())
            except EOFError:
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
        for world_size, pool in list(_POOLS.items()):
            if pool is self:
                del _POOLS[world_size]
        if os.path.exists(self._store):
            os.unlink(self._store)


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Results of `function(*args)`, a module-level function, on each of `world_size` gloo ranks, in rank order."""
    if world_size not in _POOLS:
        if not _POOLS:
            atexit.register(close_pools)
        _POOLS[world_size] = RankPool(world_size)
    return _POOLS[world_size].run(function, *args)


def close_pools() -> None:
    for pool in list(_POOLS.values()):
        pool.close()


def _serve(rank: int, world_size: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=120)
    )
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
        else:
            _destroy_groups()


def _destroy_groups() -> None:
    """Ends all groups but the world's: each keeps threads that wake a hundred times a second."""
    dist.barrier()
    # What keeps a mesh, and so its groups, alive after the function: cycles, and the sharding caches of DTensor.
    _clear_sharding_prop_cache()
    gc.collect()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
