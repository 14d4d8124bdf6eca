"""AdamW (arXiv:1711.05101) on the local plain tensors of a stage."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.optim.adamw import adamw

from pretrain.config import OptimTable
from pretrain.moments import Moments
from workbench.parallel.live import LiveParameter

KINDS = ("exp_avg", "exp_avg_sq")


class AdamW:
    """The rule for some parameters that share one weight decay."""

    def __init__(
        self, parameters: Sequence[LiveParameter], config: OptimTable, *, weight_decay: float, seed: int
    ) -> None:
        self._config, self._weight_decay = config, weight_decay
        self.moments = Moments(KINDS, parameters, config, seed=seed)

    def update(self, lr: float, step: int) -> None:
        """Applies the parameters' gradients in update number `step`, which counts from 1."""
        config = self._config
        for parameters, (means, squares) in self.moments.at_work(step):
            data = [parameter.data for parameter in parameters]
            # torch counts on from what each parameter has seen.
            seen = torch.full((len(data),), float(step - 1), device=data[0].device)
            adamw(
                data,
                [parameter.require_grad() for parameter in parameters],
                means,
                squares,
                [],
                list(seen.unbind()),
                fused=True,
                amsgrad=False,
                beta1=config.betas[0],
                beta2=config.betas[1],
                lr=lr,
                weight_decay=self._weight_decay,
                eps=config.eps,
                maximize=False,
            )
