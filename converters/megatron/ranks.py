"""The ranks of Megatron that cut a model, and the names of their folders. Pure; no torch.

`arguments` is what Megatron saves as `args`, by name. It comes from a file that is not trusted: each value that is
used is checked first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

from workbench.errors import CheckpointError

_MOST: Final = 1 << 16  # ranks of an axis: more is damage
_RANK_FOLDER = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")


@dataclass(frozen=True, slots=True, order=True)
class Rank:
    """Position on the three axes that cut a model."""

    stage: int
    ep_rank: int
    tp_rank: int


@dataclass(frozen=True, slots=True)
class RankGrid:
    """Degrees of the axes that cut a model, and the folder of each rank that saves.

    Expert parallelism deals `etp * ep` neighbouring ranks to the experts of a stage, while every `tp` of them share the
    rest of it. So with etp < tp not every pair of a tensor rank and an expert rank exists.
    """

    tp: int
    pp: int
    ep: int
    etp: int

    def folder(self, rank: Rank) -> str:
        """Name of the folder of a rank (`get_checkpoint_name` of megatron/training/checkpointing.py)."""
        stage = f"_{rank.stage:03d}" if self.pp > 1 else ""
        expert = f"_{rank.ep_rank:03d}" if self.ep > 1 else ""
        return f"mp_rank_{rank.tp_rank:02d}{stage}{expert}"

    def rank(self, folder: str) -> Rank | None:
        """The rank whose folder has this name, or None: the inverse of `folder`.

        `mp_rank_00_001` is stage 1 of a pipeline, or expert rank 1 without one.
        """
        match = _RANK_FOLDER.fullmatch(folder)
        if match is None:
            return None
        numbers = [int(number) for number in match.groups() if number is not None]
        stage = numbers.pop(1) if self.pp > 1 and len(numbers) > 1 else 0
        ep_rank = numbers.pop(1) if self.ep > 1 and len(numbers) > 1 else 0
        found = Rank(stage, ep_rank, numbers[0])
        inside = found.tp_rank < self.tp and stage < self.pp and ep_rank < self.ep
        return found if inside and self.folder(found) == folder else None

    def saving(self) -> tuple[Rank, ...]:
        """The fewest ranks that hold all of the model, each of which has a folder, in order."""
        return self._first(max(self.tp, self.etp * self.ep))

    def loading(self) -> tuple[Rank, ...]:
        """The ranks that look for a folder of their own when a run loads, in order."""
        return self._first(math.lcm(self.tp, self.etp * self.ep))

    def _first(self, count: int) -> tuple[Rank, ...]:
        """The positions of the first so many ranks of every stage."""
        positions = {self._position(number) for number in range(count)}
        return tuple(sorted(Rank(stage, *position) for stage in range(self.pp) for position in positions))

    def _position(self, number: int) -> tuple[int, int]:
        """Expert rank and tensor rank of a rank of a stage, of which tensor ranks, or expert tensor ranks, are counted
        fastest."""
        return number // self.etp % self.ep, number % self.tp

    def leads(self, rank: Rank, *, experts: bool) -> bool:
        """Whether this is the first of the replicas that share out the state of an optimizer, of experts or of the
        rest: the one that saves and loads it."""
        number = rank.ep_rank * self.etp + rank.tp_rank % self.etp if experts else rank.tp_rank
        return self._position(number) == (rank.ep_rank, rank.tp_rank)

    def find(self, folders: Collection[str], where: str) -> dict[Rank, str]:
        """The ranks that these folders are of, in order; CheckpointError lists all that are missing or too many."""
        ranks = {folder: self.rank(folder) for folder in folders}
        saving = self.saving()
        faults = [f"{self.folder(rank)} is missing" for rank in saving if rank not in ranks.values()]
        faults += [f"{folder} is none of them" for folder, rank in sorted(ranks.items()) if rank is None]
        if faults:
            raise CheckpointError(
                f"{where}: its args say tp={self.tp} pp={self.pp} ep={self.ep}, that is {len(saving)} folders from "
                f"{self.folder(saving[0])} to {self.folder(saving[-1])}, but {', '.join(faults)}; copy all of it again"
            )
        return dict(sorted((rank, folder) for folder, rank in ranks.items() if rank is not None))


def rank_grid(arguments: Mapping[str, Any], where: str) -> RankGrid:
    """The degrees that Megatron's arguments say; CheckpointError for those that it cannot save in rank folders."""
    tp = positive_number(arguments, "tensor_model_parallel_size", arguments.get("model_parallel_size") or 1, where)
    pp = positive_number(arguments, "pipeline_model_parallel_size", 1, where)
    ep = positive_number(arguments, "expert_model_parallel_size", 1, where)
    etp = positive_number(arguments, "expert_tensor_parallel_size", tp, where)
    if tp % etp:
        raise CheckpointError(
            f"{where}: expert_tensor_parallel_size={etp} does not divide tensor_model_parallel_size={tp}: several "
            "ranks of Megatron wrote the same file then, and some experts are lost; save with torch_dist"
        )
    return RankGrid(tp, pp, ep, etp)


def positive_number(arguments: Mapping[str, Any], name: str, default: Any, where: str) -> int:
    """A positive number among the arguments, or the default when it is not given."""
    value = arguments.get(name)
    value = default if value is None else value
    if type(value) is not int or not 0 < value <= _MOST:
        raise CheckpointError(f"{where}: its args say {name}={value!r}, which is no number from 1 to {_MOST}")
    return value
