"""Noise on embeddings while training (NEFTune, arXiv:2310.05914, algorithm 1), a function of what it falls on."""

from __future__ import annotations

import torch

from workbench.models.batch import LocalBatch
from workbench.parallel.dropout import uniform_noise


def add_noise(x_BTD: torch.Tensor, alpha: float, batch: LocalBatch, site: str) -> torch.Tensor:
    """`x` with draws from +-alpha / sqrt(tokens x features) of each row added; the same at every layout."""
    if not alpha or batch.dropout is None:
        return x_BTD
    features_D = torch.arange(x_BTD.shape[-1], device=x_BTD.device)
    noise_BTD = uniform_noise(batch.dropout.rows("noise", site), (batch.hidden_tokens, features_D))
    bound_B11 = alpha / (batch.lengths * len(features_D)).sqrt().view(-1, 1, 1)
    return x_BTD + (noise_BTD * bound_B11).to(x_BTD.dtype)
