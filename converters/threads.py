"""Work shared out among threads: the first failure stops all and is raised."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

Item = TypeVar("Item")


def in_threads(items: Iterable[Item], work: Callable[[Item, threading.Event], None], workers: int) -> None:
    """Runs `work` on every item, begun in their order. After a failure or Ctrl-C the rest are told to stop."""
    stop = threading.Event()
    with ThreadPoolExecutor(workers) as pool:
        try:
            futures = [pool.submit(work, item, stop) for item in items]
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
