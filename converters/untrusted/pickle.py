"""Pickles of unknown origin as plain data: an interpreter of the opcodes that imports nothing and calls nothing.

What a pickle names is looked up in an allow-list (converters.untrusted.plain); all that it can make are numbers, texts,
tuples, lists, dictionaries, sets and the plain data that the list's builders make. Any other global, extension code,
persistent id or buffer is refused by name. Time and memory are linear in the size of the pickle, within bounds.
"""

from __future__ import annotations

import struct
from mmap import mmap
from typing import Any, Final

from converters.untrusted.machine import Machine, PersistentLoad
from converters.untrusted.plain import Allowed, PlainObject, Refused
from workbench.errors import CheckpointError

MAX_BYTES: Final = 1 << 30
_MAX_DEPTH: Final = 200
_EXPANSION: Final = 8  # elements reached, counting shared ones each time, per byte of pickle
_FAULTS: Final = (IndexError, KeyError, ValueError, TypeError, AttributeError, OverflowError, struct.error)


def _no_persistent_id(pid: Any) -> Any:
    raise Refused("has a persistent id, which has no meaning in this file")


def read_pickle(data: bytes, allowed: Allowed, where: str, *, persistent: PersistentLoad = _no_persistent_id) -> Any:
    """The plain data that a pickle describes.

    Builders and `persistent` may raise Refused. CheckpointError, beginning with `where`, when the pickle is damaged or
    holds what is not in the list.
    """
    if len(data) > MAX_BYTES:
        raise CheckpointError(f"{where}: a pickle of {len(data)} bytes is not read (at most {MAX_BYTES})")
    return read_one(data, 0, allowed, where, persistent=persistent)[0]


def read_one(
    data: bytes | mmap, start: int, allowed: Allowed, where: str, *, persistent: PersistentLoad = _no_persistent_id
) -> tuple[Any, int]:
    """What the pickle that begins at byte `start` describes, and where it ends."""
    machine = Machine(data, start, min(len(data), start + MAX_BYTES), allowed, persistent)
    try:
        made = machine.run()
        _check_size(made, _EXPANSION * (machine.position - start) + 1000)
    except Refused as error:
        raise CheckpointError(f"{where}: {error}") from None
    except _FAULTS as error:
        raise CheckpointError(f"{where}: damaged near byte {machine.position}: {error}") from error
    return made, machine.position


def _check_size(root: Any, limit: int) -> None:
    """Refuses what is nested too deep, holds itself, or unfolds to much more than was written."""
    level, total = [root], 0
    for _ in range(_MAX_DEPTH):
        total += len(level)
        if total > limit:
            raise Refused(f"unfolds to more than {limit} elements; it was made to exhaust memory")
        below: list[Any] = []
        room = limit - total
        for item in level:
            kind = type(item)
            if kind is dict:
                below.extend(item.values())
            elif kind is tuple or kind is list:
                below.extend(item)
            elif kind is PlainObject:
                below.append(item.arguments)
                below.extend(item.attributes.values())
            if len(below) > room:
                raise Refused(f"unfolds to more than {limit} elements; it was made to exhaust memory")
        if not below:
            return
        level = below
    raise Refused(f"is nested more than {_MAX_DEPTH} deep, or holds itself")
