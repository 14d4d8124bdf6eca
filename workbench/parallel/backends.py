"""What this build of torch can communicate with."""

from __future__ import annotations

import torch.distributed as dist


def available_backends() -> tuple[str, ...]:
    """The communication backends of this torch: 'gloo' for CPUs, 'nccl' for GPUs, 'mpi'."""
    if not dist.is_available():
        return ()
    checks = (("gloo", dist.is_gloo_available), ("nccl", dist.is_nccl_available), ("mpi", dist.is_mpi_available))
    return tuple(name for name, check in checks if check())
