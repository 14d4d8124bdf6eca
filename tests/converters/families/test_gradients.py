"""Gradients equal transformers', as its own checkpoint of gradients says through the family's rules."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from converters.formats.huggingface import FORMAT
from tests.helpers.hf_models import CASES, make_model
from workbench.models.batch import Batch
from workbench.models.build import build_stage
from workbench.models.state import load, to_tensor
from workbench.parallel.live import shard_views
from workbench.parallel.mesh import Mesh

# Beyond the length where frequencies of some begin to depend on it.
IDS = torch.randint(3, 97, (2, 41), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("case", sorted(case for case in CASES if "classifier" not in case))
def test_the_gradient_of_every_tensor_equals_that_of_transformers(tmp_path: Path, case: str) -> None:
    theirs = make_model(case)
    theirs.save_pretrained(tmp_path / "weights")
    logits_NV = theirs(input_ids=IDS[:, :-1]).logits.flatten(0, 1)
    F.cross_entropy(logits_NV, IDS[:, 1:].flatten(), reduction="sum").backward()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.0 if parameter.grad is None else parameter.grad)
        for name, buffer in theirs.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.zero_()
    theirs.save_pretrained(tmp_path / "gradients")
    weights, gradients = (FORMAT.open(tmp_path / name) for name in ("weights", "gradients"))
    built = build_stage(weights.model, Mesh.single())
    load(built.parameters, weights.source)
    built.module(None, Batch(IDS[:, :-1], IDS[:, 1:])).backward()
    largest = max(float(parameter.require_grad().abs().max()) for parameter in built.parameters)
    for parameter in built.parameters:
        for shard, ours in shard_views(parameter, parameter.require_grad()):
            expected = to_tensor(gradients.source.read(shard.name, shard.box), "F32")
            # A gradient that is zero but for rounding, as a key's bias has, is measured against the largest of all.
            scale = max(float(expected.abs().max()), 1e-3 * largest)
            assert float((ours - expected).abs().max()) <= 1e-4 * scale, shard.name
