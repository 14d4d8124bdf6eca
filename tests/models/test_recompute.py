"""Computing again instead of keeping: the same gradients for fewer bytes and a known number of FLOPs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers.allocations import Allocations
from tests.helpers.models import biased_model, gated_model
from workbench.models.batch import Batch
from workbench.models.build import BuiltStage, build_stage, initialise
from workbench.models.recompute import HostMemory
from workbench.parallel.dropout import DropoutKey
from workbench.parallel.mesh import Mesh
from workbench.spec.execution import StageOptions
from workbench.spec.model import ModelConfig

MODES = ("selective", "full")
MODELS = {
    "gated": gated_model(attention_dropout=0.1, hidden_dropout=0.1),
    "biased": biased_model(tie_word_embeddings=True),
}
TOKENS = 128  # attention in blocks of queries begins here


def batch_for(model: ModelConfig, tokens: int = TOKENS) -> Batch:
    ids = torch.randint(0, model.vocab_size, (2, tokens + 1), generator=torch.Generator().manual_seed(1))
    return Batch(ids[:, :-1], ids[:, 1:], dropout=DropoutKey(1, 2, torch.arange(2)))


def built_with(model: ModelConfig, **options: Any) -> BuiltStage:
    built = build_stage(model, Mesh.single(), dtype=torch.float64, options=StageOptions(**options))
    initialise(built.parameters, model, seed=3)
    return built


def step(built: BuiltStage, batch: Batch) -> None:
    """Forward and backward; halves of a split backward are done at once."""
    built.module(None, batch).backward()
    while built.gemm.waiting:
        built.gemm.waiting.pop().add()


def gradients(built: BuiltStage, batch: Batch) -> Iterator[tuple[str, torch.Tensor]]:
    step(built, batch)
    return ((parameter.path, parameter.require_grad()) for parameter in built.parameters)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("split", [False, True])
def test_gradients_are_bitwise_those_without_recompute(name: str, mode: str, split: bool) -> None:
    model = MODELS[name].model_copy(update={"max_position_embeddings": TOKENS})
    batch = batch_for(model)
    expected = dict(gradients(built_with(model), batch))
    for path, gradient in gradients(built_with(model, recompute=mode, split_backward=split), batch):
        if split:  # the product of a weight's gradient has its operands the other way round
            torch.testing.assert_close(gradient, expected[path], rtol=1e-12, atol=1e-12)
        else:
            assert torch.equal(gradient, expected[path]), path


@pytest.mark.parametrize("split", [False, True])
def test_full_recompute_costs_one_more_forward_of_the_layers(split: bool) -> None:
    """A step is 3 forwards; with recompute 4 of the layers and 3 of the head, which is not computed again. Without a
    split, computing a layer again ends before its last product, whose result nobody keeps."""
    model = gated_model()
    batch = batch_for(model, tokens=16)
    rows, hidden, ffn = batch.input_ids.numel(), model.hidden_size, model.intermediate_size
    head = 2 * rows * hidden * 104  # 101 words, padded
    forward = flops_of(lambda: built_forward(model, batch))
    layers = forward - head
    last = 2 * rows * hidden * ffn * model.num_hidden_layers
    plain = flops_of(lambda: step(built_with(model, split_backward=split), batch))
    full = flops_of(lambda: step(built_with(model, split_backward=split, recompute="full"), batch))
    # What is counted are products of linear layers: at 16 tokens attention is one operation, which the counter skips.
    assert plain == 3 * forward
    assert full == 3 * head + 4 * layers - (0 if split else last)


def test_selective_recompute_repeats_no_product_of_a_linear_layer() -> None:
    model = gated_model()
    batch = batch_for(model, tokens=16)
    plain, selective = (
        flops_of(lambda mode=mode: step(built_with(model, recompute=mode), batch), torch.ops.aten.mm)
        for mode in ("none", "selective")
    )
    assert plain == selective > 0


def test_each_mode_holds_less_than_the_one_before() -> None:
    model = gated_model(num_hidden_layers=8, max_position_embeddings=TOKENS, vocab_size=32)
    batch = batch_for(model)
    peaks = {mode: peak_of(model, batch, mode) for mode in ("none", "selective", "full")}
    assert peaks["selective"] < 0.75 * peaks["none"]
    assert peaks["full"] < 0.5 * peaks["selective"]


def test_the_host_keeps_activations_and_no_parameters() -> None:
    model = gated_model()
    batch = batch_for(model, tokens=16)
    expected = dict(gradients(built_with(model), batch))
    built = built_with(model)
    moved: list[torch.Tensor] = []

    class Watched(HostMemory):
        def _pack(self, tensor: torch.Tensor) -> tuple[torch.device, torch.Tensor]:
            packed = super()._pack(tensor)
            if packed[1] is not tensor:
                moved.append(tensor)
            return packed

    for block in built.module.layers.values():
        block.saving = Watched(pinned=False).saving
    found = dict(gradients(built, batch))
    assert all(torch.equal(found[path], expected[path]) for path in expected)
    own = {parameter.untyped_storage().data_ptr() for parameter in built.module.parameters()}
    assert moved and not [one for one in moved if one.untyped_storage().data_ptr() in own]


def test_offload_with_full_recompute_moves_the_inputs_of_the_layers_alone() -> None:
    model = gated_model()
    batch = batch_for(model, tokens=16)
    built = built_with(model, recompute="full", offload=True)
    expected = dict(gradients(built_with(model), batch))
    sizes: list[int] = []
    original = HostMemory._pack

    def watched(self: HostMemory, tensor: torch.Tensor) -> tuple[torch.device, torch.Tensor]:
        sizes.append(tensor.numel())
        return original(self, tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HostMemory, "_pack", watched)
        found = dict(gradients(built, batch))
    assert all(torch.equal(found[path], expected[path]) for path in expected)
    hidden = batch.input_ids.numel() * model.hidden_size
    assert sizes.count(hidden) == model.num_hidden_layers
    assert sum(sizes) < 2 * hidden * model.num_hidden_layers, "beside them only small tables and indices"


def peak_of(model: ModelConfig, batch: Batch, mode: str) -> int:
    built = built_with(model, recompute=mode)
    with Allocations() as seen:
        step(built, batch)
    return seen.peak_bytes - sum(p.numel() * 8 for p in built.module.parameters())


def built_forward(model: ModelConfig, batch: Batch) -> torch.Tensor:
    return built_with(model).module(None, batch)


def flops_of(work: Any, operation: Any = None) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        work()
    counts = counter.get_flop_counts()["Global"]
    return sum(counts.values()) if operation is None else counts[operation]
