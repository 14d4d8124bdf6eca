"""The optimizer of a stage: one rule for each kind of parameter, on local plain tensors, whatever wraps them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from pretrain.adamw import AdamW
from pretrain.config import OptimTable
from pretrain.loss_scale import LossScale
from pretrain.muon import Muon
from workbench.parallel.gradients import clip_gradients, complete_gradients, gradient_norm
from workbench.parallel.live import LiveParameter
from workbench.parallel.mesh import Mesh
from workbench.spec.geometry import ParameterSpec
from workbench.spec.schema import OPTIMIZER_PREFIX

UNDECAYED_ROLES = ("bias", "norm")


def full_rate(spec: ParameterSpec) -> float:
    """1: the whole learning rate, for every parameter."""
    return 1.0


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
        rate: Callable[[ParameterSpec], float] = full_rate,
    ) -> None:
        """compute_dtype: in which Muon multiplies; by default the parameters'. seed: of the rounding of bf16 moments.
        rate: by what the learning rate of a parameter is multiplied.

        Collective over the mesh.
        """
        self._mesh, self._config = mesh, config
        self._parameters = [parameter for parameter in parameters if parameter.trainable]
        self.step_count = 0
        matrices = [p for p in self._parameters if config.name == "muon" and p.spec.role == "matrix"]
        taken = {p.path for p in matrices}
        groups: dict[tuple[bool, float], list[LiveParameter]] = {(True, 1.0): [], (False, 1.0): []}
        for p in (p for p in self._parameters if p.path not in taken):
            groups.setdefault((p.spec.role not in UNDECAYED_ROLES, rate(p.spec)), []).append(p)
        # Each with the share of the learning rate that it gets.
        self._rules: list[tuple[AdamW | Muon, float]] = []
        for (decays, share), some in groups.items():
            decay = config.weight_decay if decays else 0.0
            self._rules.append((AdamW(some, config, weight_decay=decay, seed=seed), share))
        dtype = compute_dtype or (matrices[0].data.dtype if matrices else torch.float32)
        # Muon is collective over a stage, so its ranks must have the same groups, in the same order.
        for share in sorted({rate(p.spec) for p in matrices}) if config.name == "muon" else ():
            some = [p for p in matrices if rate(p.spec) == share]
            self._rules.append((Muon(some, mesh, config, compute_dtype=dtype, seed=seed), share))

    def moments(self) -> dict[str, dict[str, torch.Tensor]]:
        """By logical prefix (`optim.exp_avg`), then by parameter path: moments of the parameter's local shape."""
        if self._config.offload and self._mesh.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # the last update may still be on its way to the host
        found: dict[str, dict[str, torch.Tensor]] = {}
        for rule, _ in self._rules:
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
            for rule, share in self._rules:
                rule.update(lr * share, self.step_count)
        for parameter in self._parameters:
            parameter.parameter.grad = None
        return norm
