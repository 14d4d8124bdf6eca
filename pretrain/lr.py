"""Learning-rate curves: pure functions of the step. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

CurveName = Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt"]


@dataclass(frozen=True, slots=True)
class Curve:
    """The learning rate of every step of a run of `steps` steps.

    The first `warmup` steps rise linearly to `peak` (step 0 already learns: it has peak / warmup). Then the named curve
    falls to `floor`, which the last step of the run comes next to. Without `steps` (a run that is bounded by time only)
    the curve stays where it is before its decay.
    """

    name: CurveName
    peak: float
    floor: float = 0.0
    warmup: int = 0
    steps: int | None = None
    decay_share: float = 0.2

    def __call__(self, step: int) -> float:
        """The learning rate of `step`, counted from 0."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        return self.floor + (self.peak - self.floor) * self._height(step)

    def _height(self, step: int) -> float:
        """Where the curve stands between floor (0) and peak (1) after its warm-up."""
        if self.name == "inverse_sqrt":
            # Vaswani et al. 2017, section 5.3, scaled so that the peak is reached at the end of the warm-up.
            return math.sqrt(max(self.warmup, 1) / (step + 1)) if step >= self.warmup else 1.0
        if self.steps is None:
            return 1.0
        share = min(max((step - self.warmup) / max(self.steps - self.warmup, 1), 0.0), 1.0)
        return _SHAPES[self.name](share, self.decay_share)


def _wsd(share: float, decay_share: float) -> float:
    # Warm-up, stable, decay (Hu et al. 2024, MiniCPM, section 4.2), with the linear decay of Hägele et al. 2024.
    return 1.0 if share < 1 - decay_share else (1 - share) / decay_share


_SHAPES: dict[str, Callable[[float, float], float]] = {
    "constant": lambda share, decay_share: 1.0,
    "linear": lambda share, decay_share: 1.0 - share,
    "cosine": lambda share, decay_share: 0.5 * (1.0 + math.cos(math.pi * share)),
    "wsd": _wsd,
}
