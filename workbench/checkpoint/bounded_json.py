"""JSON of unknown origin, within bounds of depth and memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final

_MAX_CONTAINERS: Final = 8_000_000  # two lists and an object for each of two million tensors; half a gigabyte


def parse_json(text: bytes, *, object_pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """What a JSON document says; ValueError when it is none, nests too deep, or would fill the memory."""
    if (containers := text.count(b"[") + text.count(b"{")) > _MAX_CONTAINERS:
        raise ValueError(f"{containers} lists and objects, more than {_MAX_CONTAINERS}")
    try:
        value = json.loads(text, object_pairs_hook=object_pairs)
        if b"\\ud" in text or b"\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate could not be printed, nor name a file
    except RecursionError:
        raise ValueError("it nests too deep") from None
    return value
