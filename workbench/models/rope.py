"""Rotary position embedding (arXiv:2104.09864) in the half-split order: dimension i turns with i + r/2.

Legend: B batch, T tokens, H heads, d head size, r the first dimensions of a head, those that turn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from workbench.spec.model import ModelConfig
from workbench.spec.rope import RopeKind, RopeScaling


def rope_frequencies(model: ModelConfig, reach: torch.Tensor, *, local: bool = False) -> torch.Tensor:
    """Angle per position for each pair of dimensions, [r/2] fp32, or [B, r/2] where `reach` [B] differs by row.

    reach: the length of each row's longest sequence, on which some kinds of scaling depend. local: by
    `rope_local_theta`, never stretched.
    """
    exponents = torch.arange(0, model.rotary_dim, 2, dtype=torch.int64, device=reach.device).to(torch.float32)
    exponents /= model.rotary_dim
    scaling = model.rope_scaling
    if local:
        assert model.rope_local_theta is not None
        return 1.0 / (model.rope_local_theta**exponents)
    if scaling is not None and scaling.kind == "by_length":
        return 1.0 / (_grown_base(model, scaling, reach)[..., None] ** exponents)
    frequencies = 1.0 / (model.rope_theta**exponents)
    return frequencies if scaling is None else _SCALED[scaling.kind](frequencies, scaling, model, reach)


def rope_changes(model: ModelConfig, before: int, after: int) -> bool:
    """Whether a sequence that grows from `before` to `after` tokens has other frequencies, for all of its tokens."""
    scaling = model.rope_scaling
    change = None if scaling is None else scaling.change_length(model.max_position_embeddings)
    if scaling is None or change is None or after <= change:
        return False
    return scaling.kind == "by_length" or before <= change


def _grown_base(model: ModelConfig, scaling: RopeScaling, reach: torch.Tensor) -> torch.Tensor:
    trained, r = model.max_position_embeddings, model.rotary_dim
    growth = scaling.factor * reach.clamp(min=trained) / trained - (scaling.factor - 1)
    return model.rope_theta * growth ** (r / (r - 2))


def _linear(frequencies: torch.Tensor, scaling: RopeScaling, model: ModelConfig, reach: torch.Tensor) -> torch.Tensor:
    return frequencies / scaling.factor


def _by_parts(frequencies: torch.Tensor, scaling: RopeScaling, model: ModelConfig, reach: torch.Tensor) -> torch.Tensor:
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


def _ramp(frequencies: torch.Tensor, scaling: RopeScaling, model: ModelConfig, reach: torch.Tensor) -> torch.Tensor:
    r = model.rotary_dim

    def dimension(turns: float) -> float:
        """The one that turns so often over the original length."""
        wavelength = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
        return r * math.log(wavelength) / (2 * math.log(model.rope_theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, r - 1)
    dimensions = torch.arange(r // 2, dtype=torch.float32, device=frequencies.device)
    # The least width keeps a ramp between equal ends from dividing by zero (`_compute_yarn_parameters`).
    kept = 1 - ((dimensions - low) / (high - low or 0.001)).clamp(0, 1)
    return frequencies / scaling.factor * (1 - kept) + frequencies * kept


def _per_dimension(
    frequencies: torch.Tensor, scaling: RopeScaling, model: ModelConfig, reach: torch.Tensor
) -> torch.Tensor:
    is_long = (reach > scaling.original_max_position_embeddings)[..., None]
    short, long = (frequencies.new_tensor(factors) for factors in (scaling.short_factor, scaling.long_factor))
    return frequencies / torch.where(is_long, long, short)


_Scale = Callable[[torch.Tensor, RopeScaling, ModelConfig, torch.Tensor], torch.Tensor]
_SCALED: Mapping[RopeKind, _Scale] = {
    "linear": _linear,
    "by_parts": _by_parts,
    "ramp": _ramp,
    "per_dimension": _per_dimension,
}


def rope_table(
    model: ModelConfig, positions: torch.Tensor, reach: torch.Tensor, dtype: torch.dtype, *, local: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and signed sines for positions [T] or [B, T], each [..., T, 1, r]: what `apply_rope` multiplies with.

    Angles are taken in fp32, as the reference models do. The sine of the first half carries the rotation's minus.
    """
    frequencies = rope_frequencies(model, reach, local=local)
    angles = positions.to(torch.float32)[..., None, None] * frequencies[..., None, None, :]
    scale = 1.0 if model.rope_scaling is None or local else model.rope_scaling.attention_scale
    cos, sin = (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def apply_rope(x_BTHd: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The first r dimensions of each head vector turned by its position's angles, the others as they are."""
    cos, sin = table
    r = cos.shape[-1]
    if r == x_BTHd.shape[-1]:
        return torch.addcmul(x_BTHd * cos, x_BTHd.roll(r // 2, dims=-1), sin)
    turned = x_BTHd[..., :r]
    return torch.cat((torch.addcmul(turned * cos, turned.roll(r // 2, dims=-1), sin), x_BTHd[..., r:]), dim=-1)
