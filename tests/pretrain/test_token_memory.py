"""The estimate of memory where ranks share the tokens, against what a step really keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pretrain.memory import estimate_memory
from tests.helpers.models import biased_model, gated_model, latent_model
from tests.helpers.ranks import run_ranks
from tests.pretrain.test_memory import LARGER, config
from workbench.models.batch import Batch
from workbench.models.build import build_stage, initialise
from workbench.parallel.mesh import Mesh
from workbench.spec.layout import ParallelLayout
from workbench.spec.model import ModelConfig


@pytest.mark.parametrize("make", [gated_model, biased_model, latent_model])
@pytest.mark.parametrize(
    "degrees", [{"tp": 2, "sequence_parallel": True}, {"cp": 2}, {"cp": 2, "context": "ring"}], ids=str
)
def test_ranks_that_share_tokens_keep_about_what_is_estimated(make: Any, degrees: dict[str, Any]) -> None:
    model, layout = make(**LARGER), ParallelLayout(**degrees)
    (found,) = estimate_memory(model, layout, config())
    (alone,) = estimate_memory(model, ParallelLayout(), config())
    assert found.activations < 0.75 * alone.activations
    for real in run_ranks(2, _kept_bytes, model, layout):
        assert real <= found.activations <= 1.6 * real


def _kept_bytes(model: ModelConfig, layout: ParallelLayout) -> int:
    """What this rank keeps for the backward of a microbatch, without its parameters."""
    built = build_stage(model, Mesh.create(layout, torch.device("cpu")))
    initialise(built.parameters, model, seed=1)
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.zeros(2, 128, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        built.module(None, Batch(input_ids=ids, labels=ids), "loss")
    for parameter in built.module.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
