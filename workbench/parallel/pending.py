"""Transfers under way, and the tensors that they bring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch


class Work(Protocol):
    """A transfer under way."""

    def wait(self) -> Any: ...

    def is_completed(self) -> bool: ...


@dataclass(frozen=True)
class Pending:
    """A tensor on its way; `wait` returns it. On a GPU it is the current stream that waits."""

    works: Sequence[Work]
    result: Callable[[], torch.Tensor]
    sent: torch.Tensor | Sequence[torch.Tensor]

    def wait(self) -> torch.Tensor:
        for work in self.works:
            work.wait()
        return self.result()
