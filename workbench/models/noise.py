"""Dropout and noise on hidden states while training: a function of what they fall on, the same at every layout."""

from __future__ import annotations

import torch

from workbench.models.batch import LocalBatch
from workbench.parallel.dropout import dropout, uniform_noise


def add_noise(x_BTD: torch.Tensor, alpha: float, batch: LocalBatch, site: str) -> torch.Tensor:
    """`x` with draws from +-alpha / sqrt(tokens x features) of each row added (NEFTune, arXiv:2310.05914, alg. 1)."""
    if not alpha or batch.dropout is None:
        return x_BTD
    features_D = torch.arange(x_BTD.shape[-1], device=x_BTD.device)
    noise_BTD = uniform_noise(batch.dropout.rows("noise", site), (batch.hidden_tokens, features_D))
    bound_B11 = alpha / (batch.lengths * len(features_D)).sqrt().view(-1, 1, 1)
    return x_BTD + (noise_BTD * bound_B11).to(x_BTD.dtype)


def drop_hidden(x_BTD: torch.Tensor, probability: float, batch: LocalBatch, *site: str) -> torch.Tensor:
    """Dropout on the hidden states of this rank's tokens."""
    if not probability or batch.dropout is None:
        return x_BTD
    coordinates = (batch.hidden_tokens, torch.arange(x_BTD.shape[-1], device=x_BTD.device))
    return dropout(x_BTD, probability, batch.dropout.rows(*site), coordinates)
