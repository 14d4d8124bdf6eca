"""The parameters that a rank of Megatron trains, in the order in which its modules register them. Pure; no torch.

Optimizers count parameters in this order, and buffers hold them in the reverse of it. The order is that of the
constructors in megatron-core 0.16.1 (models/gpt, transformer/attention.py, transformer/moe/moe_layer.py) and, for norms
inside of a linear layer, of Transformer Engine's LayerNormLinear.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from converters.megatron.ranks import Rank, RankGrid
from converters.megatron.table import EMBEDDING, HEAD, LAYERS, McoreTensor
from workbench.errors import CheckpointError
from workbench.spec.geometry import Box

_OUTSIDE: Final = (
    "embedding.word_embeddings.",
    "embedding.",
    f"{LAYERS}.",
    "decoder.final_layernorm.",
    "output_layer.",
)
_INSIDE: Final = (
    "input_layernorm.",
    *(f"self_attention.linear_{name}." for name in ("proj", "q_proj", "q_down_proj", "q_up_proj")),
    *(f"self_attention.linear_{name}." for name in ("kv_down_proj", "kv_up_proj", "qkv")),
    *(f"self_attention.{name}_layernorm." for name in ("q", "k", "kv")),
    "pre_mlp_layernorm.",
    "mlp.router.",
    "mlp.experts.",
    "mlp.shared_experts.gate_weight",
    "mlp.shared_experts.linear_fc1.",
    "mlp.shared_experts.linear_fc2.",
    "mlp.linear_fc1.",
    "mlp.linear_fc2.",
)
_LEAVES: Final = ("layer_norm_weight", "layer_norm_bias", "weight", "bias")
_OWN_NAMES: Final = {  # what torch_dist calls the norms of Megatron's own layers, and what the modules are called
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
BUFFERS: Final = ("mlp.router.expert_bias",)
"""What ends the name of a tensor that is stored with the weights but not trained."""


@dataclass(frozen=True, slots=True)
class LocalParameter:
    """A parameter of one rank: its share of a tensor of the whole model.

    pairs: (box of the whole tensor, box of the parameter). dtype: of the stored weight. alone: two stages share it, so
    that it has a bucket of its own. copy: another rank holds the same.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    pairs: tuple[tuple[Box, Box], ...]
    alone: bool
    copy: bool

    @property
    def numel(self) -> int:
        return Box.whole(self.shape).numel


def decays(tensor: McoreTensor | LocalParameter) -> bool:
    """Whether Megatron applies weight decay, unless told otherwise: to matrices, but not to norms and biases."""
    return len(tensor.shape) > 1


