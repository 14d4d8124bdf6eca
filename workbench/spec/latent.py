"""Multi-head latent attention: what its sizes are called and what they may be. No torch."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from workbench.config import Config


class LatentSizes(Config):
    """Sizes of attention whose keys and values come from a small latent (arXiv:2405.04434, sec. 2.1).

    A head's key has a part of its own, without position, and a rotary part that all heads share.
    """

    kv_lora_rank: int = Field(gt=0, description="Width of the latent that keys and values come from.")
    q_lora_rank: int | None = Field(
        default=None, gt=0, description="Width of the latent that queries come from, if they do."
    )
    qk_nope_head_dim: int = Field(gt=0, description="Size of the part of a query or key without position.")
    qk_rope_head_dim: int = Field(gt=0, description="Size of the rotary part.")
    v_head_dim: int = Field(gt=0, description="Size of a value.")
    mscale_all_dim: float = Field(
        default=0.0,
        ge=0,
        description="Scores are multiplied with (0.1 mscale_all_dim ln(factor) + 1)^2 for the factor of rope_scaling.",
    )
    rope_interleave: bool = Field(
        default=False,
        description="Whether Hugging Face files hold the rotary part in pairs; logical tensors hold it in halves.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"rotary positions need an even qk_rope_head_dim, not {self.qk_rope_head_dim}")
        return self

    @property
    def qk_head_dim(self) -> int:
        """Size of a query or key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim
