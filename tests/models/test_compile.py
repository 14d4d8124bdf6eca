"""Compiled blocks: one graph serves all layers, else torch.compile gives up after eight and runs the rest eagerly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

from tests.helpers.models import gated_model, post_norm_model, sliding_model
from tests.helpers.ranks import run_ranks
from workbench.models.batch import Batch
from workbench.models.build import build_stage, initialise
from workbench.parallel.dropout import DropoutKey
from workbench.parallel.mesh import Mesh
from workbench.spec.execution import StageOptions, compile_faults
from workbench.spec.layout import ParallelLayout
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


@pytest.mark.parametrize(
    "options",
    [
        {"recompute": "selective"},
        {"recompute": "full"},
        {"recompute": "full", "offload": True},
        {"linear": "fp8_tensorwise"},
        {"linear": "fp8_rowwise", "recompute": "full", "loss_chunk_tokens": 7},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_graph_saves_memory_and_multiplies_in_fp8_with_the_same_gradients(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    _assert_same(*_eager_and_compiled(options, dtype, 1))


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_one_graph_communicates_over_tp_and_does_so_again_in_recompute(recompute: str) -> None:
    for found in run_ranks(2, _eager_and_compiled, {"recompute": recompute}, torch.float32, 2):
        _assert_same(*found)


@pytest.mark.parametrize(("make", "kinds"), [(sliding_model, 2), (post_norm_model, 1)])
def test_a_graph_serves_all_layers_that_attend_in_one_way(make: Callable[..., ModelConfig], kinds: int) -> None:
    for tp in (1, 2):
        for eager, compiled, graphs in run_ranks(tp, _eager_and_compiled, {}, torch.float32, tp, make):
            assert graphs == kinds
            _assert_same(eager, compiled, 1)


@pytest.mark.parametrize(
    ("options", "model", "layout", "message"),
    [
        ({"split_backward": True}, {}, {}, "each waiting product would break the graph"),
        ({"backend": "te"}, {}, {}, "its kernels are closed to torch.compile"),
        ({"recompute": "full"}, {"hidden_dropout": 0.1}, {}, "no layer would be compiled"),
        ({}, {}, {"tp": 2, "sequence_parallel": True}, "sequence_parallel: collectives that run beside products"),
        ({}, {}, {"cp": 2}, "cp=2: collectives that run beside products"),
    ],
)
def test_what_cannot_be_compiled_is_refused_with_its_reason(
    options: dict[str, Any], model: dict[str, Any], layout: dict[str, Any], message: str
) -> None:
    degrees = ParallelLayout(**layout)
    (fault,) = compile_faults(StageOptions(compile_blocks=True, **options), gated_model(**model), degrees)
    assert message in fault
    assert compile_faults(StageOptions(**options), gated_model(**model), degrees) == []


Gradients = dict[str, torch.Tensor]


def _assert_same(eager: Gradients, compiled: Gradients, graphs: int) -> None:
    assert graphs == 1
    for path, expected in eager.items():
        torch.testing.assert_close(compiled[path], expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def _eager_and_compiled(
    options: dict[str, Any], dtype: torch.dtype, tp: int, make: Callable[..., ModelConfig] = gated_model
) -> tuple[Gradients, Gradients, int]:
    """Gradients of one step without and with compiled layers, and how many graphs there were."""
    model = make(hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS)
    mesh = Mesh.single() if tp == 1 else Mesh.create(ParallelLayout(tp=tp), torch.device("cpu"))
    ids = torch.randint(0, model.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    found = []
    for compiled in (False, True):
        built = build_stage(model, mesh, compute_dtype=dtype, options=StageOptions(**options))
        initialise(built.parameters, model, seed=1)
        for block in built.module.layers.values():
            if compiled:
                block.compile(backend=counter)
        built.module(None, Batch(ids, ids)).backward()
        found.append({parameter.path: parameter.require_grad().clone() for parameter in built.parameters})
    return found[0], found[1], counter.frame_count
