"""The part of Transformer Engine's interface that the engine uses, in plain torch, for machines without a GPU.

Names, parameters and defaults are those of Transformer Engine 2.9 to 2.20 (transformer_engine/pytorch/module/linear.py,
module/rmsnorm.py, module/layernorm.py, attention/dot_product_attention/dot_product_attention.py, quantization.py and
common/recipe/__init__.py). So are the habits that the engine must respect: parameters and inputs of one type, a norm
that reads its weight again in backward, sizes that fp8 takes, regions that nest, attention that returns its heads
side by side.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class Seen:
    """What was asked of the package. linears: (recipe or None, depth of regions) of each product."""

    linears: list[tuple[str | None, int]] = field(default_factory=list)
    made: list[nn.Module] = field(default_factory=list)
    attended: int = 0
    outermost_exits: int = 0


class _State:
    recipe: Any = None
    depth = 0
    seen = Seen()


class DelayedScaling:
    pass


class Float8CurrentScaling:
    pass


class Float8BlockScaling:
    pass


class MXFP8BlockScaling:
    pass


class autocast:
    def __init__(
        self,
        enabled: bool = True,
        calibrating: bool = False,
        recipe: Any = None,
        amax_reduction_group: Any = None,
        _graph: bool = False,
    ) -> None:
        self._enabled, self._recipe = enabled, recipe
        self.amax_reduction_group = amax_reduction_group

    def __enter__(self) -> autocast:
        if isinstance(self._recipe, MXFP8BlockScaling):
            raise AssertionError("Device compute capability 10.0 or higher required for MXFP8 execution.")
        self._outer = _State.recipe
        _State.recipe = self._recipe if self._enabled else None
        _State.depth += 1
        return self

    def __exit__(self, *_: Any) -> None:
        _State.recipe = self._outer
        _State.depth -= 1
        if self._enabled and _State.depth == 0 and torch.is_grad_enabled():
            _State.seen.outermost_exits += 1


class Linear(nn.Module):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        rng_tracker_name: str | None = None,
        init_method: Any = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        parameters_split: Any = None,
        device: torch.device | str = "cuda",
    ) -> None:
        super().__init__()
        assert not bias and not sequence_parallel and tp_size == 1 and parallel_mode is None
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=params_dtype))
        _State.seen.made.append(self)

    def forward(
        self,
        inp: torch.Tensor,
        is_first_microbatch: bool | None = None,
        fp8_output: bool | None = False,
        fp8_grad: bool | None = False,
    ) -> torch.Tensor:
        if self.weight.is_meta:
            raise RuntimeError("the module was called without a weight")
        if self.weight.dtype != inp.dtype:
            raise TypeError("Data types for parameters must match when outside of autocasted region.")
        if _State.recipe is not None:
            for tensor in (inp, self.weight):
                rows = tensor.numel() // tensor.shape[-1]
                assert rows % 8 == 0 and tensor.shape[-1] % 16 == 0, tuple(tensor.shape)
        name = None if _State.recipe is None else type(_State.recipe).__name__
        _State.seen.linears.append((name, _State.depth))
        return F.linear(inp, self.weight)


class _Norm(torch.autograd.Function):
    """x * weight, whose backward asks the module for its weight, as Transformer Engine's norms do."""

    @staticmethod
    def forward(ctx: Any, normed: torch.Tensor, module: nn.Module) -> torch.Tensor:
        ctx.module = module
        return normed * module.weight

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        if ctx.module.weight.is_meta:
            raise RuntimeError("backward reads the weight of the module")
        return grad * ctx.module.weight, None


class RMSNorm(nn.Module):
    def __init__(
        self, normalized_shape: Any = None, eps: float = 1e-5, *, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(normalized_shape, device=device, dtype=dtype))
        self.eps = eps
        _State.seen.made.append(self)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return _Norm.apply(normed.to(input.dtype), self)


class LayerNorm(RMSNorm):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _Norm.apply(F.layer_norm(input, input.shape[-1:], eps=self.eps), self)


class DotProductAttention(nn.Module):
    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
    ) -> None:
        super().__init__()
        assert qkv_format == "bshd" and attn_mask_type == "causal" and attention_dropout == 0.0
        self.heads, self.size, self.groups = num_attention_heads, kv_channels, num_gqa_groups
        _State.seen.made.append(self)

    def forward(
        self, query_layer: torch.Tensor, key_layer: torch.Tensor, value_layer: torch.Tensor, attention_mask: Any = None
    ) -> torch.Tensor:
        assert query_layer.shape[-2:] == (self.heads, self.size) and key_layer.shape[-2] == self.groups
        _State.seen.attended += 1
        q, k, v = (part.transpose(1, 2) for part in (query_layer, key_layer, value_layer))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return attended.transpose(1, 2).flatten(2)


@contextmanager
def installed() -> Iterator[Seen]:
    """Inside it, `import transformer_engine.pytorch` finds this; yields what was asked of it."""
    package, pytorch, common, recipe = (
        ModuleType(name)
        for name in (
            "transformer_engine",
            "transformer_engine.pytorch",
            "transformer_engine.common",
            "transformer_engine.common.recipe",
        )
    )
    for made in (Linear, RMSNorm, LayerNorm, DotProductAttention, autocast):
        setattr(pytorch, made.__name__, made)
    for made in (DelayedScaling, Float8CurrentScaling, Float8BlockScaling, MXFP8BlockScaling):
        setattr(recipe, made.__name__, made)
    package.pytorch, package.common, common.recipe = pytorch, common, recipe
    modules = {module.__name__: module for module in (package, pytorch, common, recipe)}
    backend = "workbench.parallel.backends.te"
    _State.recipe, _State.depth, _State.seen = None, 0, Seen()
    sys.modules.pop(backend, None)
    sys.modules.update(modules)
    try:
        yield _State.seen
    finally:
        for name in (*modules, backend):
            sys.modules.pop(name, None)
