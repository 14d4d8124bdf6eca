"""Gradients equal transformers', parameter by parameter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from converters.family import detect_family
from converters.formats.huggingface import FORMAT
from converters.rules import pull
from tests.helpers.hf_models import make_model
from workbench.models.batch import Batch
from workbench.models.build import build_stage
from workbench.models.state import load
from workbench.parallel.live import shard_views
from workbench.parallel.mesh import Mesh

CASES = ("deepseek_v3, latents for all, biased", "deepseek_v3, no query latent, tied, linear rope")


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_those_of_transformers(tmp_path: Path, case: str) -> None:
    theirs = make_model(case)
    theirs.save_pretrained(tmp_path)
    opened = FORMAT.open(tmp_path)
    ids = torch.randint(0, opened.model.vocab_size, (2, 24), generator=torch.Generator().manual_seed(5))
    theirs(ids, labels=ids).loss.backward()
    given = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
    built = build_stage(opened.model, Mesh.single())
    load(built.parameters, opened.source)
    labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    (built.module(None, Batch(ids, labels), "loss") / (labels >= 0).sum()).backward()
    rules = detect_family(theirs.config.to_dict(), "config.json").bind(opened.model)
    for parameter in built.parameters:
        for shard, view in shard_views(parameter, parameter.require_grad()):
            rule = rules[shard.name]
            expected = pull(rule.view, shard.box, lambda box, name=rule.foreign: given[name][box.slices])
            assert np.abs(view.numpy() - expected).max() <= 1e-4 * max(1.0, np.abs(expected).max()), shard.name
