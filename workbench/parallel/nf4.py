"""Frozen weights of linear layers held in 4 bits: NF4 with double quantisation (QLoRA, arXiv:2305.14314).

bitsandbytes quantises each logical tensor whole, as transformers has it do, and a rank keeps the blocks that it has of
it. So the values are the same at every layout, and those that others compute with. Weights are made whole for each
product, forward and backward, and never kept so.

Legend: O outputs (local), I inputs (local), K blocks in a row (local).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from workbench.parallel.gemm import Gemm
from workbench.parallel.linear import ColumnParallelLinear, DuplicatedLinear, RowParallelLinear
from workbench.spec.execution import NF4_BLOCK
from workbench.spec.geometry import Shard

_GROUP = 256  # blocks whose largest elements share a scale (bitsandbytes/functional.py, quantize_4bit)
_FORMATS = (torch.float32, torch.bfloat16, torch.float16)


class Nf4Weight(nn.Module):
    """A weight [O, I] in place of the parameter: two elements a byte, and for each block the code of its largest one.

    That code stands for code[largest] x the scale of its group of 256 blocks of the logical tensor + its mean. Buffers
    hold nothing before `fill`.
    """

    codes_OKb: torch.Tensor
    largest_OK: torch.Tensor
    code: torch.Tensor
    scales: torch.Tensor
    means: torch.Tensor

    def __init__(self, shape: torch.Size, shards: tuple[Shard, ...], logical: dict[str, tuple[int, ...]]) -> None:
        """`shards` lie one below the other; `logical` has the shape of each logical tensor."""
        super().__init__()
        self.shape, self.logical = shape, logical
        self.shards = sorted(shards, key=lambda shard: shard.local.offset[0])
        rows, blocks = shape[0], shape[1] // NF4_BLOCK
        self._groups = [-(-rows * columns // NF4_BLOCK // _GROUP) for rows, columns in map(self._of, self.shards)]
        self.register_buffer("codes_OKb", torch.empty(rows, blocks, NF4_BLOCK // 2, dtype=torch.uint8))
        self.register_buffer("largest_OK", torch.empty(rows, blocks, dtype=torch.uint8))
        self.register_buffer("code", torch.empty(256))
        self.register_buffer("scales", torch.empty(sum(self._groups)))
        self.register_buffer("means", torch.empty(len(shards)))

    @torch.no_grad()
    def fill(self, read: Callable[[str], torch.Tensor]) -> None:
        """Takes the values of this rank's boxes from the logical tensors, which `read` gives whole."""
        from bitsandbytes.functional import quantize_4bit

        device = self.codes_OKb.device
        for number, (shard, scales) in enumerate(zip(self.shards, self.scales.split(self._groups), strict=True)):
            whole = read(shard.name).to(device)
            wide = whole if whole.dtype in _FORMATS else whole.float()
            codes, state = quantize_4bit(wide, blocksize=NF4_BLOCK, compress_statistics=True, quant_type="nf4")
            rows, columns = shard.box.slices
            blocks = slice(columns.start // NF4_BLOCK, columns.stop // NF4_BLOCK)
            here = shard.local.slices[0]
            shape = (whole.shape[0], -1)
            self.codes_OKb[here] = codes.view(*shape, NF4_BLOCK // 2)[rows, blocks]
            self.largest_OK[here] = state.absmax.view(shape)[rows, blocks]
            self.code.copy_(state.state2.code)
            scales.copy_(state.state2.absmax)
            self.means[number] = state.offset

    def whole(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [O, I] in `dtype`."""
        largest_OK = self.code[self.largest_OK.int()]
        for found_OK, scales_OK, mean in self._by_shard(largest_OK):
            found_OK.mul_(scales_OK).add_(mean)
        direct = dtype if dtype in _FORMATS else torch.float32
        weight_OI: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit(
            self.codes_OKb.view(-1, 1), largest_OK.view(-1), NF4_BLOCK, "nf4", self.shape, direct
        )
        return weight_OI.to(dtype)

    def _by_shard(self, largest_OK: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """The rows of each shard, the scale of each of their blocks, and the mean."""
        for shard, scales, mean in zip(self.shards, self.scales.split(self._groups), self.means, strict=True):
            (first, column), (rows, columns) = shard.box.offset, shard.box.size
            counts = [torch.arange(count, device=scales.device) for count in (rows, columns // NF4_BLOCK)]
            in_row = self._of(shard)[1] // NF4_BLOCK
            blocks_OK = (first + counts[0])[:, None] * in_row + column // NF4_BLOCK + counts[1]
            yield largest_OK[shard.local.slices[0]], scales[blocks_OK // _GROUP], mean

    def _of(self, shard: Shard) -> tuple[int, ...]:
        return self.logical[shard.name]


def pack_frozen(layers: nn.Module) -> None:
    """Has the linear layers within `layers` hold their frozen weights in 4 bits; these are no parameters any more."""
    for layer in layers.modules():
        if not isinstance(layer, ColumnParallelLinear | RowParallelLinear | DuplicatedLinear):
            continue
        if not layer.weight.requires_grad:
            shape, shards = layer.weight.shape, layer.shards()["weight"]
            logical = {part.name: part.shape for part in layer.specs["weight"].parts}
            del layer.weight
            layer.add_module("weight", Nf4Weight(shape, shards, logical))


class Nf4Gemm(Gemm):
    """Products of weights that are held in 4 bits, as of others; those of a frozen weight never wait."""

    computes_apart = False

    def __call__(
        self, x: torch.Tensor, weight: nn.Parameter | Nf4Weight, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        if isinstance(weight, nn.Parameter):
            return super().__call__(x, weight, bias)
        y: torch.Tensor = _Nf4Product.apply(x, weight)
        return y if bias is None else y + bias.to(y.dtype)


class _Nf4Product(torch.autograd.Function):
    """x W^T; backward makes the weight whole again, so that none is kept from forward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Nf4Weight) -> torch.Tensor:
        ctx.weight = weight
        return F.linear(x, weight.whole(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, None]:
        return grad @ ctx.weight.whole(grad.dtype) if ctx.needs_input_grad[0] else None, None
