"""Tensors of Megatron's torch_dist folders, whose pieces PyTorch's own loader reads, taken apart by PyTorch.

Only a weight that others equal bit for bit, such as a norm that never moved, has no place of its own among the buckets
of `dp_reshardable`: what the optimizer holds of it is read as the format reads it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from converters.independent._dcp_chunks import DcpTensors
from converters.independent._megatron_buckets import Buckets, NotTold
from converters.independent._megatron_model import WEIGHT, MegatronTensors, Tensors
from converters.independent._megatron_ranks import iteration
from workbench.checkpoint.source import TensorSource
from workbench.errors import VerificationError
from workbench.spec.geometry import Box, LogicalTensor


class MegatronDistFiles:
    """The tensors of a folder."""

    def __init__(self, folder: Path, source: TensorSource) -> None:
        found = DcpTensors(iteration(folder))
        args = vars(found.common()["args"])
        parts = BucketParts(found, args) if any(".bucket_idx_" in name for name in found.names) else WholeParts(found)
        self._tensors, self._source = MegatronTensors(parts, args, source.schema), source

    def read(self, tensor: LogicalTensor, rows: slice) -> np.ndarray:
        """These rows of a logical tensor in storage dtype."""
        try:
            return self._tensors.read(tensor, rows)
        except NotTold:
            rest = tensor.shape[1:]
            return self._source.read(
                tensor.name, Box((rows.start, *(0 for _ in rest)), (rows.stop - rows.start, *rest))
            )


class WholeParts:
    """Tensors of the whole model: one part of each (`Parts`)."""

    def __init__(self, found: DcpTensors) -> None:
        self._found = found
        self._places: dict[tuple[str, str], str] = {}
        for key in found.names:
            state = re.fullmatch(r"(?:chained_\d+\.)?optimizer\.state\.(?:fp32_)?(param|exp_avg|exp_avg_sq)\.(.+)", key)
            self._places[(state[1], state[2]) if state else (WEIGHT, key)] = key

    def outside(self, kind: str, name: str) -> Tensors:
        return self._parts(kind, [(name, ())])

    def inside(self, kind: str, layer: int, *names: str) -> Tensors:
        """All layers are in one tensor, or each has its own."""
        places = [(f"decoder.layers.{name}", (layer,)) for name in names]
        return self._parts(kind, places + [(f"decoder.layers.{layer}.{name}", ()) for name in names])

    def of_expert(self, kind: str, layer: int, expert: int, matrix: str, hidden: int) -> Tensors:
        """So with experts."""
        layers = (("decoder.layers", (layer,)), (f"decoder.layers.{layer}", ()))
        experts = ((f"mlp.experts.experts.{matrix}", (expert,)), (f"mlp.experts.experts.{expert}.{matrix}", ()))
        return self._parts(kind, [(f"{a}.{b}", (*at, *of)) for (a, at), (b, of) in product(layers, experts)])

    def _parts(self, kind: str, places: list[tuple[str, tuple[int, ...]]]) -> Tensors:
        """The tensor at an index of the one of these that is there, or of its halves."""
        for name, at in places:
            halves = [self._places.get((kind, f"{name}{half}")) for half in ("", "_w", "_v")]
            if found := [self._found.join(key, at) for key in halves if key]:
                return [torch.cat(found) if len(found) > 1 else found[0]]
        raise VerificationError(f"nothing holds {kind} {' or '.join(name for name, _ in places)}")


class BucketParts(WholeParts):
    """With an optimizer that does not say whose its buckets are."""

    def __init__(self, found: DcpTensors, args: Mapping[str, Any]) -> None:
        super().__init__(found)
        degrees = [args.get(f"{of}_parallel_size") or 1 for of in ("tensor_model", "expert_tensor")]
        self._buckets = Buckets(found, dict.fromkeys([1, *degrees]))

    def _parts(self, kind: str, places: list[tuple[str, tuple[int, ...]]]) -> Tensors:
        [weight] = super()._parts(WEIGHT, places)
        state = weight if kind == WEIGHT else self._buckets.state(kind, weight)
        if state is None:
            raise VerificationError(f"no bucket holds numbers that round to {' or '.join(name for name, _ in places)}")
        return [state]


READER = MegatronDistFiles
