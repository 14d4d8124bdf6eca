"""Files of torch.save, read by PyTorch itself: its loader of nothing but weights, which executes nothing of a file."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import IO, Any

import torch


class _Stranger:
    """Stands for an object of a class that PyTorch's loader would refuse, and keeps its attributes."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def load(path: Path) -> Any:
    """What a file holds, its tensors mapped."""
    if not zipfile.is_zipfile(path):  # as before 2020
        return torch.load(path, map_location="cpu", weights_only=True)
    return _load(str(path), mmap=True)


def load_range(path: Path, start: int, num_bytes: int) -> Any:
    """What a part of a file holds."""
    with path.open("rb") as file:
        file.seek(start)
        return _load(io.BytesIO(file.read(num_bytes)), mmap=False)


def _load(file: str | IO[bytes], *, mmap: bool) -> Any:
    strangers = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    if not isinstance(file, str):
        file.seek(0)
    with torch.serialization.safe_globals([(_Stranger, name) for name in strangers]):
        return torch.load(file, map_location="cpu", mmap=mmap, weights_only=True)
