"""The process grid: one `Axis` per kind of parallelism, and the `Mesh` that holds them. Passed, never global."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from workbench.parallel.axis import Axis, Message, PipelineAxis
from workbench.spec.geometry import ParameterSpec
from workbench.spec.layout import Coordinate, ParallelLayout


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
        mesh = Mesh(layout, device, rank, _make_axes(layout, device, rank))
        mesh.pp.connect(device)
        return mesh

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
