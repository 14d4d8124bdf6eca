"""The low-rank updates of parallel layers, attached beside the weights that they adapt.

Legend: B batch, T tokens, I inputs (local for row-parallel layers), O outputs (local for column-parallel layers),
R ranks of all fused pairs together, N rows of experts, E experts (of this rank), D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from workbench.checkpoint.source import TensorSource
from workbench.models.batch import LocalBatch
from workbench.models.decoder import DecoderStage
from workbench.models.moe import Experts
from workbench.models.state import to_tensor
from workbench.parallel.collectives import gather_from
from workbench.parallel.dropout import dropout
from workbench.parallel.embedding import VocabParallelEmbedding, VocabParallelHead
from workbench.parallel.grouped import grouped_product
from workbench.parallel.linear import ColumnParallelLinear, DuplicatedLinear
from workbench.parallel.live import LiveParameter, shard_views
from workbench.parallel.loss import accumulation_dtype
from workbench.parallel.mesh import Mesh
from workbench.parallel.module import ParallelModule
from workbench.spec.geometry import Box
from workbench.spec.lora import MAGNITUDE, LoraPair, LoraSpec, adapted_pairs, held_as, judging_specs, leaf_of
from workbench.spec.schema import stage_places


class LoraDelta(ParallelModule):
    """Adds s (x A^T) B^T of each adapted projection of a layer to its slice of the layer's product. With magnitudes m
    the slice is then multiplied with m / |W + s B A| (DoRA, arXiv:2402.09353, eq. 5), a norm for each row, which has no
    gradient (sec. 4.3).

    Of a column-parallel layer the input is whole and B is cut, of a row-parallel one A is cut and the result is a
    partial sum that the layer reduces together with its own: there is no activation to communicate. The squares of the
    norms of a row-parallel layer are summed over tp. `gathers`: the input is this rank's tokens and the output that of
    all (a column-parallel layer under sequence parallelism); x A^T is gathered.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    magnitude: nn.Parameter | None

    def __init__(self, mesh: Mesh, pair: LoraPair, layer: nn.Module, drop: InputDropout | None) -> None:
        super().__init__(mesh, lora_A=pair.a, lora_B=pair.b, magnitude=pair.magnitude)
        tp = mesh.tp.size
        self.scalings, self.drop, self.site = pair.scalings, drop, pair.path
        self.gathers = mesh.layout.sequence_parallel and isinstance(layer, VocabParallelHead)
        if isinstance(layer, ColumnParallelLinear):
            self.gathers = layer.gathers
        self.sums_squares = pair.base.parts[0].dim == 1
        self.between_layers = self.gathers or isinstance(layer, DuplicatedLinear)
        inputs = pair.a.parts[0].local_shape(tp)[1]
        self.first_input = inputs * mesh.tp.rank if self.sums_squares else 0
        self.rows_A = [part.local_shape(tp)[0] for part in pair.a.parts]
        self.rows_B = [part.local_shape(tp)[0] for part in pair.b.parts]
        adapted = {part.name for part in pair.parts}
        self.outputs = [(part.local_shape(tp)[0], part.name in adapted) for part in pair.base.parts]

    def forward(self, x_BTI: torch.Tensor, y_BTO: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
        """The adapted product, from the input and what the weight made of it."""
        if self.drop is not None:
            x_BTI = self.drop(x_BTI, self.site, between_layers=self.between_layers, first_input=self.first_input)
        low_BTR = F.linear(x_BTI, self.lora_A.to(x_BTI.dtype))
        if self.gathers:
            low_BTR = gather_from(low_BTR, self.mesh.tp)
        y_NO = torch.addmm(y_BTO.flatten(0, -2), low_BTR.flatten(0, -2), self._scaled_B(x_BTI.dtype).t())
        if self.magnitude is not None:
            y_NO = y_NO * self._gains(weight_OI).to(y_NO.dtype)
        return y_NO.view(y_BTO.shape)

    def _scaled_B(self, dtype: torch.dtype) -> torch.Tensor:
        """s B of all pairs as one [O, R], each in its projection's rows and its own ranks' columns: adding to the
        product is then a single pass over it, which costs more than the products with zeros."""
        pairs = zip(self.lora_B.to(dtype).split(self.rows_B), self.scalings, strict=True)
        ups = (up * scaling for up, scaling in pairs)
        return torch.block_diag(
            *(next(ups) if is_ours else self.lora_B.new_empty(size, 0, dtype=dtype) for size, is_ours in self.outputs)
        )

    def _gains(self, weight_OI: torch.Tensor) -> torch.Tensor:
        """By what each output is multiplied [O]: one where its projection is not adapted."""
        assert self.magnitude is not None
        gains = iter((self.magnitude / self._norms(weight_OI)).split(self.rows_B))
        return torch.cat([next(gains) if is_ours else self.magnitude.new_ones(size) for size, is_ours in self.outputs])

    @torch.no_grad()
    def _norms(self, weight_OI: torch.Tensor) -> torch.Tensor:
        """|W + s B A| of each adapted row."""
        dtype = accumulation_dtype(weight_OI.dtype)
        slices = zip(weight_OI.split([size for size, _ in self.outputs]), self.outputs, strict=True)
        weights = [weight for weight, (_, is_ours) in slices if is_ours]
        rows, columns = self.lora_B.to(dtype).split(self.rows_B), self.lora_A.to(dtype).split(self.rows_A)
        parts = zip(weights, rows, columns, self.scalings, strict=True)
        squares = torch.cat([torch.addmm(w.to(dtype), b, a, alpha=s).square().sum(dim=1) for w, b, a, s in parts])
        if self.sums_squares:
            self.mesh.tp.all_reduce(squares)
        # Rows of padding are zero, and stay so.
        return squares.sqrt().clamp(min=torch.finfo(dtype).tiny)


class EmbeddingDelta(ParallelModule):
    """s B A[:, id] of the ids in this rank's range of the vocabulary; the embedding sums it with its own over tp."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(self, mesh: Mesh, pair: LoraPair) -> None:
        super().__init__(mesh, lora_A=pair.a, lora_B=pair.b)
        (self.scaling,) = pair.scalings

    def forward(self, ids_BT: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        low_BTR = F.embedding(ids_BT, self.lora_A.t()).to(dtype)
        return F.linear(low_BTR * self.scaling, self.lora_B.to(dtype))


class ExpertDelta(ParallelModule):
    """s (x A_e^T) B_e^T for the rows of each expert e, in the slices of its adapted projections; zero elsewhere."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(self, mesh: Mesh, pair: LoraPair) -> None:
        super().__init__(mesh, lora_A=pair.a, lora_B=pair.b)
        rows = dict.fromkeys(leaf_of(part.name) for part in pair.base.parts)
        sizes = {leaf_of(part.name): part.local_shape(mesh.tp.size)[0] for part in pair.base.parts}
        scalings = {leaf_of(part.name): s for part, s in zip(pair.parts, pair.scalings, strict=True)}
        self.outputs = [(sizes[leaf], scalings.get(leaf)) for leaf in rows]
        self.rank = pair.a.parts[0].shape[0]

    def forward(self, x_NI: torch.Tensor, sizes_E: torch.Tensor) -> torch.Tensor:
        experts = len(sizes_E)
        a_ERI = self.lora_A.to(x_NI.dtype).unflatten(0, (experts, -1))
        low_NR = grouped_product(x_NI, a_ERI, sizes_E)
        lows = iter(low_NR.split(self.rank, dim=-1))
        ups = iter(self.lora_B.to(x_NI.dtype).unflatten(0, (experts, low_NR.shape[-1] // self.rank, -1)).unbind(1))
        slices = [
            x_NI.new_zeros(len(x_NI), size)
            if scaling is None
            else grouped_product(next(lows) * scaling, next(ups), sizes_E)
            for size, scaling in self.outputs
        ]
        return torch.cat(slices, dim=-1)


class LinearDeltas(nn.ModuleList):
    """The adapters of one linear layer, one after another."""

    def forward(self, x_BTI: torch.Tensor, y_BTO: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
        for delta in self:
            y_BTO = delta(x_BTI, y_BTO, weight_OI)
        return y_BTO


class SummedDeltas(nn.ModuleList):
    """The sum of what the adapters of one layer add."""

    def forward(self, *inputs: Any) -> torch.Tensor:
        first, *others = (delta(*inputs) for delta in self)
        for other in others:
            first = first + other
        found: torch.Tensor = first
        return found


class InputDropout:
    """Dropout of what goes into adapters. It knows the microbatch that a layer was last given: the same elements fall
    at every layout, and fall again when the layer is computed again. Projections of one product share a mask."""

    def __init__(self, probability: float) -> None:
        self.probability = probability
        self.batch: LocalBatch | None = None

    def enter(self, batch: LocalBatch) -> None:
        """Called by each layer with the microbatch that it computes."""
        self.batch = batch

    def __call__(self, x_BTI: torch.Tensor, site: str, *, between_layers: bool, first_input: int) -> torch.Tensor:
        """`x_BTI` after dropout. between_layers: whether its tokens are those whose hidden states this rank has.
        first_input: the global index of its first input."""
        if self.batch is None or self.batch.dropout is None:
            return x_BTI
        tokens = self.batch.hidden_tokens if between_layers else self.batch.tokens
        inputs_I = first_input + torch.arange(x_BTI.shape[-1], device=x_BTI.device)
        return dropout(x_BTI, self.probability, self.batch.dropout.rows(site), (tokens, inputs_I))


@contextmanager
def switched_off(stage: DecoderStage) -> Iterator[None]:
    """Inside it the stage computes what it would without adapters."""
    kinds = (LinearDeltas, SummedDeltas)
    places = [(layer, *child) for layer in stage.modules() for child in layer.named_children()]
    adapters = [(layer, name, found) for layer, name, found in places if isinstance(found, kinds)]
    for layer, name, _ in adapters:
        setattr(layer, name, None)
    try:
        yield
    finally:
        for layer, name, found in adapters:
            setattr(layer, name, found)


def attach(stage: DecoderStage, lora: LoraSpec, probability: float = 0.0) -> None:
    """Freezes the stage but for what judges rows, and gives it adapters that are still without values.

    probability: of dropout of the adapters' inputs.
    """
    stage.requires_grad_(False)
    drop = InputDropout(probability) if probability else None
    layout, model = stage.mesh.layout, stage.model
    here = stage_places(model, layout, stage.mesh.pp.rank)
    for pair in adapted_pairs(model, lora, layout):
        if here.intersection(pair.a.places):
            _attach_pair(stage, pair, drop)
    if stage.has_head:
        for spec in judging_specs(model, layout):
            stage.get_parameter(spec.path).requires_grad_(True)
    if drop is not None:
        for block in stage.layers.values():
            block.entering = drop.enter


def _attach_pair(stage: DecoderStage, pair: LoraPair, drop: InputDropout | None) -> None:
    owner, _, name = pair.path.rpartition(".")[0].rpartition(".")
    layer = stage.get_submodule(owner)
    delta: ParallelModule
    if isinstance(layer, VocabParallelEmbedding):
        kind, delta = SummedDeltas, EmbeddingDelta(stage.mesh, pair)
    elif isinstance(layer, Experts):
        kind, delta = SummedDeltas, ExpertDelta(stage.mesh, pair)
    else:
        kind, delta = LinearDeltas, LoraDelta(stage.mesh, pair, layer, drop)
    if getattr(layer, name) is None:
        setattr(layer, name, kind())
    getattr(layer, name).append(delta)


def fill_magnitudes(parameters: Sequence[LiveParameter], base: TensorSource) -> None:
    """Gives every magnitude the norm of its row of the base, which is the same number at every layout."""
    for parameter in parameters:
        for shard, view in shard_views(parameter, parameter.data):
            if shard.name.endswith(MAGNITUDE):
                weight = held_as(f"{shard.name.removesuffix(MAGNITUDE)}weight", base.schema)
                tensor = base.schema[weight]
                rows = Box((shard.box.offset[0], 0), (shard.box.size[0], tensor.shape[1]))
                wide = to_tensor(base.read(weight, rows), tensor.dtype).to(torch.float64)
                view.copy_(wide.square().sum(dim=1).sqrt())
