"""Frozen weights in 4 bits: the values of bitsandbytes at every layout, the gradients of those values, and no more
memory; and what they do not go with."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from converters.open import open_checkpoint
from finetune.adapter import require_fit
from finetune.adapters._lora_layers import attach
from finetune.adapters.lora import ADAPTER as LORA
from finetune.run import Finetuning
from pretrain.engine import Pipeline, schedule_named
from pretrain.optimizer import Optimizer
from tests.finetune.adapters import write_base
from tests.finetune.data import byte_tokenizer, config_of, letters, small_model, write_rows
from tests.finetune.test_lora_parity import ADAMW, backward, train_b, whole
from tests.finetune.test_runs import base_of, labels, train_at
from tests.helpers.models import gated_model, sparse_model
from tests.helpers.parity import Boxes, boxes_of, largest_difference
from tests.helpers.ranks import run_ranks
from tests.pretrain.models import VOCAB
from workbench.errors import ConfigError, LayoutError
from workbench.models.build import BuiltStage, build_stage, initialise
from workbench.models.state import load, load_packed
from workbench.parallel.gradients import complete_gradients
from workbench.parallel.mesh import Mesh
from workbench.parallel.nf4 import Nf4Weight
from workbench.spec.execution import FrozenFormat, StageOptions
from workbench.spec.geometry import Box
from workbench.spec.layout import ParallelLayout
from workbench.spec.lora import LoraSpec, is_factor
from workbench.spec.model import ModelConfig

needs_library = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
MODEL = gated_model(vocab_size=VOCAB, hidden_size=128, intermediate_size=256, num_hidden_layers=2)
SPEC = LoraSpec(r=3)
QLORA = {"kind": "lora", "r": 3, "frozen_format": "nf4"}
ONE = ParallelLayout()
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("nf4") / "base", MODEL)


def stage_on(base: Path, mesh: Mesh, held: FrozenFormat, dtype: torch.dtype = torch.float64) -> BuiltStage:
    """The base under trained-looking adapters, its frozen weights held in this way."""
    options = StageOptions(frozen_format=held)
    built = build_stage(MODEL, mesh, dtype=dtype, adapt=lambda stage: attach(stage, SPEC), options=options)
    factors = [parameter for parameter in built.parameters if is_factor(parameter.spec.parts[0].name)]
    initialise(factors, MODEL, seed=7)
    train_b(factors)
    source = open_checkpoint(base).source
    load([parameter for parameter in built.parameters if parameter not in factors], source)
    load_packed(built.module, source)
    return built


def packed_of(built: BuiltStage) -> dict[str, Nf4Weight]:
    return {name: module for name, module in built.module.named_modules() if isinstance(module, Nf4Weight)}


def round_trip(packed: BuiltStage, plain: BuiltStage) -> None:
    """Gives the plain stage the values that the packed one computes with."""
    for name, weight in packed_of(packed).items():
        parameter = plain.module.get_parameter(name)
        parameter.data.copy_(weight.whole(parameter.dtype))


def first_step(built: BuiltStage, mesh: Mesh) -> tuple[float, Boxes]:
    trainable = [parameter for parameter in built.parameters if parameter.trainable]
    loss = backward(Pipeline(built, mesh, schedule_named("1f1b")), MODEL, 0)
    complete_gradients(trainable, mesh)
    return loss, boxes_of(trainable, gradients=True)


def observe(base: Path, layout: ParallelLayout) -> tuple[list[float], Boxes]:
    """Losses and gradient norms of three steps, and what was trained after the last."""
    mesh = Mesh.create(layout, CPU)
    built = stage_on(base, mesh, "nf4")
    pipeline, optimizer = Pipeline(built, mesh, schedule_named("1f1b")), Optimizer(built.parameters, mesh, ADAMW)
    numbers = []
    for step in range(3):
        numbers += [backward(pipeline, MODEL, step), float(optimizer.update(1e-2))]
    return numbers, boxes_of([parameter for parameter in built.parameters if parameter.trainable])


def assert_values_of_bitsandbytes(base: Path, built: BuiltStage) -> None:
    """Bit for bit, as its own functions make them on the same device."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed = packed_of(built)
    assert len(packed) == 4 * MODEL.num_hidden_layers
    source = open_checkpoint(base).source
    for weight in packed.values():
        for dtype in (torch.float32, torch.bfloat16):
            found = weight.whole(dtype)
            for shard in weight.shards:
                logical = torch.from_numpy(source.read(shard.name, Box.whole(weight.logical[shard.name])))
                logical = logical.to(found.device)
                codes = quantize_4bit(logical, blocksize=64, compress_statistics=True, quant_type="nf4")
                assert torch.equal(found[shard.local.slices], dequantize_4bit(*codes).to(dtype))


def assert_just_over_4_bits_a_weight(built: BuiltStage) -> None:
    for weight in packed_of(built).values():
        held = sum(buffer.nbytes for name, buffer in weight.named_buffers() if name != "code")
        assert 4.125 < 8 * held / weight.shape.numel() < 4.15  # 4, 8 for each of 64, 32 for each of 64 x 256


@needs_library
def test_the_values_are_those_of_bitsandbytes_for_each_projection(base: Path) -> None:
    assert_values_of_bitsandbytes(base, stage_on(base, Mesh.single(), "nf4", torch.float32))


@needs_library
def test_a_base_in_4_bits_takes_just_over_4_bits_a_weight(base: Path) -> None:
    assert_just_over_4_bits_a_weight(stage_on(base, Mesh.single(), "nf4"))


