"""The process grid: one `Axis` per kind of parallelism, and the `Mesh` that holds them. Passed, never global.

An axis of size 1 has no process group and its collectives return their input, so a single process needs no
`torch.distributed` at all and runs the same code as any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import product
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from workbench.parallel.pending import Pending, Work
from workbench.spec.geometry import ParameterSpec
from workbench.spec.layout import Coordinate, ParallelLayout

Operation = Literal["sum", "max", "min"]
Message = Literal["F", "B"]
_OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
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
        if self.size > 1:
            dist.all_reduce(tensor, _OPERATIONS[operation], group=self._group)
        return tensor

    def all_gather(self, tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """The tensors of all ranks, which have the same shape, concatenated on `dim` in order of position."""
        return self.start_all_gather(tensor, dim).wait()

    def start_all_gather(self, tensor: torch.Tensor, dim: int = 0) -> Pending:
        """`all_gather` under way; `tensor` must not change until it is done."""
        if self.size == 1:
            return Pending((), lambda: tensor, tensor)
        local = tensor.contiguous()
        if local.device.type == "cpu":
            works, parts = self._swap([local] * self.size)
            return Pending(works, lambda: torch.cat(parts, dim=dim), local)
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
            cut = [share.contiguous() for share in tensor.chunk(self.size, dim=dim)]
            works, parts = self._swap(cut)
            return Pending(works, lambda: reduce(torch.add, parts), cut)
        shares = torch.stack(tensor.chunk(self.size, dim=dim))
        mine = shares.new_empty((1, *shares.shape[1:]))
        work = _REDUCE_SCATTER(mine, shares, group=self._group, async_op=True)
        return Pending([work], lambda: mine[0], shares)

    def _swap(self, sent: Sequence[torch.Tensor]) -> tuple[Sequence[Work], Sequence[torch.Tensor]]:
        """Starts to send each position its tensor of `sent`, all of one shape; what they send here, in order.

        Gloo's own reduce-scatter is an all-reduce of everything: twice the bytes, three times the time.
        """
        received = [mine if i == self.rank else torch.empty_like(mine) for i, mine in enumerate(sent)]
        others = [i for i in range(self.size) if i != self.rank]
        operations = [dist.P2POp(dist.isend, sent[i], self.ranks[i], group=self._group) for i in others]
        operations += [dist.P2POp(dist.irecv, received[i], self.ranks[i], group=self._group) for i in others]
        return dist.batch_isend_irecv(operations), received

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

    def irecv(self, tensor: torch.Tensor, from_stage: int, message: Message) -> Work:
        """Starts to receive into `tensor`, in the order in which the other stage sends messages of this kind."""
        lane = self._lanes[message, from_stage < self.rank]
        work = dist.irecv(tensor, self.ranks[from_stage], group=lane)
        assert work is not None
        return work


@dataclass(frozen=True, slots=True)
class Replicas:
    """The ranks that hold the same boxes of a parameter: `rank` counts this one, neighbours by `sharers` share a copy.

    mesh: these ranks as FSDP2 wants them, (copies, ranks that share one); None where there are no others.
    """

    rank: int
    sharers: int
    one_copy: bool
    mesh: DeviceMesh | None


def _one(name: str) -> Axis:
    return Axis(name, [0], 0, None)


@dataclass(frozen=True)
class Axes:
    """The axes of a mesh; by default those of a single process."""

    tp: Axis = field(default_factory=lambda: _one("tp"))
    cp: Axis = field(default_factory=lambda: _one("cp"))
    dp: Axis = field(default_factory=lambda: _one("dp"))
    pp: PipelineAxis = field(default_factory=lambda: PipelineAxis([0], 0, None))
    data: Axis = field(default_factory=lambda: _one("data"))
    shard: Axis = field(default_factory=lambda: _one("shard"))
    holders: Axis = field(default_factory=lambda: _one("holders"))
    tied: Axis = field(default_factory=lambda: _one("tied"))
    ep: Axis = field(default_factory=lambda: _one("ep"))
    world: Axis = field(default_factory=lambda: _one("world"))
    data_mesh: DeviceMesh | None = None
    """The replicas as FSDP2 wants them: (copies, ranks that share one)."""
    expert_mesh: DeviceMesh | None = None
    """Those of them that hold the same experts, in the same way."""


class Mesh:
    """A layout at run time: this process's coordinate and its axes.

    tp, cp, dp, pp: the four axes of the layout. data: the replicas of this rank's parameters, which are the ranks of dp
    and cp together (position dp_rank * cp + cp_rank). shard: those replicas that share one copy of the parameters.
    holders: all ranks of this stage, which together hold its parameters. tied: the first and the last stage. ep: the
    neighbours among the replicas that share the experts, `layout.ep` of them. world: all ranks.
    """

    def __init__(self, layout: ParallelLayout, device: torch.device, rank: int, axes: Axes) -> None:
        self.layout, self.rank, self.device = layout, rank, device
        self.tp, self.cp, self.dp, self.pp = axes.tp, axes.cp, axes.dp, axes.pp
        self.data, self.shard, self.holders, self.tied = axes.data, axes.shard, axes.holders, axes.tied
        self.ep, self.world = axes.ep, axes.world
        self._data_mesh, self._expert_mesh = axes.data_mesh, axes.expert_mesh
        self._copies: dict[int, Axis] = {1: Axis("copies", [rank], 0, None)}

    @property
    def coordinate(self) -> Coordinate:
        return self.layout.coordinate(self.rank)

    def replicas_of(self, spec: ParameterSpec | None = None) -> Replicas:
        """Who holds what this rank holds of a parameter; by default of one that is not dealt over the expert axis."""
        layout = self.layout
        if spec is None or spec.dealt == 1:
            sharers = self.shard.size
            return Replicas(self.data.rank, sharers, sharers == self.data.size, self._data_mesh)
        sharers = layout.expert_shard_degree
        return Replicas(self.data.rank // layout.ep, sharers, sharers == layout.expert_replicas, self._expert_mesh)

    @staticmethod
    def single(device: torch.device | None = None) -> Mesh:
        """One process and no process group."""
        return Mesh(ParallelLayout(), device or torch.device("cpu"), 0, Axes())

    @staticmethod
    def create(layout: ParallelLayout, device: torch.device) -> Mesh:
        """The mesh of this rank. Collective: every rank calls it with the same layout.

        With more than one rank, torch.distributed must have been initialised with `layout.world_size` ranks.
        """
        if layout.world_size == 1:
            return Mesh(layout, device, 0, Axes())
        world_size, rank = dist.get_world_size(), dist.get_rank()
        assert world_size == layout.world_size, f"{world_size} ranks were started for {layout}"
        return Mesh(layout, device, rank, _make_axes(layout, device, rank))

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


def _make_axes(layout: ParallelLayout, device: torch.device, rank: int) -> Axes:
    """Every axis of `rank`. Collective: all ranks make all groups in one order."""
    shards = layout.shard_degree
    grid = init_device_mesh(
        device.type,
        (layout.pp, layout.replicas // shards, shards, layout.tp),
        mesh_dim_names=("pp", "dp_replicate", "dp_shard", "tp"),
    )
    at = layout.coordinate(rank)

    def line(vary: str, start: Coordinate) -> list[int]:
        count = {"tp_rank": layout.tp, "cp_rank": layout.cp, "dp_rank": layout.dp, "stage": layout.pp}[vary]
        return [layout.rank(replace(start, **{vary: i})) for i in range(count)]

    def starts(*fixed: int) -> list[Coordinate]:
        return [Coordinate(*position) for position in product(*(range(n) for n in fixed))]

    tp, cp, dp, pp = layout.tp, layout.cp, layout.dp, layout.pp
    pipelines = [line("stage", start) for start in starts(tp, cp, dp, 1)]
    replicas = [
        [layout.rank(Coordinate(t, c, d, s)) for d in range(dp) for c in range(cp)]
        for s in range(pp)
        for t in range(tp)
    ]
    mine = line("stage", at)
    tied = [mine[0], mine[layout.last_stage]] if layout.last_stage != 0 else [rank]
    ends = [[ranks[0], ranks[layout.last_stage]] for ranks in pipelines if layout.last_stage != 0]
    data = next(ranks for ranks in replicas if rank in ranks)
    data_group = _group_of(rank, replicas)
    cp_group = data_group if dp == 1 else _group_of(rank, [line("cp_rank", start) for start in starts(tp, 1, dp, pp)])
    dp_group = data_group if cp == 1 else _group_of(rank, [line("dp_rank", start) for start in starts(tp, cp, 1, pp)])
    width = tp * cp * dp
    stages = [range(first, first + width) for first in range(0, layout.world_size, width)]
    if pp == 1 or tp == 1:
        holders_group = dist.group.WORLD if pp == 1 else data_group
    else:
        holders_group = grid.get_group("tp") if dp * cp == 1 else _group_of(rank, stages)
    position = data.index(rank)
    first = position - position % shards
    ep_axis, expert_mesh = _expert_axis(layout, device, data, position)
    return Axes(
        tp=Axis("tp", line("tp_rank", at), at.tp_rank, grid.get_group("tp")),
        cp=Axis("cp", line("cp_rank", at), at.cp_rank, cp_group),
        dp=Axis("dp", line("dp_rank", at), at.dp_rank, dp_group),
        pp=PipelineAxis(mine, at.stage, grid.get_group("pp"), _lanes(layout, rank, pipelines)),
        data=Axis("data", data, position, data_group),
        shard=Axis("shard", data[first : first + shards], position - first, grid.get_group("dp_shard")),
        holders=Axis("holders", stages[at.stage], rank % width, holders_group),
        tied=_axis_of(rank, "tied", tied, _group_of(rank, ends)),
        ep=ep_axis,
        world=Axis("world", range(layout.world_size), rank, dist.group.WORLD),
        expert_mesh=expert_mesh,
        data_mesh=grid["dp_replicate", "dp_shard"] if layout.replicas > 1 else None,
    )


def _expert_axis(
    layout: ParallelLayout, device: torch.device, data: Sequence[int], position: int
) -> tuple[Axis, DeviceMesh | None]:
    """The neighbours among the replicas `data` that share the experts, and the replicas that hold the same ones."""
    ep, shards = layout.ep, layout.expert_shard_degree
    if ep == 1:
        return Axis("ep", [data[position]], 0, None), None
    grid = init_device_mesh(
        device.type,
        (layout.pp, layout.expert_replicas // shards, shards, ep, layout.tp),
        mesh_dim_names=("pp", "expert_replicate", "expert_shard", "ep", "tp"),
    )
    first = position - position % ep
    axis = Axis("ep", data[first : first + ep], position - first, grid.get_group("ep"))
    return axis, grid["expert_replicate", "expert_shard"]


def _axis_of(rank: int, name: str, ranks: Sequence[int], group: dist.ProcessGroup | None) -> Axis:
    """The axis of `ranks` if `rank` is one of them, else an axis of its own."""
    return Axis(name, ranks, ranks.index(rank), group) if rank in ranks else Axis(name, [rank], 0, None)


def _lanes(
    layout: ParallelLayout, rank: int, pipelines: Sequence[Sequence[int]]
) -> dict[tuple[Message, bool], dist.ProcessGroup]:
    """A group for each kind of message and direction that occurs: with one chunk a stage, activations only travel to
    later stages and gradients to earlier ones."""
    wanted: list[tuple[Message, bool]] = [("F", True), ("B", False)]
    if layout.vpp > 1:
        wanted += [("F", False), ("B", True)]
    made = {lane: _group_of(rank, pipelines) for lane in wanted}
    return {lane: group for lane, group in made.items() if group is not None}


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