class Modules:
    """The trained model as ranks hold it.

    tensors: of the whole model. dtypes: of the stored weights. layers: by stage, then by chunk. grouped: all first
    matrices of the experts of a layer come before the second ones. tied: the head is the embedding. renamed: norms of
    Megatron's own layers have the names that Transformer Engine's have.
    """

    def __init__(
        self,
        tensors: Mapping[str, McoreTensor],
        dtypes: Mapping[str, str],
        grid: RankGrid,
        layers: Sequence[Sequence[range]],
        *,
        grouped: bool,
        tied: bool,
        renamed: bool = False,
    ) -> None:
        self.tensors, self.grid, self.num_chunks = tensors, grid, len(layers[0])
        self._dtypes, self.layers = dtypes, layers
        self._renamed, self._grouped, self._shared = renamed, grouped, tied and grid.pp > 1
        self._names: dict[tuple[int, int], dict[str, str]] = {}

    def parameters(self, rank: Rank, chunk: int, *, experts: bool) -> list[LocalParameter]:
        """The parameters of a chunk of a rank that this optimizer (of experts or of the rest) trains, in the order of
        its modules."""
        return [
            parameter
            for _, parameter in self.held(rank, chunk)
            if not parameter.name.endswith(BUFFERS) and self._has_own_optimizer(self.tensors[parameter.name]) == experts
        ]

    def trained(self, rank: Rank, *, experts: bool) -> list[LocalParameter]:
        """What an optimizer of a rank trains, in all of its chunks."""
        chunks = range(self.num_chunks)
        return [parameter for chunk in chunks for parameter in self.parameters(rank, chunk, experts=experts)]

    def decay_groups(self, *, experts: bool) -> list[bool]:
        """The groups that an optimizer has on every rank, in order: for each whether weight decays in it."""
        kinds = {decays(t) for t in self.tensors.values() if self._has_own_optimizer(t) == experts}
        return sorted(kinds, reverse=True)

    def _has_own_optimizer(self, tensor: McoreTensor) -> bool:
        return tensor.num_experts > 0 and self.grid.ep > 1

    def held(self, rank: Rank, chunk: int) -> Iterator[tuple[str, LocalParameter]]:
        """All that a chunk of a rank stores, in the order of its modules, each after what they would call it if they
        had the whole model."""
        if (rank.stage, chunk) not in self._names:
            self._names[rank.stage, chunk] = self._ordered(rank.stage, chunk)
        first = rank.stage == chunk == 0
        for module, name in self._names[rank.stage, chunk].items():
            shared = self._shared and name == EMBEDDING
            copy = module == HEAD and not first and shared
            for parameter in self._parameter(self.tensors[name], rank, shared=shared, copy=copy):
                yield module, parameter

    def _ordered(self, stage: int, chunk: int) -> dict[str, str]:
        """What the modules of a chunk call their parameters, in their order, and the tensors that these are of."""
        layers = self.layers[stage][chunk]
        begins, ends = stage == chunk == 0, (stage, chunk) == (self.grid.pp - 1, self.num_chunks - 1)
        found = {name: name for name in self.tensors if self._is_here(name, layers, begins, ends)}
        if self._shared and ends:
            found[HEAD] = EMBEDDING
        return {name: found[name] for name in sorted(found, key=self._order)}

    def _is_here(self, name: str, layers: range, begins: bool, ends: bool) -> bool:
        if found := re.match(rf"{re.escape(LAYERS)}\.(\d+)\.", name):
            return int(found[1]) in layers
        return begins if name.startswith("embedding.") else ends

    def _parameter(self, tensor: McoreTensor, rank: Rank, *, shared: bool, copy: bool) -> Iterator[LocalParameter]:
        """A rank's share of a tensor, if it has one."""
        of_expert, grid = tensor.num_experts > 0, self.grid
        tp = grid.etp if of_expert else grid.tp
        pairs = tensor.share(tp, rank.tp_rank % tp, grid.ep if of_expert else 1, rank.ep_rank if of_expert else 0)
        if pairs:
            shape = tuple(max(local.end[dim] for _, local in pairs) for dim in range(len(tensor.shape)))
            copy = copy or (tensor.dim is None and rank.tp_rank > 0)
            yield LocalParameter(tensor.name, shape, self._dtypes[tensor.name], tuple(pairs), alone=shared, copy=copy)

    def _order(self, name: str) -> tuple[int | str, ...]:
        outside = _position(_OUTSIDE, name)
        found = re.match(rf"{re.escape(LAYERS)}\.(\d+)\.(.*)", name)
        if found is None:
            return (outside, 0, 0, *_leaf(name))
        layer, inner = int(found[1]), found[2]
        for stored, own in _OWN_NAMES.items() if self._renamed else ():
            inner = inner.replace(stored, own)
        return (outside, layer, _position(_INSIDE, inner), *self._expert_order(inner), *_leaf(inner))

    def _expert_order(self, name: str) -> tuple[int, int]:
        """Place of an expert's tensor among those of all experts of a layer."""
        found = re.match(r"mlp\.experts\..*?(\d+)?\.?linear_fc([12])\.(?:weight|bias)(\d*)", name)
        if found is None:
            return (0, 0)
        expert, matrix = int(found[1] or found[3] or 0), int(found[2])
        return (matrix, expert) if self._grouped else (expert, matrix)


def _position(prefixes: Sequence[str], name: str) -> int:
    for position, prefix in enumerate(prefixes):
        if name.startswith(prefix):
            return position
    raise CheckpointError(f"{name!r}: where Megatron's modules hold it is not known, so neither is its optimizer state")


def _leaf(name: str) -> tuple[int]:
    last = re.sub(r"\d+$", "", name.rpartition(".")[2])
    return (_LEAVES.index(last) if last in _LEAVES else 0,)


def ranks_of_experts(grid: RankGrid) -> Iterator[tuple[int, Rank]]:
    """The ranks that hold different experts, by their index in the group that Megatron numbers them in."""
    for stage in range(grid.pp):
        for ep_rank in range(grid.ep):
            for tp_rank in range(grid.etp):
                yield (stage * grid.ep + ep_rank) * grid.etp + tp_rank, Rank(stage, ep_rank, tp_rank)


def ranks_of_the_rest(grid: RankGrid) -> Iterator[tuple[int, Rank]]:
    """The ranks that hold different parts of what are not experts, likewise."""
    for stage in range(grid.pp):
        for tp_rank in range(grid.tp):
            yield stage * grid.tp + tp_rank, Rank(stage, 0, tp_rank)
