"""The ranks along one kind of parallelism, and what they say to one another.

An axis of size 1 has no process group and its collectives return their input, so a single process needs no
`torch.distributed` at all and runs the same code as any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, reduce
from typing import Any, Literal

import torch
import torch.distributed as dist

from workbench.parallel.outboxes import Join, Outboxes
from workbench.parallel.pending import Pending, Work

Operation = Literal["sum", "max", "min"]
Message = Literal["F", "B"]
_OPERATIONS = {
    "sum": (dist.ReduceOp.SUM, torch.add),
    "max": (dist.ReduceOp.MAX, torch.maximum),
    "min": (dist.ReduceOp.MIN, torch.minimum),
}
_FEW = 4  # ranks, up to which each may read all of the others' tensors
_LONG = 1 << 14  # bytes: it is not worth the outboxes to reduce less
# torch 2.13 renamed it, and warns on every rank about the old name.
_ALL_GATHER = vars(dist).get("all_gather_single") or dist.all_gather_into_tensor
_REDUCE_SCATTER = vars(dist).get("reduce_scatter_single") or dist.reduce_scatter_tensor


class Axis:
    """The ranks that differ in one coordinate only, and how they communicate.

    `rank` is this process's position on the axis, `ranks` are the global ranks in order of position.
    """

    def __init__(self, name: str, ranks: Sequence[int], rank: int, group: dist.ProcessGroup | None) -> None:
        assert group is not None or len(ranks) == 1, f"axis {name} of {len(ranks)} ranks needs a process group"
        self.name = name
        self.ranks = tuple(ranks)
        self.rank = rank
        self.size = len(self.ranks)
        self._group = group

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The process group, for libraries that communicate themselves; may be None on an axis of size 1."""
        return self._group

    def all_reduce(self, tensor: torch.Tensor, operation: Operation = "sum") -> torch.Tensor:
        """`tensor` itself, after it was reduced in place over the axis."""
        if self.size == 1:
            return tensor
        kind, combine = _OPERATIONS[operation]
        if tensor.device.type == "cpu" and self.size <= _FEW and tensor.nbytes >= _LONG and self._share([tensor]):
            tensor.detach().copy_(self._swap([tensor], lambda parts: reduce(combine, parts)).wait())
            return tensor
        dist.all_reduce(tensor, kind, group=self._group)
        return tensor

    def all_gather(self, tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """The tensors of all ranks, which have the same shape, concatenated on `dim` in order of position."""
        return self.start_all_gather(tensor, dim).wait()

    def start_all_gather(self, tensor: torch.Tensor, dim: int = 0) -> Pending:
        """`all_gather` under way; `tensor` must not change until it is done."""
        if self.size == 1:
            return Pending((), lambda: tensor, tensor)
        if tensor.device.type == "cpu":
            return self._swap([tensor], lambda parts: torch.cat(list(parts), dim=dim))
        local = tensor.contiguous()
        gathered = local.new_empty((self.size, *local.shape))
        work = _ALL_GATHER(gathered, local.unsqueeze(0), group=self._group, async_op=True)
        return Pending([work], lambda: torch.cat(gathered.unbind(0), dim=dim), local)

    def reduce_scatter(self, tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """This position's share of the sum of the ranks' tensors, which are cut on `dim` in order of position."""
        return self.start_reduce_scatter(tensor, dim).wait()

    def start_reduce_scatter(self, tensor: torch.Tensor, dim: int = 0) -> Pending:
        """`reduce_scatter` under way."""
        if self.size == 1:
            return Pending((), lambda: tensor, tensor)
        if tensor.device.type == "cpu":
            return self._swap(tensor.chunk(self.size, dim=dim), lambda parts: reduce(torch.add, parts))
        shares = torch.stack(tensor.chunk(self.size, dim=dim))
        mine = shares.new_empty((1, *shares.shape[1:]))
        work = _REDUCE_SCATTER(mine, shares, group=self._group, async_op=True)
        return Pending([work], lambda: mine[0], shares)

    def _swap(self, pieces: Sequence[torch.Tensor], join: Join) -> Pending:
        """Starts to send each position its piece, all of one shape, or the only one to all; `join` makes the result of
        what each had for this one, in order.

        Gloo's own reduce-scatter is an all-reduce of everything: twice the bytes, three times the time.
        """
        if (outboxes := self._share(pieces)) is not None:
            return outboxes.swap(pieces, join)
        sent = [piece.contiguous() for piece in pieces] * (self.size if len(pieces) == 1 else 1)
        received = [mine if i == self.rank else torch.empty_like(mine) for i, mine in enumerate(sent)]
        others = [i for i in range(self.size) if i != self.rank]
        operations = [dist.P2POp(dist.isend, sent[i], self.ranks[i], group=self._group) for i in others]
        operations += [dist.P2POp(dist.irecv, received[i], self.ranks[i], group=self._group) for i in others]
        return Pending(dist.batch_isend_irecv(operations), lambda: join(received), sent)

    @cached_property
    def _outboxes(self) -> Outboxes | None:
        return Outboxes.open(self.rank, self.size, self.gather_objects)

    def _share(self, pieces: Sequence[torch.Tensor]) -> Outboxes | None:
        """The outboxes, where the ranks share memory and these pieces have room in it. Collective over the axis."""
        return self._outboxes if self._outboxes is not None and self._outboxes.hold(pieces) else None

    def pass_on(self, tensor: torch.Tensor) -> Pending:
        """Starts to send `tensor` to the next position, and to receive the like from the one before, in a ring."""
        local = tensor.contiguous()
        received = torch.empty_like(local)
        after, before = (self.ranks[(self.rank + step) % self.size] for step in (1, -1))
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, local, after, group=self._group),
                dist.P2POp(dist.irecv, received, before, group=self._group),
            ]
        )
        return Pending(works, lambda: received, local)

    def exchange(self, pieces: Sequence[torch.Tensor], sizes: Sequence[int]) -> Sequence[torch.Tensor]:
        """What each position has for this one: a flat tensor of `sizes` elements each. `pieces`: one flat tensor for
        each position."""
        if self.size == 1:
            return pieces
        sent = torch.cat(list(pieces))
        received = sent.new_empty(sum(sizes))
        dist.all_to_all_single(received, sent, list(sizes), [piece.numel() for piece in pieces], group=self._group)
        return received.split(list(sizes))

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
        """`tensor` itself, overwritten with that of position `source`."""
        if self.size > 1:
            dist.broadcast(tensor, self.ranks[source], group=self._group)
        return tensor

    def gather_objects(self, value: Any) -> list[Any]:
        """The picklable values of all ranks, in order of position, on every rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self._group)
        return found

    def broadcast_object(self, value: Any) -> Any:
        """The picklable value of the first rank, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, self.ranks[0], group=self._group)
        return box[0]

    def barrier(self) -> None:
        """Returns when every rank of the axis has called it."""
        if self.size > 1:
            dist.barrier(group=self._group)


