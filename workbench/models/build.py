"""A stage from its configuration: built without memory, wrapped for data parallelism, then filled."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from workbench.models.attention import Attention
from workbench.models.decoder import DecoderStage
from workbench.models.mlp import MLP
from workbench.models.moe import Experts
from workbench.models.norm import LayerNorm, RMSNorm
from workbench.models.recompute import HostMemory
from workbench.parallel.backends import NormKind, open_executor
from workbench.parallel.data import DataParallel
from workbench.parallel.gemm import Gemm
from workbench.parallel.initial import normal, uniform
from workbench.parallel.linear import ColumnParallelLinear, DuplicatedLinear, RowParallelLinear
from workbench.parallel.live import LiveParameter, live_parameters, shard_views
from workbench.parallel.mesh import Mesh
from workbench.parallel.module import ParallelModule
from workbench.parallel.nf4 import pack_frozen
from workbench.spec.execution import StageOptions
from workbench.spec.geometry import Shard
from workbench.spec.model import ModelConfig


@dataclass(frozen=True)
class BuiltStage:
    """A stage on its device, who multiplies in its layers, the handle of its data parallelism, and its parameters as
    local tensors."""

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

    Weights that are held in 4 bits are no parameters, and get their values from `load_packed`.

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
        if options.frozen_format == "nf4":
            pack_frozen(module.layers)
    gemm = _equip(module, options, mesh)
    blocks: list[nn.Module] = list(module.layers.values())
    if options.compile_blocks:
        for block in blocks:
            block.compile()
    reduce_dtype = torch.bfloat16 if options.grad_reduce == "bf16" else None
    data_parallel = DataParallel(module, blocks, mesh, compute_dtype, reduce_dtype=reduce_dtype)
    module.to_empty(device=mesh.device)
    return BuiltStage(module, gemm, data_parallel, live_parameters(module, mesh))


def _equip(stage: DecoderStage, options: StageOptions, mesh: Mesh) -> Gemm:
    """Gives every layer who executes it; returns who multiplies in the layers, with whom gradients of weights wait."""
    executor = open_executor(options, mesh, stage.compute_dtype)
    gemm = head = executor.head()
    stage.loss_chunk_tokens, stage.compiles_loss = options.loss_chunk_tokens, options.compile_blocks
    stage.region = executor.region
    stage.label_smoothing, stage.embedding_noise = options.label_smoothing, options.embedding_noise
    for layer in stage.modules():
        if isinstance(layer, ColumnParallelLinear | RowParallelLinear | DuplicatedLinear):
            layer.gemm = gemm = executor.linear(*layer.weight.shape)
        elif isinstance(layer, ParallelModule):
            layer.gemm = head
        if isinstance(layer, MLP | Experts):
            layer.recompute = options.recompute == "selective"
        if isinstance(layer, RMSNorm | LayerNorm) and not layer.is_cut:
            kind: NormKind = "rmsnorm" if isinstance(layer, RMSNorm) else "layernorm"
            layer.normalise = executor.norm(kind, layer.weight.numel(), layer.eps)
    host = HostMemory(pinned=mesh.device.type == "cuda")
    for block in stage.layers.values():
        block.recompute = options.recompute == "full"
        for part in (block.self_attn, block.cross_attn):
            if part is not None:
                part.recompute = options.recompute == "selective"
        if options.offload:
            block.saving = host.saving
        if isinstance(block.self_attn, Attention):
            heads, kv_heads = block.self_attn.local_heads
            block.self_attn.core = executor.attention(heads, kv_heads, stage.model.head_dim)
    return gemm


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
