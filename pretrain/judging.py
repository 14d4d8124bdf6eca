"""When a run is judged, by what, and which of its steps was the best. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from pydantic import Field

from workbench.config import Config
from workbench.errors import ConfigError

LOWER_IS_BETTER: Final = frozenset({"loss", "perplexity", "bits_per_byte", "mse", "mae", "rmse"})


class EvalTable(Config):
    """When to evaluate. A run with evaluation data is evaluated at its end in any case."""

    every: int = Field(default=0, ge=0, description="Steps between evaluations; 0: only at the end.")
    batches: int = Field(default=0, ge=0, description="Batches of global_size sequences at most; 0: all the data.")
    metric: str = Field(
        default="valid/loss", min_length=1, description="What says which evaluation is the best: valid/accuracy, say."
    )
    better: Literal["auto", "lower", "higher"] = Field(
        default="auto",
        description="Which values of the metric are better; auto: lower ones of losses, perplexities and errors, else "
        "higher ones.",
    )
    patience: int = Field(
        default=0, ge=0, description="Stop after this many evaluations in a row that were not the best; 0: never."
    )

    @property
    def prefers_lower(self) -> bool:
        """Whether a lower value of the metric is the better one."""
        if self.better == "auto":
            return self.metric.rpartition("/")[2] in LOWER_IS_BETTER
        return self.better == "lower"


@dataclass(frozen=True, slots=True)
class Standing:
    """The best evaluation of a run so far, by its step and the value of `metric`; `stale`: evaluations since then."""

    metric: str
    value: float | None = None
    step: int = 0
    stale: int = 0

    @classmethod
    def of(cls, metric: str, facts: Mapping[str, Any] | None) -> Standing:
        """The standing that `facts` were taken of; a new one where they are of another metric, or none."""
        return cls(**facts) if facts and facts["metric"] == metric else cls(metric)

    def facts(self) -> dict[str, Any]:
        """As JSON values, which a checkpoint keeps; nothing before the first evaluation."""
        return {} if self.value is None else asdict(self)

    def after(self, step: int, metrics: Mapping[str, float], asked: EvalTable, *, must: bool) -> Standing:
        """The standing after another evaluation; a value that is no number is never the best.

        Raises ConfigError when the metric `must` be measured and is not.
        """
        if self.metric not in metrics:
            if must:
                raise ConfigError(f"eval.metric={self.metric!r} is not measured; use one of {', '.join(metrics)}")
            return self
        value, best = metrics[self.metric], self.value
        if best is None:
            is_better = not math.isnan(value)
        else:
            is_better = value < best if asked.prefers_lower else value > best
        if is_better:
            return Standing(self.metric, value, step)
        return Standing(self.metric, best, self.step, self.stale + 1)


def require_judge(asked: EvalTable, evaluations: Sequence[str]) -> None:
    """ConfigError when none of the evaluations can measure `eval.metric`."""
    if asked.metric.partition("/")[0] not in evaluations:
        has = f"only {', '.join(evaluations)}" if evaluations else "nothing"
        raise ConfigError(
            f"eval.metric={asked.metric!r} decides when to stop or what to keep, but {has} is evaluated while the run "
            "goes on; name rows to evaluate (valid), or another metric"
        )
