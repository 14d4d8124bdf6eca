"""Soft capping: values that cannot grow beyond a limit (Gemma 2 paper, arXiv:2408.00118, sec. 2)."""

from __future__ import annotations

import torch


def soft_cap(x: torch.Tensor, limit: float | None) -> torch.Tensor:
    """limit * tanh(x / limit): x for small values, never more than `limit` either way; x itself without a limit."""
    return x if limit is None else limit * torch.tanh(x / limit)


def through_soft_cap(grad: torch.Tensor, capped: torch.Tensor, limit: float | None) -> torch.Tensor:
    """The gradient of what `soft_cap` was given, by that of what it gave; `capped` may be -inf where `grad` is 0."""
    return grad if limit is None else grad * (1 - (capped / limit).clamp(min=-1).square())
