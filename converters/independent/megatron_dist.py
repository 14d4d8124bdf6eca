"""Tensors of Megatron's torch_dist folders, whose pieces PyTorch's own loader reads, taken apart by PyTorch.

But for what an optimizer in mode `dp_reshardable` holds: its buckets do not say whose they are, and no second reader
of them would be simple. That is read as the format reads it.
"""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import numpy as np
import torch

from converters.independent._dcp_chunks import DcpTensors
from converters.independent._megatron_model import WEIGHT, MegatronTensors, Tensors
from converters.independent._megatron_ranks import iteration
from workbench.checkpoint.source import TensorSource
from workbench.errors import VerificationError
from workbench.spec.geometry import Box, LogicalTensor


class MegatronDistFiles:
    """The tensors of a folder."""

    def __init__(self, folder: Path, source: TensorSource) -> None:
        found = DcpTensors(iteration(folder))
        self._tensors = MegatronTensors(WholeParts(found), vars(found.common()["args"]), source.schema)
        self._source, self._has_buckets = source, any(".bucket_idx_" in name for name in found.names)
        self._has_masters = found.dtype("embedding.word_embeddings.weight") != "F32"

    def read(self, tensor: LogicalTensor, rows: slice) -> np.ndarray:
        """These rows of a logical tensor in storage dtype."""
        is_master = self._has_masters and tensor.dtype == "F32"
        if self._has_buckets and (is_master or tensor.name.startswith("optim.")):
            rest = tensor.shape[1:]
            return self._source.read(
                tensor.name, Box((rows.start, *(0 for _ in rest)), (rows.stop - rows.start, *rest))
            )
        return self._tensors.read(tensor, rows)


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


READER = MegatronDistFiles
