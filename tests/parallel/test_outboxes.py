"""Collectives through memory that ranks share: what gloo gives bit for bit, and what happens where they cannot."""

from __future__ import annotations

import contextlib
import gc
import os

import pytest
import torch

from tests.helpers.ranks import RankFailed, run_ranks
from workbench.parallel import outboxes
from workbench.parallel.axis import Axis
from workbench.parallel.outboxes import Outboxes

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="this system has no nameless files")


def axis_of(size: int) -> Axis:
    rank = torch.distributed.get_rank()
    return Axis("tp", range(size), rank, torch.distributed.group.WORLD)


def open_files() -> int:
    """How many pipes and nameless files this process has open."""
    found = 0
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the listing itself
            found += os.readlink(f"/proc/self/fd/{fd}").startswith(("pipe:", "/memfd:wb-outbox"))
    return found


def socketed(size: int) -> Axis:
    axis = axis_of(size)
    axis._outboxes = None
    return axis


@pytest.mark.parametrize("size", [2, 3])
def test_collectives_give_what_sockets_give(size: int) -> None:
    assert all(run_ranks(size, _compare, size))


def test_what_finds_no_room_goes_through_sockets() -> None:
    assert run_ranks(2, _crowd) == [True, True]


def test_without_a_look_at_the_others_all_ranks_use_sockets() -> None:
    assert run_ranks(2, _blind) == [True, True]


def test_no_files_stay_open() -> None:
    counts = run_ranks(2, _open_files)
    assert all(before == after for before, after in counts), counts


def test_a_neighbour_that_has_ended_is_missed_at_once() -> None:
    with pytest.raises(RankFailed, match="process at position 1 of this rank's group has ended"):
        run_ranks(2, _leave)


def _compare(size: int) -> bool:
    shared, sockets = axis_of(size), socketed(size)
    for turn, dtype in enumerate((torch.float32, torch.bfloat16, torch.int64, torch.float64) * 2):
        generator = torch.Generator().manual_seed(10 * turn + shared.rank)
        tensor = torch.randn(5, 2 * size, 600, generator=generator).mul_(100).to(dtype)
        cut = tensor.transpose(0, 1)  # not contiguous
        for one, other in (
            (shared.all_gather(tensor, dim=1), sockets.all_gather(tensor, dim=1)),
            (shared.all_gather(cut), sockets.all_gather(cut)),
            (shared.reduce_scatter(tensor, dim=1), sockets.reduce_scatter(tensor, dim=1)),
            (shared.all_reduce(tensor.clone(), "max"), sockets.all_reduce(tensor.clone(), "max")),
        ):
            assert torch.equal(one, other)
        summed = shared.all_reduce(tensor.clone())
        assert torch.equal(summed, sockets.reduce_scatter(torch.cat([tensor] * size)))
    assert shared._outboxes is not None and shared._outboxes._messages == 8 * 5
    return True


def _crowd() -> bool:
    axis = axis_of(2)
    assert axis.all_gather(torch.zeros(2, 0, 3), dim=1).shape == (2, 0, 3)
    assert axis.all_gather(torch.zeros(1, requires_grad=True)).tolist() == [0, 0]
    axis = axis_of(2)
    tensors = [torch.full((40,), 10.0 * i + axis.rank) for i in range(5)]
    pending = [axis.start_all_gather(tensor) for tensor in tensors]
    assert axis._outboxes is not None and axis._outboxes._messages == outboxes._SLOTS
    for i in reversed(range(5)):
        assert pending[i].wait()[::40].tolist() == [10.0 * i, 10.0 * i + 1]
    large = torch.full((outboxes._SLOT_BYTES + 1,), axis.rank, dtype=torch.uint8)
    assert axis.all_gather(large).sum() == len(large)
    assert axis._outboxes._messages == outboxes._SLOTS
    for i in range(10):
        assert axis.reduce_scatter(torch.full((2, 3), float(i + axis.rank))).tolist() == [[2 * i + 1] * 3]
    return axis._outboxes._messages == outboxes._SLOTS + 10


def _blind() -> bool:
    axis = axis_of(2)
    look = outboxes._mapped
    if axis.rank == 1:
        outboxes._mapped = _see_nothing
    before = open_files()
    try:
        gathered = axis.all_gather(torch.tensor([axis.rank]))
    finally:
        outboxes._mapped = look
    return axis._outboxes is None and gathered.tolist() == [0, 1] and open_files() == before


def _see_nothing(path: str, secret: bytes) -> torch.Tensor:
    raise PermissionError(path)


def _open_files() -> tuple[int, int]:
    gc.collect()
    before = open_files()
    for _ in range(3):
        axis = axis_of(2)
        axis.all_gather(torch.zeros(3))
        assert isinstance(axis._outboxes, Outboxes)
        assert open_files() > before
        del axis
        gc.collect()
    return before, open_files()


def _leave() -> None:
    axis = axis_of(2)
    axis.all_gather(torch.zeros(3))
    if axis.rank == 1:
        os._exit(1)
    axis.all_gather(torch.zeros(3))
