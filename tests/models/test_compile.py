"""Compiled blocks: one graph serves all layers, else torch.compile gives up after eight and runs the rest eagerly."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from workbench.models.batch import Batch
from workbench.models.build import build_stage, initialise
from workbench.parallel.dropout import DropoutKey
from workbench.parallel.mesh import Mesh
from workbench.spec.model import ModelConfig

LAYERS = 10


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_no_layer_and_no_step_needs_a_graph_of_its_own(dropout: float) -> None:
    model = ModelConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        hidden_dropout=dropout,
    )
    built = build_stage(model, Mesh.single(), dtype=torch.float64)
    initialise(built.parameters, model, seed=1)
    ids = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(0))
    batches = [Batch(ids, ids, dropout=DropoutKey(1, step, torch.arange(2))) for step in range(3)]
    expected = [built.module(None, batch).item() for batch in batches]
    torch.compiler.reset()
    counter = CompileCounter()
    for block in built.module.layers.values():
        block.compile(backend=counter)
    assert [built.module(None, batch).item() for batch in batches] == pytest.approx(expected, rel=1e-12)
    assert 1 <= counter.frame_count < LAYERS
