"""Losses that are made of the labelled tokens alone are those of all tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.helpers.models import gated_model, masked_model
from workbench.models.batch import Batch
from workbench.models.build import build_stage, initialise
from workbench.models.decoder import DecoderStage
from workbench.parallel.loss import IGNORE
from workbench.parallel.mesh import Mesh
from workbench.spec.model import ModelConfig

MODELS = {"plain": gated_model(), "capped": gated_model(final_logit_softcapping=3.0), "transformed": masked_model()}


def stage_of(model: ModelConfig, chunk_tokens: int) -> DecoderStage:
    built = build_stage(model, Mesh.single(), dtype=torch.float64)
    initialise(built.parameters, model, seed=1)
    built.module.loss_chunk_tokens = chunk_tokens
    return built.module


@pytest.mark.parametrize("chunk_tokens", [0, 4])
@pytest.mark.parametrize("labelled", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_all_tokens(name: str, labelled: float, chunk_tokens: int) -> None:
    model = MODELS[name].model_copy(update={"next_sentence": False, "pooler": False})
    stage, draw = stage_of(model, chunk_tokens), torch.Generator().manual_seed(4)
    ids, labels = (torch.randint(0, model.vocab_size, (3, 7), generator=draw) for _ in range(2))
    labels[torch.rand(3, 7, generator=draw) >= labelled] = IGNORE
    every = Batch(ids, labels)
    given: list[int] = []
    stage.lm_head.register_forward_pre_hook(lambda head, inputs: given.append(inputs[0].shape[:-1].numel()))
    found = []
    for batch in (every, replace(every, few_labels=True)):
        given.clear()
        stage.zero_grad()
        loss, each = stage(None, batch), stage(None, batch, "token_losses")
        (loss + 0.5 * each.square().sum()).backward()
        gradients = {name: one.grad for name, one in stage.named_parameters()}
        found.append((loss.detach(), each.detach(), gradients))
    (loss, each, gradients), (few_loss, few_each, few_gradients) = found
    torch.testing.assert_close(few_loss, loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(few_each, each, rtol=1e-13, atol=1e-13)
    for name, gradient in gradients.items():
        torch.testing.assert_close(few_gradients[name], gradient, rtol=1e-11, atol=1e-12, msg=name)
    if not chunk_tokens:
        assert given == [int((labels != IGNORE).sum())] * 2, "the head is spared the others"
