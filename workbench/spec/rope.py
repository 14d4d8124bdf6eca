"""How rotary frequencies are stretched beyond the length that a model was trained for. No torch."""

from __future__ import annotations

import math
from typing import Final, Literal, Self

from pydantic import Field, model_validator

from workbench.config import Config

RopeKind = Literal["linear", "by_length", "by_parts", "ramp", "per_dimension"]

_READ: Final[dict[RopeKind, tuple[str, ...]]] = {
    "linear": ("factor",),
    "by_length": ("factor",),
    "by_parts": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "ramp": ("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate"),
    "per_dimension": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "short_factor",
        "long_factor",
    ),
}
"""The fields that each kind reads."""


class RopeScaling(Config):
    """How rotary frequencies are stretched (the reference is transformers, modeling_rope_utils.py).

    linear: all divided by `factor`. by_length ("dynamic NTK"): the base grows with the part of a sequence that is
    beyond max_position_embeddings. by_parts (`_compute_llama3_parameters`): long wavelengths are divided by
    `factor`, short ones kept, those between `low_freq_factor` and `high_freq_factor` blended. ramp ("yarn",
    arXiv:2309.00071): dimensions that turn more than `beta_fast` times over the original length are kept, those that
    turn less than `beta_slow` times divided by `factor`, those between blended; cosines and sines times the attention
    factor. per_dimension ("longrope", arXiv:2402.13753): each pair of dimensions has a divisor of its own,
    `long_factor` for sequences beyond the original length and `short_factor` for others; the attention factor as well.
    """

    kind: RopeKind = Field(
        description="linear; by_length (dynamic NTK); by_parts; ramp (YaRN); per_dimension (LongRoPE)."
    )
    factor: float = Field(default=1.0, gt=0, description="How many times the original length is reached.")
    original_max_position_embeddings: int = Field(
        default=8192, gt=1, description="The length trained for: by_parts, ramp, per_dimension."
    )
    low_freq_factor: float = Field(default=1.0, description="by_parts: turns over the original length; fewer: divided.")
    high_freq_factor: float = Field(default=4.0, description="by_parts: turns over the original length; more: kept.")
    attention_factor: float | None = Field(
        default=None,
        gt=0,
        description="ramp, per_dimension: a factor of cosines and sines; not set: what follows from `factor`.",
    )
    beta_fast: float = Field(default=32.0, gt=0, description="ramp: turns over the original length; more: kept.")
    beta_slow: float = Field(default=1.0, gt=0, description="ramp: turns over the original length; fewer: divided.")
    truncate: bool = Field(default=True, description="ramp: whether it begins and ends at whole dimensions.")
    short_factor: tuple[float, ...] = Field(
        default=(), description="per_dimension: divisors up to the original length."
    )
    long_factor: tuple[float, ...] = Field(default=(), description="per_dimension: divisors beyond it.")

    @property
    def reads(self) -> tuple[str, ...]:
        """The fields that this kind reads."""
        return _READ[self.kind]

    @property
    def attention_scale(self) -> float:
        """What cosines and sines are multiplied with."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.factor <= 1 or self.kind not in ("ramp", "per_dimension"):
            return 1.0
        if self.kind == "ramp":
            return 0.1 * math.log(self.factor) + 1.0
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_max_position_embeddings))

    def change_length(self, max_position_embeddings: int) -> int | None:
        """The number of tokens from which on frequencies depend on the length of a sequence; None: never."""
        beyond = {"by_length": max_position_embeddings, "per_dimension": self.original_max_position_embeddings}
        return beyond.get(self.kind)

    def size_faults(self, rotary_dim: int) -> list[str]:
        """Why this does not fit `rotary_dim` turned dimensions, if it does not."""
        if self.kind == "by_length" and rotary_dim == 2:
            return ["rope_scaling.kind='by_length' needs more than one pair of turned dimensions"]
        if self.kind != "per_dimension":
            return []
        sizes = {"short_factor": len(self.short_factor), "long_factor": len(self.long_factor)}
        return [
            f"rope_scaling.{name} has {size} numbers, but there are {rotary_dim // 2} pairs of turned dimensions"
            for name, size in sizes.items()
            if size != rotary_dim // 2
        ]

    @model_validator(mode="after")
    def _reads_all_that_is_given(self) -> Self:
        fields = type(self).model_fields
        unread = [
            name for name in fields if name not in ("kind", *self.reads) and vars(self)[name] != fields[name].default
        ]
        if unread:
            raise ValueError(f"kind={self.kind!r} does not read {', '.join(unread)}; remove it")
        return self
