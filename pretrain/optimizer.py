"""AdamW on the local plain tensors of a stage, whatever wraps its parameters.

The moments of a parameter lie like the parameter itself, so its shards say which boxes of `optim.exp_avg/<name>` and
`optim.exp_avg_sq/<name>` they hold.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from pretrain.config import OptimTable
from workbench.parallel.gradients import clip_gradients, complete_gradients, gradient_norm
from workbench.parallel.live import LiveParameter
from workbench.parallel.mesh import Mesh
from workbench.spec.schema import MOMENTS

UNDECAYED_ROLES = ("bias", "norm")
_STATE_KEYS = {prefix: prefix.removeprefix("optim.") for prefix in MOMENTS}


class Optimizer:
    """AdamW over the trainable parameters of one rank; `step` counts updates that were made."""

    def __init__(self, parameters: Sequence[LiveParameter], mesh: Mesh, config: OptimTable) -> None:
        self._mesh, self._config = mesh, config
        self._parameters = [parameter for parameter in parameters if parameter.trainable]
        # An optimizer wants leaves of its own; each shares its memory with the local part of a parameter.
        self._leaves = [nn.Parameter(parameter.data) for parameter in self._parameters]
        decayed = [p.spec.role not in UNDECAYED_ROLES for p in self._parameters]
        pairs = list(zip(self._leaves, decayed, strict=True))
        groups = [
            {
                "params": [leaf for leaf, decays in pairs if decays and leaf.numel()],
                "weight_decay": config.weight_decay,
            },
            {"params": [leaf for leaf, decays in pairs if not decays and leaf.numel()], "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )
        self._updates: list[torch.Tensor] = []
        for leaf in self._leaves:
            # AdamW would make the same at its first step; made here, they can be loaded into before it.
            updates = torch.zeros((), dtype=torch.float32, device=leaf.device)
            self._updates.append(updates)
            state = {key: torch.zeros_like(leaf, requires_grad=False) for key in _STATE_KEYS.values()}
            self._adamw.state[leaf] = {"step": updates, **state}

    @property
    def step_count(self) -> int:
        """Updates made so far."""
        return int(self._updates[0].item()) if self._updates else 0

    @step_count.setter
    def step_count(self, updates: int) -> None:
        for counter in self._updates:
            counter.fill_(updates)

    def moments(self) -> dict[str, dict[str, torch.Tensor]]:
        """By logical prefix (`optim.exp_avg`), then by parameter path: moments of the parameter's local shape."""
        return {
            prefix: {
                parameter.path: self._adamw.state[leaf][key]
                for parameter, leaf in zip(self._parameters, self._leaves, strict=True)
            }
            for prefix, key in _STATE_KEYS.items()
        }

    def update(self, lr: float) -> torch.Tensor:
        """Completes, clips and applies the gradients of one step, and frees them; returns their global norm.

        Communicates on the axes that hold copies, and over the world for the norm.
        """
        complete_gradients(self._parameters, self._mesh)
        norm = gradient_norm(self._parameters, self._mesh)
        if self._config.clip > 0:
            clip_gradients(self._parameters, norm, self._config.clip)
        for group in self._adamw.param_groups:
            group["lr"] = lr
        for parameter, leaf in zip(self._parameters, self._leaves, strict=True):
            leaf.grad = parameter.grad
        self._adamw.step()
        for parameter, leaf in zip(self._parameters, self._leaves, strict=True):
            leaf.grad = parameter.parameter.grad = None
        return norm
