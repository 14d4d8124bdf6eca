"""An adapter merged into its base is the adapted model, and only into the base that it was trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from converters.cast import CastSource, as_float32
from converters.job import JobOptions, make_job
from converters.logits import compare_logits
from converters.merge import MergedSource, base_fingerprint, open_merged
from converters.open import get_format, open_checkpoint
from tests.finetune.adapters import adapted_stage, write_adapter, write_base
from tests.helpers.models import biased_model, gated_model
from tests.helpers.ranks import run_ranks
from workbench.checkpoint.source import TensorSource
from workbench.errors import CheckpointError, ConversionError
from workbench.models.batch import Batch
from workbench.models.generate import load_model
from workbench.parallel.mesh import Mesh
from workbench.spec.geometry import Box
from workbench.spec.layout import ParallelLayout
from workbench.spec.lora import LoraSpec
from workbench.spec.model import ModelConfig
from workbench.spec.schema import logical_tensors

LORA = LoraSpec(r=3, targets=("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"))
IDS = torch.arange(24).view(2, 12)
OPTIONS = JobOptions(layout=ParallelLayout(), optimizer="drop")


@pytest.mark.parametrize("model", [gated_model(tie_word_embeddings=True), biased_model(), gated_model(num_labels=3)])
def test_the_merged_model_has_the_logits_of_base_and_adapter_attached(model: ModelConfig, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", model.model_copy(update={"num_labels": 0}))
    adapter = write_adapter(tmp_path / "adapter", model, LORA, base)
    attached = adapted_stage(model, LORA, Mesh.single()).module
    merged = open_merged(adapter)
    together = load_model(merged.model, merged.source)
    plain = load_model(open_checkpoint(base).model, open_checkpoint(base).source)
    with torch.no_grad():
        expected = attached(None, Batch(IDS), "logits")
        gap = (together(None, Batch(IDS), "logits") - expected).abs().max()
        assert gap < 2e-5 * expected.abs().max()
        if not model.num_labels:
            assert (plain(None, Batch(IDS), "logits") - expected).abs().max() > 0.1


@pytest.mark.parametrize("targets", [("embed_tokens", "q_proj"), ("lm_head",), ("lm_head", "embed_tokens")], ids=str)
def test_an_adapter_of_a_tied_embedding_or_of_its_head_unties_them(targets: tuple[str, ...], tmp_path: Path) -> None:
    model, lora = gated_model(tie_word_embeddings=True), LoraSpec(r=3, targets=targets)
    base = write_base(tmp_path / "base", model)
    merged = open_merged(write_adapter(tmp_path / "adapter", model, lora, base))
    assert merged.model == gated_model() and "unties" in merged.edits[-1]
    with torch.no_grad():
        expected = adapted_stage(model, lora, Mesh.single()).module(None, Batch(IDS), "logits")
        found = load_model(merged.model, merged.source)(None, Batch(IDS), "logits")
        assert (found - expected).abs().max() < 2e-5 * expected.abs().max()
    make_job(merged, get_format("native"), tmp_path / "merged", OPTIONS, operation="merge").run(verify="full")
    again = open_checkpoint(tmp_path / "merged")
    vectors, head = (whole_of(again.source, f"{name}.weight") for name in ("embed_tokens", "lm_head"))
    tied = whole_of(open_checkpoint(base).source, "embed_tokens.weight")
    assert np.array_equal(vectors, tied) == ("embed_tokens" not in targets)
    assert np.array_equal(head, tied) == ("lm_head" not in targets)
    make_job(again, get_format("huggingface"), tmp_path / "hf", OPTIONS, operation="export").run()
    assert compare_logits(merged.model, merged.source, tmp_path / "hf").difference < 1e-4


def whole_of(source: TensorSource, name: str) -> np.ndarray:
    return source.read(name, Box.whole(source.schema[name].shape))


def test_the_sum_is_taken_in_fp32_and_rounded_once(tmp_path: Path) -> None:
    model = gated_model()
    base = open_checkpoint(write_base(tmp_path / "base", model))
    adapter = open_checkpoint(write_adapter(tmp_path / "adapter", model, LORA, base.path))
    narrow = CastSource(base.source, "BF16")
    name = "layers.1.mlp.down_proj.weight"
    whole = Box.whole(base.source.schema[name].shape)
    found = as_float32(MergedSource(narrow, adapter.source, model, LORA).read(name, whole), "BF16")
    a, b = (adapter.source.read(f"layers.1.mlp.down_proj.lora_{f}.weight", Box.whole(s)) for f, s in factors(adapter))
    exact = as_float32(narrow.read(name, whole), "BF16").astype(np.float64) + LORA.scaling * b.astype(np.float64) @ a
    assert np.abs(found - exact).max() <= np.abs(exact).max() * 2**-8
    half_ulp = np.abs(exact) * 2**-8
    assert (np.abs(found - exact) <= half_ulp + 1e-6).all()


def factors(adapter: object) -> list[tuple[str, tuple[int, ...]]]:
    schema = adapter.source.schema  # type: ignore[attr-defined]
    return [(f, schema[f"layers.1.mlp.down_proj.lora_{f}.weight"].shape) for f in "AB"]


def test_any_box_of_a_merged_weight_is_that_part_of_the_whole(tmp_path: Path) -> None:
    model = gated_model()
    base = write_base(tmp_path / "base", model)
    source = open_merged(write_adapter(tmp_path / "adapter", model, LORA, base)).source
    name = "layers.0.self_attn.o_proj.weight"
    whole = source.read(name, Box.whole(source.schema[name].shape))
    box = Box((5, 8), (11, 9))
    np.testing.assert_allclose(source.read(name, box), whole[box.slices], rtol=0, atol=1e-6)


def write_at_layout(folder: Path, model: ModelConfig, layout: ParallelLayout) -> None:
    mesh = Mesh.create(layout, torch.device("cpu"))
    write_base(folder / "base", model, mesh)
    mesh.world.barrier()
    write_adapter(folder / "adapter", model, LORA, folder / "base", mesh)


@pytest.mark.parametrize(
    "layout", [ParallelLayout(tp=4), ParallelLayout(tp=2, pp=2), ParallelLayout(tp=2, dp=2)], ids=str
)
def test_adapters_saved_at_any_layout_are_the_same_and_merge_into_the_same_checkpoint(
    layout: ParallelLayout, tmp_path: Path
) -> None:
    model = gated_model(tie_word_embeddings=True)
    base = write_base(tmp_path / "one" / "base", model)
    one = write_adapter(tmp_path / "one" / "adapter", model, LORA, base)
    run_ranks(layout.world_size, write_at_layout, tmp_path, model, layout)
    there = open_checkpoint(tmp_path / "adapter")
    assert dict(there.fingerprints) == dict(open_checkpoint(one).fingerprints)
    assert base_fingerprint(open_checkpoint(base)) == base_fingerprint(open_checkpoint(tmp_path / "base"))
    merged = open_merged(one, base=tmp_path / "base")
    options = JobOptions(layout=ParallelLayout(tp=2, pp=2), optimizer="drop")
    make_job(merged, get_format("native"), tmp_path / "merged", options, operation="merge").run(verify="full")
    again = open_checkpoint(tmp_path / "merged")
    assert again.adapter is None and set(again.source.schema) == set(logical_tensors(model, "F32"))


def test_an_adapter_is_resharded_as_an_adapter(tmp_path: Path) -> None:
    model = gated_model(num_labels=2)
    base = write_base(tmp_path / "base", gated_model())
    adapter = open_checkpoint(write_adapter(tmp_path / "adapter", model, LORA, base))
    options = JobOptions(layout=ParallelLayout(tp=4, pp=2))
    make_job(adapter, get_format("native"), tmp_path / "cut", options, operation="reshard").run(verify="full")
    again = open_checkpoint(tmp_path / "cut")
    assert again.adapter == adapter.adapter and dict(again.fingerprints) == dict(adapter.fingerprints)
    assert len(again.source.chunks("layers.0.self_attn.o_proj.lora_A.weight")) == 4
    assert len(again.source.chunks("layers.0.self_attn.o_proj.lora_B.weight")) == 1


def test_another_base_is_refused_by_its_weights(tmp_path: Path) -> None:
    model = gated_model()
    adapter = write_adapter(tmp_path / "adapter", model, LORA, write_base(tmp_path / "base", model))
    other = write_base(tmp_path / "other", gated_model(initializer_range=0.1))
    with pytest.raises(CheckpointError, match=r"trained on weights with fingerprint \w+, but .*other has \w+"):
        open_merged(adapter, base=other)


def test_a_base_that_is_gone_is_asked_for(tmp_path: Path) -> None:
    model = gated_model()
    base = write_base(tmp_path / "base", model)
    adapter = write_adapter(tmp_path / "adapter", model, LORA, base)
    base.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="say where it is with --base"):
        open_merged(adapter)
    assert open_merged(adapter, base=tmp_path / "moved").model == model


def test_an_adapter_to_a_model_of_another_size_is_refused(tmp_path: Path) -> None:
    model = gated_model()
    adapter = open_checkpoint(write_adapter(tmp_path / "adapter", model, LORA, write_base(tmp_path / "base", model)))
    wide = open_checkpoint(write_base(tmp_path / "wide", gated_model(intermediate_size=64)))
    with pytest.raises(ConversionError, match=r"down_proj.* has shape \[32, 64\], not \[32, 48\]|up_proj|gate_proj"):
        MergedSource(wide.source, adapter.source, model, LORA)


def test_an_adapter_by_itself_is_not_written_as_a_model(tmp_path: Path) -> None:
    model = gated_model()
    adapter = open_checkpoint(write_adapter(tmp_path / "adapter", model, LORA, write_base(tmp_path / "base", model)))
    options = JobOptions(layout=ParallelLayout(), optimizer="drop")
    with pytest.raises(ConversionError, match="merge it first"):
        make_job(adapter, get_format("huggingface"), tmp_path / "out", options, operation="export")
