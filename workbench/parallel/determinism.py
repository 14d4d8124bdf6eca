"""The same bits from every run on the same machines: set in one place, before the first kernel."""

from __future__ import annotations

import os

import torch


def make_deterministic() -> None:
    """Makes torch choose only kernels whose result does not depend on chance, in this whole process.

    An operation without such a kernel raises an error that names it. Call it before the first matrix product on a GPU:
    cuBLAS reads its workspace when it begins.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    # Every buffer is written before it is read, so filling it first would only cost time.
    torch.utils.deterministic.fill_uninitialized_memory = False
