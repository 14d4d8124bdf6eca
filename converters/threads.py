"""Work shared out among threads: the first failure stops all and is raised."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

Item = TypeVar("Item")


def in_threads(items: Iterable[Item], work: Callable[[Item, threading.Event], None], workers: int) -> None:
    """Runs `work` on every item, begun in their order, of which there may be a million.

    After a failure or Ctrl-C the work under way is told to stop and no more is begun.
    """
    stop, lock, left = threading.Event(), threading.Lock(), iter(items)

    def drain() -> None:
        while not stop.is_set():
            with lock:
                taken = list(itertools.islice(left, 1))
            if not taken:
                return
            work(taken[0], stop)

    with ThreadPoolExecutor(workers) as pool:
        try:
            futures = [pool.submit(drain) for _ in range(workers)]
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
        except BaseException:
            stop.set()
            raise
