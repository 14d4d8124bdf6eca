"""Data parallelism through FSDP2: replicated parameters, or parameters cut on dim 0 over the data axis."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from workbench.parallel.loss import accumulation_dtype
from workbench.parallel.mesh import Mesh


class DataParallel:
    """A stage wrapped for the data axis. Gradients are summed, never averaged: the loss carries its own scale."""

    def __init__(self, stage: nn.Module, blocks: Iterable[nn.Module], mesh: Mesh, compute_dtype: torch.dtype) -> None:
        """Wraps each block and then the stage; parameters may still be on the meta device. No-op with one rank."""
        self._stage: FSDPModule | None = None
        if mesh.data_mesh is None:
            return
        self._reshard = mesh.layout.shard == "zero3"
        policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=accumulation_dtype(compute_dtype))
        for module in (*blocks, stage):
            wrapped = fully_shard(
                module,
                mesh=mesh.data_mesh,
                mp_policy=policy,
                reshard_after_forward=self._reshard and module is not stage,
            )
            wrapped.set_gradient_divide_factor(1.0)
            # Otherwise torch asks for a pre-multiplied sum in fp32, which gloo does not have.
            wrapped.set_force_sum_reduction_for_comms(True)
            self._stage = wrapped

    def before_backward(self, *, last: bool) -> None:
        """Says whether the next backward is the step's last on this stage; after that one gradients are reduced."""
        if self._stage is None:
            return
        self._stage.set_requires_gradient_sync(last)
        self._stage.set_is_last_backward(last)
        self._stage.set_reshard_after_backward(last or self._reshard)

    def after_backward(self, *, last: bool) -> None:
        """Takes in gradients that were added after a backward, into sums of the reduction's type; says whether they
        were the step's last on this stage: then gradients are reduced."""
        if self._stage is None:
            return
        self.before_backward(last=last)
        # What FSDP2 calls at the end of each backward, and torch.distributed.pipelining after a last weight gradient.
        self._stage._get_fsdp_state()._root_post_backward_final_callback()
