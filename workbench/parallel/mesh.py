"""The process grid: one `Axis` per kind of parallelism, and the `Mesh` that holds them. Passed, never global.

An axis of size 1 has no process group and its collectives return their input, so a single process needs no
`torch.distributed` at all and runs the same code as any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from workbench.spec.layout import Coordinate, ParallelLayout

Operation = Literal["sum", "max", "min"]
_OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
# torch 2.13 renamed it, and warns on every rank about the old name.
_ALL_GATHER = vars(dist).get("all_gather_single") or dist.all_gather_into_tensor


class Work(Protocol):
    """A transfer under way."""

    def wait(self) -> Any: ...

    def is_completed(self) -> bool: ...


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

    def all_reduce(self, tensor: torch.Tensor, operation: Operation = "sum") -> torch.Tensor:
        """`tensor` itself, after it was reduced in place over the axis."""
        if self.size > 1:
            dist.all_reduce(tensor, _OPERATIONS[operation], group=self._group)
        return tensor

    def all_gather(self, tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """The tensors of all ranks, which have the same shape, concatenated on `dim` in order of position."""
        if self.size == 1:
            return tensor
        local = tensor.contiguous()
        gathered = local.new_empty((self.size, *local.shape))
        _ALL_GATHER(gathered, local.unsqueeze(0), group=self._group)
        return torch.cat(gathered.unbind(0), dim=dim)

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

    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        """The picklable value of position `source`, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, self.ranks[source], group=self._group)
        return box[0]

    def barrier(self) -> None:
        """Returns when every rank of the axis has called it."""
        if self.size > 1:
            dist.barrier(group=self._group)


class PipelineAxis(Axis):
    """The stages of one pipeline. Each direction has a group of its own, so that a send forward never waits
    behind a send backward."""

    def __init__(
        self,
        ranks: Sequence[int],
        rank: int,
        forward: dist.ProcessGroup | None,
        backward: dist.ProcessGroup | None,
    ) -> None:
        super().__init__("pp", ranks, rank, forward)
        self._backward = backward

    def _direction(self, source: int, target: int) -> dist.ProcessGroup | None:
        return self._group if source < target else self._backward

    def isend(self, tensor: torch.Tensor, to_stage: int) -> Work:
        """Starts to send; the tensor must not change until the work is done."""
        work = dist.isend(tensor, self.ranks[to_stage], group=self._direction(self.rank, to_stage))
        assert work is not None
        return work

    def irecv(self, tensor: torch.Tensor, from_stage: int) -> Work:
        """Starts to receive into `tensor`, in the order in which the other stage sends."""
        work = dist.irecv(tensor, self.ranks[from_stage], group=self._direction(from_stage, self.rank))
        assert work is not None
        return work


class Mesh:
    """A layout at run time: this process's coordinate and its axes."""

    def __init__(
        self,
        *,
        layout: ParallelLayout,
        device: torch.device,
        tp: Axis,
        dp: Axis,
        pp: PipelineAxis,
        tied: Axis,
        world: Axis,
        data_mesh: DeviceMesh | None,
    ) -> None:
        self.layout, self.rank, self.device = layout, world.rank, device
        self.tp, self.dp, self.pp, self.world = tp, dp, pp, world
        self.tied = tied
        self.data_mesh = data_mesh
        self._copies: dict[int, Axis] = {1: Axis("copies", [self.rank], 0, None)}

    @property
    def coordinate(self) -> Coordinate:
        return self.layout.coordinate(self.rank)

    @staticmethod
    def single(device: torch.device | None = None) -> Mesh:
        """One process and no process group."""
        one = [0]
        return Mesh(
            layout=ParallelLayout(),
            device=device or torch.device("cpu"),
            tp=Axis("tp", one, 0, None),
            dp=Axis("dp", one, 0, None),
            pp=PipelineAxis(one, 0, None, None),
            tied=Axis("tied", one, 0, None),
            world=Axis("world", one, 0, None),
            data_mesh=None,
        )

    @staticmethod
    def create(layout: ParallelLayout, device: torch.device) -> Mesh:
        """The mesh of this rank. Collective: every rank calls it with the same layout.

        With more than one rank, torch.distributed must have been initialised with `layout.world_size` ranks.
        """
        if layout.world_size == 1:
            return Mesh.single(device)
        world_size, rank = dist.get_world_size(), dist.get_rank()
        assert world_size == layout.world_size, f"{world_size} ranks were started for {layout}"
        sharded = layout.shard != "none"
        replicas, shards = (1, layout.dp) if sharded else (layout.dp, 1)
        grid = init_device_mesh(
            device.type,
            (layout.pp, replicas, shards, layout.tp),
            mesh_dim_names=("pp", "dp_replicate", "dp_shard", "tp"),
        )
        at = layout.coordinate(rank)

        pp_ranks = layout.pipeline(at.tp_rank, at.dp_rank)
        tp_ranks = [layout.rank(Coordinate(i, at.dp_rank, at.stage)) for i in range(layout.tp)]
        dp_ranks = [layout.rank(Coordinate(at.tp_rank, i, at.stage)) for i in range(layout.dp)]
        pipelines = [layout.pipeline(tp_rank, dp_rank) for dp_rank in range(layout.dp) for tp_rank in range(layout.tp)]
        ends = [(ranks[0], ranks[-1]) for ranks in pipelines] if layout.pp > 1 else []
        backward = _group_of(rank, pipelines)
        tied = _group_of(rank, ends)
        tied_ranks = [pp_ranks[0], pp_ranks[-1]] if tied is not None else [rank]
        return Mesh(
            layout=layout,
            device=device,
            tp=Axis("tp", tp_ranks, at.tp_rank, grid.get_group("tp")),
            dp=Axis("dp", dp_ranks, at.dp_rank, grid.get_group("dp_shard" if sharded else "dp_replicate")),
            pp=PipelineAxis(pp_ranks, at.stage, grid.get_group("pp"), backward),
            tied=Axis("tied", tied_ranks, tied_ranks.index(rank), tied),
            world=Axis("world", range(world_size), rank, dist.group.WORLD),
            data_mesh=grid["dp_replicate", "dp_shard"] if layout.dp > 1 else None,
        )

    def copies(self, count: int) -> Axis:
        """The `count` neighbours on the tensor axis that hold copies of the same box.

        Collective over the world the first time that a count is asked for.
        """
        if count == self.tp.size:
            return self.tp
        if count not in self._copies:
            neighbours = [range(first, first + count) for first in range(0, self.layout.world_size, count)]
            mine = self.tp.ranks[self.tp.rank - self.tp.rank % count :][:count]
            self._copies[count] = Axis("copies", mine, self.tp.rank % count, _group_of(self.rank, neighbours))
        return self._copies[count]


def _group_of(rank: int, members: Sequence[Sequence[int]]) -> dist.ProcessGroup | None:
    """The new group that `rank` belongs to; None for a group of one.

    Collective: all ranks make all groups in one order. Groups get their names by counting, so ranks that had made
    different numbers of them would wait for each other under different names.
    """
    mine = None
    for ranks in members:
        if len(ranks) > 1:
            group = dist.new_group(list(ranks))
            if rank in ranks:
                mine = group
    return mine
