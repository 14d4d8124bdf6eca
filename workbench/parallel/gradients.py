"""What must happen to gradients between backward and the optimizer: partial sums completed, the true norm, clipping."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

from workbench.parallel.axis import Axis
from workbench.parallel.live import LiveParameter, shard_views
from workbench.parallel.mesh import Mesh


def complete_gradients(parameters: Sequence[LiveParameter], mesh: Mesh) -> None:
    """Sums the gradients of boxes that several ranks hold and of which each saw only a part.

    These are KV heads with copies on the tensor axis, replicated factors inside cut regions, embeddings tied across the
    first and the last stage, and tables that are on every stage. Called once a step, after data parallelism has
    reduced; one all-reduce a kind.
    """
    partial: dict[int, list[torch.Tensor]] = defaultdict(list)
    tied: list[torch.Tensor] = []
    everywhere: list[torch.Tensor] = []
    for parameter in parameters:
        if not parameter.trainable:
            continue
        grad = parameter.require_grad()
        if parameter.tied_stages:
            tied.append(grad)
        if parameter.every_stage:
            everywhere.append(grad)
        for shard, view in shard_views(parameter, grad):
            if shard.partial_grad and shard.copies > 1:
                partial[shard.copies].append(view)
    for copies, views in sorted(partial.items()):
        _all_reduce_together(views, mesh.copies(copies))
    _all_reduce_together(tied, mesh.tied)
    _all_reduce_together(everywhere, mesh.pp)


def gradient_norm(parameters: Sequence[LiveParameter], mesh: Mesh) -> torch.Tensor:
    """The 2-norm of the whole model's gradient, each logical element counted once; a float64 scalar on every rank.

    Padding has no shard and counts for nothing. One all-reduce over the world.
    """
    views = [
        view
        for parameter in parameters
        if parameter.trainable and parameter.counted
        for shard, view in shard_views(parameter, parameter.require_grad())
        if shard.copy == 0
    ]
    total = torch.zeros((), dtype=torch.float64, device=mesh.device)
    if views:
        norms = torch.stack(torch._foreach_norm(views)).to(torch.float64)
        total += norms.square().sum()
    return mesh.world.all_reduce(total).sqrt()


def clip_gradients(
    parameters: Sequence[LiveParameter], norm: torch.Tensor, limit: float, *, scale: float = 1.0
) -> None:
    """Divides all gradients by `scale`, after which their norm is `norm`, and then so that it is at most `limit`."""
    factor = (limit / (norm + 1e-6)).clamp(max=1.0) / scale
    grads = [grad for parameter in parameters if (grad := parameter.grad) is not None]
    if grads:
        torch._foreach_mul_(grads, factor.to(grads[0].dtype))


def _all_reduce_together(views: list[torch.Tensor], axis: Axis) -> None:
    if not views or axis.size == 1:
        return
    bucket = torch.cat([view.reshape(-1) for view in views])
    axis.all_reduce(bucket)
    for view, summed in zip(views, bucket.split([view.numel() for view in views]), strict=True):
        view.copy_(summed.view(view.shape))
