"""Rotary position embedding (arXiv:2104.09864) in the half-split order: dimension i turns with i + d/2.

Legend: B batch, T tokens, H heads, d head size.
"""

from __future__ import annotations

import math

import torch

from workbench.spec.model import ModelConfig, RopeScaling


def rope_frequencies(model: ModelConfig, device: torch.device) -> torch.Tensor:
    """Angle per position for each pair of dimensions, [d/2] fp32."""
    size = model.rotary_dim
    exponent = torch.arange(0, size, 2, dtype=torch.int64, device=device).to(torch.float32) / size
    frequencies = 1.0 / (model.rope_theta**exponent)
    scaling = model.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    return _by_parts(frequencies, scaling)


def _by_parts(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    wavelength = 2 * math.pi / frequencies
    longest = scaling.original_max_position_embeddings / scaling.low_freq_factor
    shortest = scaling.original_max_position_embeddings / scaling.high_freq_factor
    share = (scaling.original_max_position_embeddings / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - share) * frequencies / scaling.factor + share * frequencies
    scaled = torch.where(wavelength > longest, frequencies / scaling.factor, frequencies)
    between = (wavelength <= longest) & (wavelength >= shortest)
    return torch.where(between, blended, scaled)


def rope_table(model: ModelConfig, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and signed sines for positions [T] or [B, T], each [..., T, 1, d]: what `apply_rope` multiplies with.

    Angles are taken in fp32, as the reference models do. The sine of the first half carries the rotation's minus.
    """
    angles = positions.to(torch.float32)[..., None, None] * rope_frequencies(model, positions.device)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def apply_rope(x_BTHd: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Each head vector turned by its position's angles."""
    cos, sin = table
    return torch.addcmul(x_BTHd * cos, x_BTHd.roll(x_BTHd.shape[-1] // 2, dims=-1), sin)
