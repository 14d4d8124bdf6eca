"""Gradients of the mean loss equal transformers', tensor by tensor and seen through each family's own rules."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from converters.formats.huggingface import FORMAT
from tests.helpers.hf_models import CASES, make_model, save_model
from workbench.models.batch import Batch
from workbench.models.build import build_stage
from workbench.models.state import load
from workbench.parallel.live import shard_views
from workbench.parallel.loss import IGNORE
from workbench.parallel.mesh import Mesh

TOKENS = 24


def save_gradients(case: str, ids: torch.Tensor, folder: Path) -> Path:
    """A folder in which each tensor of the model is the gradient that transformers finds for it."""
    model = make_model(case)
    model(ids, labels=ids).loss.backward()
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.zero_()
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", sorted(case for case in CASES if "classifier" not in case))
def test_gradients_agree_with_those_of_transformers(tmp_path: Path, case: str) -> None:
    opened = FORMAT.open(save_model(case, tmp_path / "in"))
    # Without token 0, the padding of some: transformers keeps back the gradient of its embedding.
    ids = torch.randint(1, opened.model.vocab_size, (2, TOKENS), generator=torch.Generator().manual_seed(5))
    theirs = FORMAT.open(save_gradients(case, ids, tmp_path / "gradients")).source
    built = build_stage(opened.model, Mesh.single())
    load(built.parameters, opened.source)
    labels = torch.cat((ids[:, 1:], torch.full((2, 1), IGNORE)), dim=1)
    (built.module(None, Batch(ids, labels), "loss") / (labels != IGNORE).sum()).backward()
    for parameter in built.parameters:
        for shard, ours in shard_views(parameter, parameter.require_grad()):
            assert np.abs(ours.numpy() - theirs.read(shard.name, shard.box)).max() <= 1e-4, shard.name
