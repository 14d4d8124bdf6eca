"""The optimizer of a stage: one rule for each kind of parameter, on local plain tensors, whatever wraps them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from pretrain.adamw import AdamW
from pretrain.config import OptimTable
from pretrain.loss_scale import LossScale
from pretrain.muon import Muon
from workbench.parallel.gradients import clip_gradients, complete_gradients, gradient_norm
from workbench.parallel.live import LiveParameter
from workbench.parallel.mesh import Mesh
from workbench.spec.schema import OPTIMIZER_PREFIX

UNDECAYED_ROLES = ("bias", "norm")


class Optimizer:
    """What `optim.name` says, over the trainable parameters of one rank; `step_count` counts updates that were made."""

    def __init__(
        self,
        parameters: Sequence[LiveParameter],
        mesh: Mesh,
        config: OptimTable,
        *,
        compute_dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        """compute_dtype: in which Muon multiplies; by default the parameters'. seed: of the rounding of bf16 moments.

        Collective over the mesh.
        """
        self._mesh, self._config = mesh, config
        self._parameters = [parameter for parameter in parameters if parameter.trainable]
        self.step_count = 0
        matrices = [p for p in self._parameters if config.name == "muon" and p.spec.role == "matrix"]
        taken = {p.path for p in matrices}
        others = [p for p in self._parameters if p.path not in taken]
        self._rules: list[AdamW | Muon] = []
        for decays, weight_decay in ((True, config.weight_decay), (False, 0.0)):
            some = [p for p in others if (p.spec.role not in UNDECAYED_ROLES) == decays]
            self._rules.append(AdamW(some, config, weight_decay=weight_decay, seed=seed))
        if config.name == "muon":
            dtype = compute_dtype or (matrices[0].data.dtype if matrices else torch.float32)
            self._rules.append(Muon(matrices, mesh, config, compute_dtype=dtype, seed=seed))

    def moments(self) -> dict[str, dict[str, torch.Tensor]]:
        """By logical prefix (`optim.exp_avg`), then by parameter path: moments of the parameter's local shape."""
        if self._config.offload and self._mesh.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # the last update may still be on its way to the host
        found: dict[str, dict[str, torch.Tensor]] = {}
        for rule in self._rules:
            for kind, values in rule.moments.at_rest.items():
                found.setdefault(f"{OPTIMIZER_PREFIX}{kind}", {}).update(values)
        return found

    @torch.no_grad()
    def update(self, lr: float, loss_scale: LossScale | None = None) -> torch.Tensor:
        """Completes, clips and applies the gradients of one step, and frees them; returns their global norm.

        With a loss scale, gradients are that many times too large, and where their norm is not finite nothing is
        applied. Communicates on the axes that hold copies, and over the world for the norm.
        """
        scale = 1.0 if loss_scale is None else loss_scale.value
        complete_gradients(self._parameters, self._mesh)
        norm = gradient_norm(self._parameters, self._mesh) / scale
        if loss_scale is None or loss_scale.accepts(norm):
            if self._config.clip > 0 or scale != 1.0:
                clip_gradients(self._parameters, norm, self._config.clip or math.inf, scale=scale)
            self.step_count += 1
            for rule in self._rules:
                rule.update(lr, self.step_count)
        for parameter in self._parameters:
            parameter.parameter.grad = None
        return norm
