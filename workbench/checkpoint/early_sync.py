"""Keeps the disk busy while a checkpoint is still being written, so that the sync at its end is short."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, Protocol

_FLUSH_BYTES: Final = 32 << 20


class Syncable(Protocol):
    """A file that can be synced from any thread."""

    def sync(self) -> None:
        """Returns when what has been written is on the disk."""
        ...


class EarlySync:
    """Syncs files in a thread of its own whenever much has been written to one since its last sync."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._unsynced: dict[Syncable, int] = {}
        self._begun: list[Future[None]] = []

    def written(self, file: Syncable, num_bytes: int) -> None:
        """Counts bytes written to a file; from any thread."""
        with self._lock:
            self._unsynced[file] = self._unsynced.get(file, 0) + num_bytes
            if self._unsynced[file] >= _FLUSH_BYTES:
                self._unsynced[file] = 0
                self._pool = self._pool or ThreadPoolExecutor(1)
                self._begun.append(self._pool.submit(file.sync))

    def finish(self) -> None:
        """Waits for the syncs that have begun, drops the others, and raises the first failure.

        The kernel reports a failed write to one sync only: that failure must not be lost here.
        """
        self.cancel()
        for future in self._begun:
            if not future.cancelled():
                future.result()
        self._begun.clear()

    def cancel(self) -> None:
        """As `finish`, for a checkpoint that is given up: failures no longer matter."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
