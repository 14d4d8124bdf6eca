"""A dense model as one of experts: each MLP copied to every expert of its layer, behind a router from its seed.

With all experts equal and weights that sum to one, the model computes what the dense one did (arXiv:2212.05055).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from converters.cast import cast_array
from converters.edits.edited import changed_model, edited, moments
from converters.edits.layers import RenamedSource
from converters.format import OpenedCheckpoint
from workbench.checkpoint.source import TensorSource
from workbench.errors import ConversionError
from workbench.spec.geometry import Box, LogicalTensor
from workbench.spec.schema import OPTIMIZER_PREFIX, logical_tensors

_EXPERT = re.compile(r"(layers\.\d+\.mlp\.)experts\.\d+\.(.*)")


class UpcycledSource:
    """The weights of a dense source as those of experts, and new routers: `std` times a normal number of the seed."""

    def __init__(self, source: TensorSource, routers: Mapping[str, LogicalTensor], *, seed: int, std: float) -> None:
        self._source, self._routers, self._seed, self._std = source, routers, seed, std

    @property
    def schema(self) -> Mapping[str, LogicalTensor]:
        """The tensors of the source, and the routers."""
        return {**self._source.schema, **self._routers}

    def chunks(self, name: str) -> tuple[Box, ...]:
        """As the source holds it; a router whole."""
        return (Box.whole(self._routers[name].shape),) if name in self._routers else self._source.chunks(name)

    def read(self, name: str, box: Box) -> np.ndarray:
        """The box, or that part of a router, which depends on nothing but seed and name."""
        if name not in self._routers:
            return self._source.read(name, box)
        from workbench.parallel.initial import normal

        tensor = self._routers[name]
        drawn = normal(name, tensor.shape, box, seed=self._seed, std=self._std).numpy()
        return cast_array(drawn, "F32", tensor.dtype)


def upcycle(opened: OpenedCheckpoint, num_experts: int, top_k: int, *, seed: int = 0) -> OpenedCheckpoint:
    """`opened` with `num_experts` copies of each MLP, of which a token takes `top_k`; ConversionError if it has some.

    Moments are dropped: a router has none, and a run needs those of all weights.
    """
    model = opened.model
    if model.moe is not None:
        raise ConversionError(
            f"{opened.path}: has {model.moe.num_experts} experts a layer; only a dense model grows some"
        )
    sizes: dict[str, Any] = {
        "num_experts": num_experts,
        "num_experts_per_tok": top_k,
        "moe_intermediate_size": model.intermediate_size,
        "norm_topk_prob": True,
    }
    found = changed_model(opened, {"moe": sizes})
    source = opened.source
    expected = logical_tensors(found, "F32")
    origins = {name: name for name in source.schema if not name.startswith(OPTIMIZER_PREFIX) and ".mlp." not in name}
    copies = {name: match[1] + match[2] for name in expected if (match := _EXPERT.fullmatch(name))}
    origins |= {name: origin for name, origin in copies.items() if origin in source.schema}
    dtypes = {origin.partition(".mlp.")[0]: source.schema[origin].dtype for origin in set(origins.values())}
    routers = {
        name: LogicalTensor(name, tensor.shape, dtypes[name.partition(".mlp.")[0]])
        for name, tensor in expected.items()
        if name.endswith(".mlp.gate.weight")
    }
    renamed = RenamedSource(source, origins)
    return edited(
        opened,
        UpcycledSource(renamed, routers, seed=seed, std=model.initializer_range),
        f"each MLP copied to {num_experts} experts, of which a token takes {top_k}; routers from seed {seed}",
        model=found,
        dropped=moments(source, "a new router has no optimizer state, and a run needs that of all weights"),
        goes_on=False,
    )
