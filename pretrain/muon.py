"""Muon: momentum whose every matrix is brought near the closest orthogonal one before it is applied.

Keller Jordan et al., 2024 (kellerjordan.github.io/posts/muon), with the scale of arXiv:2502.16982, sec. 2.2, at which
updates are as large as AdamW's, so that one learning rate and one weight decay serve both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from pretrain.config import OptimTable
from pretrain.moments import Moments
from workbench.parallel.live import LiveParameter
from workbench.parallel.mesh import Mesh
from workbench.parallel.whole import WholeTensors

KINDS = ("momentum",)
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
EPS = 1e-7
RMS = 0.2
"""Of an update's elements at learning rate 1, about what AdamW's have."""


class Muon:
    """The rule for matrices. Each whole logical matrix counts, however tensor or data parallelism cut it: one rank of
    the stage gathers it, orthogonalises it and gives every rank its box back."""

    def __init__(
        self,
        parameters: Sequence[LiveParameter],
        mesh: Mesh,
        config: OptimTable,
        *,
        compute_dtype: torch.dtype,
        seed: int,
    ) -> None:
        """compute_dtype: in which the matrices are multiplied, but bf16 for fp16. Collective over the stage."""
        self._config = config
        # A product of small singular values underflows in fp16.
        self._product_dtype = torch.bfloat16 if compute_dtype == torch.float16 else compute_dtype
        self._parameters = list(parameters)
        self._wholes = WholeTensors(self._parameters, mesh.holders)
        self.moments = Moments(KINDS, parameters, config, seed=seed)

    def update(self, lr: float, step: int) -> None:
        """Applies the parameters' gradients in update number `step`, which are overwritten. Collective over the stage.

        Nesterov's momentum as in torch.optim.Muon.
        """
        beta, decay = self._config.momentum, self._config.weight_decay
        for parameters, (momenta,) in self.moments.at_work(step):
            for parameter, momentum in zip(parameters, momenta, strict=True):
                grad = parameter.require_grad()
                momentum.lerp_(grad, 1 - beta)
                grad.lerp_(momentum, beta)
        grads = [parameter.require_grad() for parameter in self._parameters]
        self._wholes.transform(grads, self._direction)
        for parameter, grad in zip(self._parameters, grads, strict=True):
            parameter.data.mul_(1 - lr * decay).add_(grad, alpha=-lr)

    def _direction(self, _name: str, matrix: torch.Tensor) -> torch.Tensor:
        rows, columns = matrix.shape[-2:]
        near = orthogonalised(matrix.to(self._product_dtype)).to(matrix.dtype)
        return near.mul_(RMS * math.sqrt(max(rows, columns)))


def orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """About U V^T of the singular value decomposition U S V^T of `matrix`, or of each matrix of a stack.

    Five Newton-Schulz iterations, whose coefficients bring all but tiny singular values to between 0.7 and 1.2.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.reshape(-1, *matrix.shape[-2:])
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(matrix.shape)
