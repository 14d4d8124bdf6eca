"""Where a layer has norms, by the words of `model.norm_placement`. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

BlockNorms = tuple[str | None, str | None, str | None, str | None]
"""The names of the norms before and after attention, and before and after the MLP; None where there is none."""

PLACEMENTS: Final[Mapping[str, BlockNorms]] = {
    "pre": ("input_layernorm", None, "post_attention_layernorm", None),
    "post": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "sandwich": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    "post_residual": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
}
SUMS: Final = "post_residual"
"""Where the norms after attention and MLP are not of what these give, but of its sum with what they read."""
