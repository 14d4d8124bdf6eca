"""NVIDIA Transformer Engine executes: linear layers in fp8, norms, and the core of attention.

Its modules hold no parameter of the model. A linear layer's module is built without memory and called with our weight
in place of its own. A norm's module holds ones, since its backward reads its weight when ours is no longer in place:
ours multiplies afterwards, where the reference models round as well. Collectives stay with the layers
(docs/decisions/0140-transformer-engine-computes.md). Needs a GPU, and transformer_engine >= 2.9.

Legend: B batch, T tokens, H heads (local), K key/value heads (local), d head size.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import transformer_engine.pytorch as te
from torch.func import functional_call
from transformer_engine.common import recipe as recipes

from workbench.errors import LaunchError
from workbench.parallel.backends import Attend, Normalise, NormKind
from workbench.parallel.gemm import Gemm
from workbench.parallel.mesh import Mesh

_RECIPES = {
    "delayed": recipes.DelayedScaling,
    "current": recipes.Float8CurrentScaling,
    "blockwise": recipes.Float8BlockScaling,
    "mxfp8": recipes.MXFP8BlockScaling,
}


class TransformerEngineExecutor:
    """Builds Transformer Engine's modules for the layers of one stage. recipe: a key of its fp8 recipes, or None."""

    def __init__(self, recipe: str | None, mesh: Mesh, dtype: torch.dtype) -> None:
        self._recipe = None if recipe is None else _RECIPES[recipe]()
        self._mesh, self._dtype = mesh, dtype
        try:
            with self.region():
                pass
        except (AssertionError, RuntimeError) as error:
            raise LaunchError(f"precision.linear='te:{recipe}' does not run on this GPU: {error}") from error

    def linear(self, outputs: int, inputs: int) -> Gemm:
        return _Linear(te.Linear(inputs, outputs, bias=False, params_dtype=self._dtype, device="meta"), self.region)

    def head(self) -> Gemm:
        return Gemm()

    def norm(self, kind: NormKind, size: int, eps: float) -> Normalise:
        made = te.RMSNorm if kind == "rmsnorm" else te.LayerNorm
        module = made(size, eps=eps, dtype=self._dtype, device=self._mesh.device).requires_grad_(False)
        return lambda x: module(x)  # not the module, which would become part of the model

    def attention(self, heads: int, kv_heads: int, head_dim: int) -> Attend:
        core = te.DotProductAttention(
            heads, head_dim, num_gqa_groups=kv_heads, qkv_format="bshd", attn_mask_type="causal"
        )

        def attend(q_BTHd: torch.Tensor, k_BTKd: torch.Tensor, v_BTKd: torch.Tensor) -> torch.Tensor:
            return core(q_BTHd, k_BTKd, v_BTKd).view(q_BTHd.shape)

        return attend

    def region(self) -> AbstractContextManager[Any]:
        """In it products are in fp8. Delayed scaling updates its scales where the outermost one ends.

        The largest values that delayed scaling remembers are shared over tp: other stages have other layers.
        """
        if self._recipe is None:
            return nullcontext()
        return te.autocast(enabled=True, recipe=self._recipe, amax_reduction_group=self._mesh.tp.group)


class _Linear(Gemm):
    """One linear layer's products by its own te.Linear, which remembers the scales of delayed scaling."""

    computes_apart = False

    def __init__(self, linear: te.Linear, region: Callable[[], AbstractContextManager[Any]]) -> None:
        super().__init__()
        self._linear, self._region = linear, region

    def product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        # A region of its own: when a layer is computed again, the one around the stage is over.
        with self._region():
            y = functional_call(self._linear, {"weight": weight}, (x,))
        return y if bias is None else y + bias
