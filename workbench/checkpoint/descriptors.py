"""Many files through few descriptors: those used least recently are closed, and opened again when wanted."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_MOST: Final = 256  # a process may have 1024 as a rule


@dataclass
class _Opened:
    number: int
    users: int = 0


class Descriptors:
    """Descriptors of files that exist, by path, for any number of threads."""

    def __init__(self, flags: int, most: int = _MOST) -> None:
        self._flags, self._most = flags | os.O_CLOEXEC, most
        self._opened: OrderedDict[Path, _Opened] = OrderedDict()
        self._lock = threading.Lock()

    @contextmanager
    def use(self, path: Path) -> Iterator[int]:
        """The descriptor of a file, which stays open inside `with`; OSError when it cannot be opened."""
        with self._lock:
            opened = self._opened.get(path) or _Opened(os.open(path, self._flags))
            opened.users += 1
            self._opened[path] = opened
            self._opened.move_to_end(path)
            self._close_some()
        try:
            yield opened.number
        finally:
            with self._lock:
                opened.users -= 1

    def _close_some(self) -> None:
        if len(self._opened) > self._most:
            idle = next((path for path, opened in self._opened.items() if not opened.users), None)
            if idle is not None:
                os.close(self._opened.pop(idle).number)

    def close(self) -> None:
        """Closes all; none may be in use."""
        with self._lock:
            while self._opened:
                os.close(self._opened.popitem()[1].number)

    def __del__(self) -> None:
        self.close()
