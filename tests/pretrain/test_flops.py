"""The operations that are counted for a token are those of the matrix products that a step computes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pretrain.flops import flops_per_token
from tests.helpers.models import biased_model, gated_model, latent_model
from workbench.models import attend
from workbench.models.batch import Batch
from workbench.models.build import build_stage, initialise
from workbench.parallel.mesh import Mesh
from workbench.spec.model import ModelConfig

MODELS: dict[str, Callable[[], ModelConfig]] = {
    "gated": gated_model,
    "biased": biased_model,
    "latents": latent_model,
    "no query latent": lambda: latent_model(q_lora_rank=None),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_count_is_that_of_the_products_of_a_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = MODELS[name](), 32
    built = build_stage(model, Mesh.single())
    initialise(built.parameters, model, seed=1)
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    # Products with the zeros that a CPU's kernel wants at the end of shorter vectors are not the model's.
    monkeypatch.setattr(attend, "_of_one_size", lambda *heads: heads)
    # In documents attention is computed as one plain product of all queries and keys.
    documents = torch.zeros_like(ids)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        built.module(None, Batch(ids, ids, documents=documents), "loss").backward()
    padded = 6 * model.hidden_size * (104 - model.vocab_size)  # rows of the head that are padding
    assert counter.get_total_flops() / tokens == flops_per_token(model, tokens) + padded