@needs_library
def test_loss_and_gradients_are_those_of_the_rounded_base_held_plain(base: Path) -> None:
    mesh = Mesh.single()
    packed, plain = stage_on(base, mesh, "nf4"), stage_on(base, mesh, "plain")
    round_trip(packed, plain)
    (loss, gradients), (expected, theirs) = first_step(packed, mesh), first_step(plain, mesh)
    assert loss == expected
    for name, values in whole(theirs).items():
        assert torch.equal(whole(gradients)[name], values), name


@needs_library
def test_the_loss_is_that_of_the_base_within_what_rounding_takes(base: Path) -> None:
    # NF4 rounds normal weights with a relative error of 0.09 in the mean square, independently of each other, so a
    # product is off by as much; here every layer is a product of random weights, which forgives nothing.
    mesh = Mesh.single()
    packed, plain = stage_on(base, mesh, "nf4"), stage_on(base, mesh, "plain")
    for name, weight in packed_of(packed).items():
        given = plain.module.get_parameter(name)
        assert 0.08 < float((weight.whole(given.dtype) - given).norm() / given.norm()) < 0.1
    assert first_step(packed, mesh)[0] == pytest.approx(first_step(plain, mesh)[0], rel=0.09)


@needs_library
@pytest.mark.parity
@pytest.mark.parametrize(
    "layout",
    [ParallelLayout(tp=2, sequence_parallel=True), ParallelLayout(tp=2, pp=2), ParallelLayout(dp=2)],
    ids=str,
)
def test_every_layout_trains_what_one_process_trains(base: Path, layout: ParallelLayout) -> None:
    numbers, weights = observe(base, ONE)
    for there, boxes in run_ranks(layout.world_size, observe, base, layout):
        assert there == pytest.approx(numbers, rel=1e-10)
        assert not boxes or largest_difference(boxes, whole(weights)) < 1e-10


@needs_library
def test_a_run_leaves_an_ordinary_adapter_and_goes_on_at_another_layout(tmp_path: Path) -> None:
    model = small_model(hidden_size=128, intermediate_size=128)
    write_base(tmp_path / "base", model, tokenizer=byte_tokenizer(tmp_path / "tokenizer"))
    for name, rows in (("train", letters(48)), ("test", letters(21, start=100))):
        write_rows(tmp_path / f"{name}.jsonl", rows)
    whole = Finetuning(labels(tmp_path, QLORA, tmp_path / "a"), base_of(tmp_path), Mesh.single(), dtype=torch.float64)
    found = open_checkpoint(Path(whole.run().checkpoint))
    assert found.adapter is not None and found.adapter.lora == SPEC
    run_ranks(2, train_at, labels(tmp_path, QLORA, tmp_path / "b", run={"steps": 2}), tmp_path, ParallelLayout(tp=2))
    rest = Finetuning(labels(tmp_path, QLORA, tmp_path / "b"), base_of(tmp_path), Mesh.single(), dtype=torch.float64)
    again = open_checkpoint(Path(rest.run().checkpoint))
    for name, tensor in found.source.schema.items():
        box = Box.whole(tensor.shape)
        off = abs(again.source.read(name, box) - found.source.read(name, box)).max()
        assert off <= 1e-9 * max(abs(found.source.read(name, box)).max(), 1e-30)


@needs_library
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_computes_with_the_same_values_and_holds_them_in_as_little(base: Path) -> None:
    mesh = Mesh.create(ONE, torch.device("cuda", 0))
    packed, plain = stage_on(base, mesh, "nf4", torch.float32), stage_on(base, mesh, "plain", torch.float32)
    assert_values_of_bitsandbytes(base, packed)
    assert_just_over_4_bits_a_weight(packed)
    round_trip(packed, plain)
    (loss, gradients), (expected, theirs) = first_step(packed, mesh), first_step(plain, mesh)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert largest_difference(gradients, whole(theirs)) < 1e-5


def test_without_the_library_it_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.adapters.lora.find_spec", lambda name: None)
    config = config_of(tmp_path, {"kind": "sft", "train": "x"}, QLORA)
    with pytest.raises(ConfigError, match=r"frozen_format='nf4': .* pip install 'workbench\[qlora\]'"):
        require_fit(LORA, config.method, config, MODEL)


def test_magnitudes_of_rounded_rows_are_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path, {"kind": "sft", "train": "x"}, {**QLORA, "dora": True})
    with pytest.raises(ConfigError, match="dora=true and frozen_format='nf4'"):
        require_fit(LORA, config.method, config, MODEL)


@pytest.mark.parametrize(
    ("tables", "model", "message"),
    [
        ({"kernels": {"compile": True}}, MODEL, "and kernels.compile=true"),
        ({"kernels": {"backend": "te"}}, MODEL, "and kernels.backend='te'"),
        ({"precision": {"compute": "bf16", "linear": "fp8_rowwise"}}, MODEL, "and precision.linear='fp8_rowwise'"),
        ({"parallel": {"dp": 2, "shard": "zero3"}}, MODEL, "and parallel.shard='zero3'.*use shard = 'none'"),
        ({}, sparse_model(), "and model.moe"),
        ({"parallel": {"tp": 4}}, MODEL, r"on each of tp=4 ranks layers.\*.self_attn.o_proj 128 x 32"),
    ],
)
def test_what_does_not_go_with_it_is_refused_by_name(
    tables: dict[str, Any], model: ModelConfig, message: str, tmp_path: Path
) -> None:
    config = config_of(tmp_path, {"kind": "sft", "train": "x"}, QLORA, **tables)
    with pytest.raises(LayoutError, match=f"method.frozen_format='nf4'.*{message}"):
        config.resolve_layout(model, config.parallel.num_ranks())