class PipelineAxis(Axis):
    """The stages of one pipeline.

    Messages of each kind ("F" activations, "B" gradients) and each direction have a group of their own, a lane, so that
    no message waits behind one of another kind, and the order within a lane is the order of the schedule.
    """

    def __init__(
        self,
        ranks: Sequence[int],
        rank: int,
        group: dist.ProcessGroup | None,
        lanes: Mapping[tuple[Message, bool], dist.ProcessGroup] | None = None,
    ) -> None:
        super().__init__("pp", ranks, rank, group)
        self._lanes = lanes or {}

    def isend(self, tensor: torch.Tensor, to_stage: int, message: Message) -> Work:
        """Starts to send; the tensor must not change until the work is done."""
        lane = self._lanes[message, self.rank < to_stage]
        work = dist.isend(tensor, self.ranks[to_stage], group=lane)
        assert work is not None
        return work

    def connect(self, device: torch.device) -> None:
        """Sends a number around the stages on every lane, so that each pair of neighbours has its connection.

        NCCL makes one when two ranks first talk, and each waits there for the other. A receive that is posted ahead
        would wait for a neighbour that waits for this stage's message first. Collective over the axis.
        """
        number = torch.zeros(1, device=device)
        for lane in self._lanes.values():
            for stage in range(self.size):
                after = (stage + 1) % self.size
                if self.rank == stage:
                    dist.send(number, self.ranks[after], group=lane)
                elif self.rank == after:
                    dist.recv(number, self.ranks[stage], group=lane)

    def irecv(self, tensor: torch.Tensor, from_stage: int, message: Message) -> Work:
        """Starts to receive into `tensor`, in the order in which the other stage sends messages of this kind."""
        lane = self._lanes[message, from_stage < self.rank]
        work = dist.irecv(tensor, self.ranks[from_stage], group=lane)
        assert work is not None
        return work
