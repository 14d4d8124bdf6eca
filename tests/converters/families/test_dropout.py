"""Dropout acts wherever transformers drops: with masks that keep everything, outputs are scaled alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from converters.formats.huggingface import FORMAT
from tests.helpers.hf_models import CASES, save_model
from workbench.models.batch import Batch
from workbench.models.build import build_stage
from workbench.models.state import load
from workbench.parallel.dropout import DropoutKey
from workbench.parallel.mesh import Mesh

IDS = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(5))


def keep_all(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    return x / (1.0 - p) if training else x


@pytest.mark.parametrize("case", ["bert", "bert classifier", "t5", "t5, gated, not scaled, more layers that read"])
def test_dropout_acts_where_it_acts_in_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    opened = FORMAT.open(save_model(case, tmp_path / "in"))
    theirs = CASES[case][0].from_pretrained(tmp_path / "in", attn_implementation="eager").train()
    built = build_stage(opened.model, Mesh.single())
    load(built.parameters, opened.source)
    monkeypatch.setattr(torch.nn.functional, "dropout", keep_all)
    monkeypatch.setattr("workbench.parallel.dropout.hash_grid", lambda rows, coordinates: torch.tensor(-1))
    answers = IDS[:, :7] if opened.model.num_encoder_layers else None
    inputs = {"input_ids": IDS} if answers is None else {"input_ids": IDS, "decoder_input_ids": answers}
    batch = Batch(IDS, dropout=DropoutKey(1, 1, torch.arange(2)), decoder_ids=answers)
    with torch.no_grad():
        expected = theirs(**inputs).logits
        found = built.module(None, batch, "logits")
        plain = built.module(None, Batch(IDS, decoder_ids=answers), "logits")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - plain).abs().max() > 1e-2
