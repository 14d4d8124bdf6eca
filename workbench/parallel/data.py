"""Data parallelism through FSDP2: what replicas keep whole, what they share, and how often they talk about it.

| `shard` | shared by the replicas | gradients are summed | parameters are gathered |
|---|---|---|---|
| none | nothing | once a step | never |
| zero1 | parameters at rest, moments | once a step; whole ones accumulate until then | once a step |
| zero2 | gradients as well | after each microbatch, so that only shares accumulate | once a step |
| zero3 | parameters at all times | after each microbatch | for each forward and each backward |

With `shard_size` below the number of replicas several copies exist; they are summed over once a step in any case.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from workbench.errors import LaunchError
from workbench.parallel.loss import accumulation_dtype
from workbench.parallel.mesh import Mesh
from workbench.parallel.module import ParallelModule


class DataParallel:
    """A stage wrapped for the data axis. Gradients are summed, never averaged: the loss carries its own scale."""

    def __init__(
        self,
        stage: nn.Module,
        blocks: Iterable[nn.Module],
        mesh: Mesh,
        compute_dtype: torch.dtype,
        *,
        reduce_dtype: torch.dtype | None = None,
    ) -> None:
        """Wraps each block and then the stage; parameters may still be on the meta device. No-op with one rank.

        reduce_dtype: the type in which gradients are summed over replicas; by default fp32 or wider.
        """
        self._stage: FSDPModule | None = None
        if mesh.replicas_of().mesh is None:
            return
        self._shard = mesh.layout.shard
        layers = [module for module in stage.modules() if isinstance(module, ParallelModule)]
        # Different experts have other replicas than the rest of their layer. What no gradient changes is kept whole.
        # Inner modules come first, as FSDP2 wants it.
        dealt = [(layer, next(iter(layer.specs.values()))) for layer in reversed(layers) if layer.is_dealt]
        kept = {getattr(m, name) for m in layers for name, spec in m.specs.items() if spec.role == "balance"}
        policy = MixedPrecisionPolicy(
            param_dtype=compute_dtype, reduce_dtype=reduce_dtype or accumulation_dtype(compute_dtype)
        )
        for module, spec in (*dealt, *((block, None) for block in blocks), (stage, None)):
            replicas = mesh.replicas_of(spec)
            assert replicas.mesh is not None and replicas.mesh.mesh_dim_names is not None
            one_copy, names = replicas.one_copy, replicas.mesh.mesh_dim_names
            wrapped = fully_shard(
                module,
                # Where all replicas share one copy there is no second sum, not even one over a single rank.
                mesh=replicas.mesh[names[1]] if one_copy else replicas.mesh,
                mp_policy=policy,
                reshard_after_forward=self._shard == "zero3" and module is not stage,
                ignored_params=kept,
            )
            wrapped.set_gradient_divide_factor(1.0)
            # Otherwise torch asks for a pre-multiplied sum in fp32, which gloo does not have.
            wrapped.set_force_sum_reduction_for_comms(True)
            if not one_copy and self._shard in ("zero2", "zero3"):
                _sum_unused(wrapped, self._shard)
            self._stage = wrapped

    def before_backward(self, *, last: bool) -> None:
        """Says whether the next backward is the step's last on this stage; after that one every gradient is summed."""
        if self._stage is None:
            return
        self._stage.set_requires_gradient_sync(last or self._shard in ("zero2", "zero3"))
        self._stage.set_requires_all_reduce(last)
        self._stage.set_is_last_backward(last)
        self._stage.set_reshard_after_backward(last or self._shard == "zero3")

    def after_backward(self, *, last: bool) -> None:
        """Takes in gradients that were added after a backward, into sums of the reduction's type; says whether they
        were the step's last on this stage: then gradients are reduced."""
        if self._stage is None:
            return
        self.before_backward(last=last)
        # What FSDP2 calls at the end of each backward, and torch.distributed.pipelining after a last weight gradient.
        self._stage._get_fsdp_state()._root_post_backward_final_callback()


def _sum_unused(wrapped: FSDPModule, shard: str) -> None:
    """Has each backward bring gradients of the same parameters: zeros for those that it does not reach (another
    chunk's, say). What a copy has summed so far waits in one buffer a layer for the sum over copies.

    Raises LaunchError where torch cannot (before 2.13).
    """
    switch = getattr(wrapped, "set_reduce_scatter_unused_params", None)
    if switch is None:
        raise LaunchError(
            f"parallel.shard_size with shard='{shard}' needs torch 2.13 or newer, not {torch.__version__}; use "
            "shard = 'zero1' or share one copy among all replicas"
        )
    switch(True)
