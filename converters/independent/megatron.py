"""Tensors of Megatron's rank folders by PyTorch's own loader, joined over ranks and taken apart by PyTorch.

Which layers a stage has follows from what the stages before it hold.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from converters.independent._megatron_model import WEIGHT, MegatronTensors, Tensors
from converters.independent._megatron_ranks import RankTensors, iteration
from workbench.checkpoint.source import TensorSource
from workbench.errors import VerificationError
from workbench.spec.geometry import LogicalTensor

_Place = tuple[int, int]
"""A stage, and a model chunk of it."""


class MegatronFiles:
    """The tensors of a folder."""

    def __init__(self, folder: Path, source: TensorSource) -> None:
        paths = sorted(iteration(folder).glob("mp_rank_*/model_optim_rng.pt"))
        optimizer = any(name.startswith("optim.") for name in source.schema)
        ranks = [RankTensors(path, optimizer=optimizer) for path in paths]
        first = ranks[0]
        self._tensors = MegatronTensors(RankParts(ranks), first.args, source.schema, first.version)

    def read(self, tensor: LogicalTensor, rows: slice) -> np.ndarray:
        """These rows of a logical tensor in storage dtype."""
        return self._tensors.read(tensor, rows)


class RankParts:
    """What ranks hold, by the names of the whole model (`Parts`)."""

    def __init__(self, ranks: Sequence[RankTensors]) -> None:
        self._ranks, args = ranks, ranks[0].args
        self._tp = args.get("tensor_model_parallel_size") or 1
        self._etp = args.get("expert_tensor_parallel_size") or self._tp
        self._experts = (args.get("num_experts") or 0) // (args.get("expert_model_parallel_size") or 1)
        stages = {rank.stage: rank.kinds[WEIGHT] for rank in ranks}
        self._chunks = [(stage, chunk) for chunk in range(len(stages[0])) for stage in sorted(stages)]
        self._layers = [(at, layer) for at in self._chunks for layer in range(_num_layers(stages[at[0]][at[1]]))]

    def outside(self, kind: str, name: str) -> Tensors:
        """The embeddings are of the first chunk of the first stage, the others of the last chunk of the last."""
        return self._parts(kind, self._chunks[0 if name.startswith("embedding.") else -1], [name])

    def inside(self, kind: str, layer: int, *names: str) -> Tensors:
        """Layers are numbered in each chunk."""
        at, local = self._layers[layer]
        return self._parts(kind, at, [f"decoder.layers.{local}.{name}" for name in names])

    def of_expert(self, kind: str, layer: int, expert: int, matrix: str, hidden: int) -> Tensors:
        """Experts are numbered on each rank: one by one, in groups, or all in one buffer whose shape says nothing."""
        at, local = self._layers[layer]
        ep_rank, number = divmod(expert, self._experts)
        base, buffer = f"decoder.layers.{local}.mlp.experts", f"weight{matrix.removeprefix('linear_fc')[0]}"
        names = [f"{base}.local_experts.{number}.{matrix}", f"{base}.{matrix}{number}"]
        if flat := self._parts(kind, at, [f"{base}.{buffer}"], ep_rank, missing=True):
            sizes = (self._experts, hidden, -1) if buffer == "weight1" else (self._experts, -1, hidden)
            return [part.reshape(sizes)[number].T for part in flat]
        return self._parts(kind, at, names, ep_rank)

    def _parts(
        self, kind: str, at: _Place, names: Sequence[str], ep_rank: int | None = None, *, missing: bool = False
    ) -> Tensors:
        """What each tensor rank has of one of these names. ep_rank: of an expert. missing: there may be nothing."""
        tp, found = self._tp if ep_rank is None else self._etp, dict[int, torch.Tensor]()
        for rank in self._ranks:
            if rank.stage == at[0] and ep_rank in (None, rank.ep_rank):
                held = rank.kinds[kind][at[1]]
                for name in (name for name in names if name in held):
                    found[rank.tp_rank % tp] = held[name]
        if len(found) == tp or (missing and not found):
            return [found[tp_rank] for tp_rank in sorted(found)]
        raise VerificationError(f"of stage {at[0]}, {len(found)} of {tp} tensor ranks hold {kind} {' or '.join(names)}")


def _num_layers(tensors: Iterable[str]) -> int:
    """The layers of a model chunk."""
    found = (re.match(r"decoder\.layers\.(\d+)\.", name) for name in tensors)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


READER = MegatronFiles
