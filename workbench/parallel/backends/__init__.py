"""What executes: the communication of this build of torch, and who computes linear layers, norms and attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist

from workbench.errors import LaunchError
from workbench.parallel.fp8 import Fp8Gemm
from workbench.parallel.gemm import Gemm
from workbench.parallel.mesh import Mesh
from workbench.parallel.nf4 import Nf4Gemm
from workbench.spec.execution import Backend, StageOptions

NormKind = Literal["rmsnorm", "layernorm"]
Normalise = Callable[[torch.Tensor], torch.Tensor]
"""x / rms(x), or (x - mean(x)) / std(x), over the last dimension, in the type of x."""
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Causal attention of queries [B, T, H, d] to keys and values [B, T, K, d] of their own positions; [B, T, H, d]."""
INSTALL = "pip install 'workbench[te]'"


class Executor(Protocol):
    """Who executes a stage. None stands for torch's own operations, as the layers write them.

    Parameters stay with the layers, so names, shards and checkpoints do not depend on who executes.
    """

    def linear(self, outputs: int, inputs: int) -> Gemm:
        """Who multiplies in one linear layer of these local sizes."""
        ...

    def head(self) -> Gemm:
        """Who multiplies in the head; always in the compute type, as fp8 there costs accuracy and gains little."""
        ...

    def norm(self, kind: NormKind, size: int, eps: float) -> Normalise | None: ...

    def attention(self, heads: int, kv_heads: int, head_dim: int) -> Attend | None: ...

    def region(self) -> AbstractContextManager[Any]:
        """What surrounds a stage's forward through its layers."""
        ...


class TorchExecutor:
    """Torch itself, linear layers in the compute type or in fp8."""

    def __init__(self, options: StageOptions) -> None:
        self._gemm = _gemm_of(options)
        self._gemm.waiting = [] if options.split_backward else None

    def linear(self, outputs: int, inputs: int) -> Gemm:
        return self._gemm

    def head(self) -> Gemm:
        return self._gemm if type(self._gemm) is Gemm else Gemm()

    def norm(self, kind: NormKind, size: int, eps: float) -> None:
        return None

    def attention(self, heads: int, kv_heads: int, head_dim: int) -> None:
        return None

    def region(self) -> AbstractContextManager[Any]:
        return nullcontext()


def _gemm_of(options: StageOptions) -> Gemm:
    if options.frozen_format == "nf4":
        return Nf4Gemm()
    if options.linear == "compute":
        return Gemm()
    return Fp8Gemm("tensorwise" if options.linear == "fp8_tensorwise" else "rowwise")


def open_executor(options: StageOptions, mesh: Mesh, dtype: torch.dtype) -> Executor:
    """The executor that `options` names, for activations of `dtype`."""
    if options.backend == "torch":
        return TorchExecutor(options)
    from workbench.parallel.backends.te import TransformerEngineExecutor

    return TransformerEngineExecutor(options.te_recipe, mesh, dtype)


@dataclass(frozen=True, slots=True)
class Choice:
    """A backend, and why it and not another where the configuration leaves it open."""

    backend: Backend
    reason: str


def choose_backend(asked: Literal["auto", "torch", "te"], device: str, faults: Sequence[str] = ()) -> Choice:
    """The backend for a run on `device` ("cpu", "cuda"); LaunchError where Transformer Engine is asked for in vain.

    faults: why the run cannot be executed by Transformer Engine; "auto" then takes torch, and says so.
    """
    if asked == "torch":
        return Choice("torch", "as configured")
    missing = te_missing(device)
    if asked == "te":
        if missing is not None:
            raise LaunchError(f"kernels.backend='te': {missing}, or set kernels.backend = 'torch'")
        return Choice("te", "as configured")
    if missing is not None or faults:
        return Choice("torch", missing or faults[0])
    return Choice("te", "Transformer Engine is installed")


def te_missing(device: str) -> str | None:
    """What Transformer Engine lacks here and what to do about it; None when it can run."""
    if device != "cuda":
        return f"Transformer Engine runs on NVIDIA GPUs, and this run is on a {device.upper()}; use a machine with one"
    if find_spec("transformer_engine") is None:
        return f"Transformer Engine is not installed; {INSTALL}"
    return None


def available_backends() -> tuple[str, ...]:
    """The communication backends of this torch: 'gloo' for CPUs, 'nccl' for GPUs, 'mpi'."""
    if not dist.is_available():
        return ()
    checks = (("gloo", dist.is_gloo_available), ("nccl", dist.is_nccl_available), ("mpi", dist.is_mpi_available))
    return tuple(name for name, check in checks if check())
