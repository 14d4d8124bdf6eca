"""The factor that lifts fp16 gradients out of the numbers too small for it, by the rules of torch.amp.GradScaler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pretrain.config import PrecisionTable
from workbench.errors import WorkbenchError

INITIAL, GROWTH, BACKOFF = 2.0**16, 2.0, 0.5


class LossScale:
    """What the loss is multiplied by before backward. A dynamic one grows after many finite steps and backs off after
    each whose gradient overflowed; that step is skipped."""

    def __init__(self, config: PrecisionTable) -> None:
        self._dynamic = config.loss_scale == "dynamic"
        self._interval = config.growth_interval
        self.value = INITIAL if config.loss_scale == "dynamic" else config.loss_scale
        self.skipped_steps = 0
        self._finite_steps = 0

    def accepts(self, norm: torch.Tensor) -> bool:
        """Whether a gradient of this global norm may be applied. Adapts the scale: called once a step.

        The norm is the same on all ranks, and so is the answer. WorkbenchError when no scale is left to try.
        """
        finite = bool(norm.isfinite())
        if finite:
            self._finite_steps += 1
            if self._dynamic and self._finite_steps >= self._interval:
                self.value, self._finite_steps = self.value * GROWTH, 0
            return True
        self.skipped_steps, self._finite_steps = self.skipped_steps + 1, 0
        if not self._dynamic:
            raise WorkbenchError(
                f"the gradient overflowed at precision.loss_scale={self.value:g}; lower it, or set it to 'dynamic'"
            )
        self.value *= BACKOFF
        if self.value < 1:
            raise WorkbenchError(
                f"the gradient is not finite in fp16 even at a loss scale of {self.value / BACKOFF:g}, after "
                f"{self.skipped_steps} skipped steps; the run has diverged. Lower optim.lr, lengthen optim.warmup or "
                "use precision.compute = 'bf16'; running again goes on from the last checkpoint"
            )
        return False

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs, as JSON values."""
        return {"value": self.value, "finite_steps": self._finite_steps, "skipped_steps": self.skipped_steps}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state`; the value only of a dynamic scale."""
        self.skipped_steps, self._finite_steps = int(state["skipped_steps"]), int(state["finite_steps"])
        if self._dynamic:
            self.value = float(state["value"])
