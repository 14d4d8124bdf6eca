"""Messages between the ranks of one machine through memory that they share: two copies instead of a socket's work.

Each rank writes into an outbox of its own, which the others map. A byte through a pipe says that a message is there, a
byte back that it was read. Both are reached through /proc by those who may look there, and have no name that a killed
process could leave behind.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import select
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch

from workbench.parallel.pending import Pending

Join = Callable[[Sequence[torch.Tensor]], torch.Tensor]
_SLOTS = 2  # as many as are under way at once; more would only leave the caches
_SLOT_BYTES = 32 << 20  # of addresses; only what was written once takes memory
_ALIGNED_BYTES = 64
_HERE, _READ = 0, 0x80  # the next message is there; with the number of a slot: that one was read
_PATIENCE = timedelta(minutes=30)  # as for the other collectives


class Outboxes:
    """The outboxes of all ranks of a group, as this rank sees them. Messages are swapped in one order on all ranks."""

    def __init__(self, rank: int, boxes: Sequence[torch.Tensor], hears: Sequence[int], tells: Sequence[int]) -> None:
        self._rank, self._boxes, self._hears, self._tells = rank, boxes, hears, tells
        self._others = [i for i in range(len(boxes)) if i != rank]
        self._messages = 0
        self._arrived = [0] * len(boxes)
        self._unread: list[set[int]] = [set() for _ in range(_SLOTS)]
        self._uncollected: set[int] = set()
        weakref.finalize(self, _close, [fd for fd in (*hears, *tells) if fd >= 0])

    @staticmethod
    def open(rank: int, size: int, gather: Callable[[Any], list[Any]]) -> Outboxes | None:
        """The outboxes of `size` ranks, None where they cannot share memory. Collective over them: `gather` gives each
        what all of them have."""
        if not hasattr(os, "memfd_create"):
            return None
        box = os.memfd_create("wb-outbox")
        secret = secrets.token_bytes(16)
        os.ftruncate(box, _SLOTS * _SLOT_BYTES + len(secret))
        os.pwrite(box, secret, _SLOTS * _SLOT_BYTES)
        pipes = [os.pipe() if i != rank else (-1, -1) for i in range(size)]
        hears = [reads for reads, _ in pipes]
        mine = (os.getpid(), box, [writes for _, writes in pipes], secret)
        boxes, tells = [], []
        try:
            for position, (pid, their_box, writes, their_secret) in enumerate(gather(mine)):
                boxes.append(_mapped(f"/proc/{pid}/fd/{their_box}", their_secret))
                tells.append(-1 if position == rank else os.open(f"/proc/{pid}/fd/{writes[rank]}", os.O_WRONLY))
        except (OSError, ValueError):
            shared = False
        else:
            shared = True
        everywhere = all(gather(shared))
        # Now that all have them open: a pipe whose writer has gone then ends.
        _close([box, *(writes for _, writes in pipes if writes >= 0)])
        if everywhere:
            return Outboxes(rank, boxes, hears, tells)
        _close([fd for fd in (*hears, *tells) if fd >= 0])
        return None

    def hold(self, pieces: Sequence[torch.Tensor]) -> bool:
        """Whether there is room for a message of these pieces now; the same on all ranks."""
        return len(pieces) * _size(pieces[0]) <= _SLOT_BYTES and self._messages % _SLOTS not in self._uncollected

    def swap(self, pieces: Sequence[torch.Tensor], join: Join) -> Pending:
        """Gives each rank its piece, all of one shape and type, or the only one to all; `join` makes the result of what
        each rank had for this one, in order. This rank's own piece must not change until then."""
        number, slot = self._messages, self._messages % _SLOTS
        while self._unread[slot]:
            self._listen(next(iter(self._unread[slot])))
        pieces = [piece.detach() for piece in pieces]
        size = _size(pieces[0])
        for i, piece in enumerate(pieces):
            if len(pieces) == 1 or i != self._rank:
                _view(self._boxes[self._rank], slot, i * size, piece).copy_(piece)
        self._unread[slot].update(self._others)
        self._uncollected.add(slot)
        self._messages += 1
        for other in self._others:
            self._tell(other, _HERE)
        mine, offset = (pieces[0], 0) if len(pieces) == 1 else (pieces[self._rank], self._rank * size)

        def collect() -> torch.Tensor:
            parts = []
            for other, box in enumerate(self._boxes):
                while other != self._rank and self._arrived[other] <= number:
                    self._listen(other)
                parts.append(mine if other == self._rank else _view(box, slot, offset, mine))
            joined = join(parts)
            self._uncollected.discard(slot)
            for other in self._others:
                with contextlib.suppress(_Ended):  # as one may that needs nothing more
                    self._tell(other, _READ | slot)
            return joined

        return Pending((), collect, mine)

    def _tell(self, other: int, byte: int) -> None:
        try:
            os.write(self._tells[other], bytes([byte]))
        except BrokenPipeError:
            raise _Ended(other) from None

    def _listen(self, other: int) -> None:
        """Waits for word from a rank, and notes it."""
        poll = select.poll()
        poll.register(self._hears[other], select.POLLIN)
        if not poll.poll(_PATIENCE.total_seconds() * 1000):
            raise RuntimeError(f"position {other} of this rank's group has not answered for {_PATIENCE}")
        said = os.read(self._hears[other], 4096)
        if not said:
            raise _Ended(other)
        for byte in said:
            if byte & _READ:
                self._unread[byte & ~_READ].discard(other)
            else:
                self._arrived[other] += 1


class _Ended(RuntimeError):
    def __init__(self, other: int) -> None:
        super().__init__(f"the process at position {other} of this rank's group has ended")


def _mapped(path: str, secret: bytes) -> torch.Tensor:
    """The bytes of an outbox; ValueError where the file is another's, as of a process on another machine."""
    fd = os.open(path, os.O_RDWR)
    try:
        if os.pread(fd, len(secret), _SLOTS * _SLOT_BYTES) != secret:
            raise ValueError(f"{path} is no outbox of this group")
        return torch.frombuffer(mmap.mmap(fd, _SLOTS * _SLOT_BYTES), dtype=torch.uint8)
    finally:
        os.close(fd)


def _size(piece: torch.Tensor) -> int:
    return -(-piece.numel() * piece.element_size() // _ALIGNED_BYTES) * _ALIGNED_BYTES


def _view(box: torch.Tensor, slot: int, offset: int, like: torch.Tensor) -> torch.Tensor:
    start = slot * _SLOT_BYTES + offset
    return box[start : start + like.numel() * like.element_size()].view(like.dtype).view(like.shape)


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
