"""A stage from its configuration: built without memory, wrapped for data parallelism, then filled."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from workbench.models.decoder import DecoderStage
from workbench.parallel.data import DataParallel
from workbench.parallel.gemm import Gemm
from workbench.parallel.initial import normal, uniform
from workbench.parallel.live import LiveParameter, live_parameters, shard_views
from workbench.parallel.mesh import Mesh
from workbench.parallel.module import ParallelModule
from workbench.spec.geometry import Shard
from workbench.spec.model import ModelConfig


@dataclass(frozen=True)
class StageOptions:
    """How a stage computes what its model says.

    compile_blocks: compile each layer with torch.compile. split_backward: backward leaves the products for the weights'
    gradients in `BuiltStage.gemm.waiting`. reduce_dtype: in which replicas sum gradients; by default fp32 or wider.
    """

    compile_blocks: bool = False
    split_backward: bool = False
    reduce_dtype: torch.dtype | None = None


@dataclass(frozen=True)
class BuiltStage:
    """A stage on its device, who multiplies in it, the handle of its data parallelism, and its parameters as local
    tensors."""

    module: DecoderStage
    gemm: Gemm
    data_parallel: DataParallel
    parameters: list[LiveParameter]


def build_stage(
    model: ModelConfig,
    mesh: Mesh,
    *,
    dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype | None = None,
    adapt: Callable[[DecoderStage], None] | None = None,
    options: StageOptions | None = None,
) -> BuiltStage:
    """This rank's stage with parameters of `dtype` that hold no values yet: call `initialise`, or load a source.

    Raises LayoutError when the mesh's layout cannot hold the model. `adapt` may change the modules (adapters, frozen
    parameters) before data parallelism wraps them. Collective over the mesh.
    """
    mesh.layout.validate_for(model)
    compute_dtype, options = compute_dtype or dtype, options or StageOptions()
    with torch.device("meta"):
        module = DecoderStage(model, mesh.layout, mesh, stage=mesh.pp.rank, compute_dtype=compute_dtype)
        if adapt is not None:
            adapt(module)
        module.to(dtype)
    gemm = Gemm()
    gemm.waiting = [] if options.split_backward else None
    for layer in module.modules():
        if isinstance(layer, ParallelModule):
            layer.gemm = gemm
    blocks: list[nn.Module] = list(module.layers.values())
    if options.compile_blocks:
        for block in blocks:
            block.compile()
    data_parallel = DataParallel(module, blocks, mesh, compute_dtype, reduce_dtype=options.reduce_dtype)
    module.to_empty(device=mesh.device)
    return BuiltStage(module, gemm, data_parallel, live_parameters(module, mesh))


def initialise(parameters: list[LiveParameter], model: ModelConfig, *, seed: int) -> None:
    """Fills parameters with initial values that depend on the seed and the logical names alone; padding with zeros."""
    for parameter in parameters:
        data = parameter.data.zero_()
        shapes = {part.name: part.shape for part in parameter.spec.parts}
        for shard, view in shard_views(parameter, data):
            _fill(view, shard, shapes[shard.name], parameter.spec.init, model, seed)


def _fill(view: torch.Tensor, shard: Shard, shape: tuple[int, ...], init: str, model: ModelConfig, seed: int) -> None:
    if init in ("zeros", "ones"):
        view.fill_(float(init == "ones"))
        return
    if init == "fan_in":
        view.copy_(uniform(shard.name, shape, shard.box, seed=seed, bound=1 / math.sqrt(shape[1])))
        return
    std = model.initializer_range
    if init == "residual":
        std /= math.sqrt(2 * model.num_hidden_layers)
    view.copy_(normal(shard.name, shape, shard.box, seed=seed, std=std))
