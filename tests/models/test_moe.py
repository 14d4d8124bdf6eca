"""Mixtures of experts train like one process however experts, their widths, tokens and layers are spread."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from pretrain.config import OptimTable
from pretrain.flops import flops_per_token
from pretrain.trainer import Trainer
from tests.helpers.models import gated_model, grouped_model, sparse_model
from tests.helpers.parity import SAMPLES, Observed, assert_observed, exhaustive, train_three_steps
from tests.helpers.ranks import run_ranks
from tests.pretrain.models import VOCAB, Noise, mesh_of, tiny_config, tiny_subject
from tests.pretrain.test_trainer import Recorder
from workbench.checkpoint.manifest import read_manifest
from workbench.cli.main import main
from workbench.errors import ConfigError
from workbench.spec.execution import StageOptions, execution_faults
from workbench.spec.layout import ParallelLayout
from workbench.spec.lora import LoraSpec, adapted_pairs, resolved_targets
from workbench.spec.model import ModelConfig
from workbench.spec.schema import num_active_parameters, num_parameters

MODELS = {"softmax": sparse_model(), "grouped": grouped_model()}
OPTIONS = {
    "plain": StageOptions(),
    "full": StageOptions(recompute="full"),
    "selective": StageOptions(recompute="selective", loss_chunk_tokens=5),
}


@cache
def reference(model: str, documents: bool = False) -> Observed:
    return train_three_steps(MODELS[model], ParallelLayout(), "gpipe", 1, documents)


@pytest.mark.parametrize(
    ("model", "layout", "schedule", "options"),
    [
        ("softmax", {"tp": 2}, "gpipe", "plain"),
        ("softmax", {"tp": 2, "sequence_parallel": True, "etp": 1}, "gpipe", "selective"),
        ("grouped", {"cp": 2, "ep": 2}, "gpipe", "full"),
        ("grouped", {"pp": 2}, "zb_h1", "plain"),
        ("grouped", {"dp": 4, "ep": 2, "shard": "zero3"}, "gpipe", "plain"),
        *exhaustive(
            ("softmax", {"dp": 2, "ep": 2}, "gpipe", "plain"),
            ("grouped", {"tp": 2, "sequence_parallel": True}, "gpipe", "full"),
            ("softmax", {"dp": 2, "ep": 2, "pp": 2}, "1f1b", "full"),
            ("softmax", {"dp": 4, "ep": 2, "shard": "zero1"}, "gpipe", "selective"),
            ("softmax", {"dp": 4, "ep": 2}, "gpipe", "plain"),
            ("grouped", {"dp": 2, "cp": 2, "ep": 4, "shard": "zero2"}, "gpipe", "plain"),
            ("grouped", {"tp": 2, "cp": 2, "ep": 2}, "gpipe", "plain"),
            ("softmax", {"tp": 2, "dp": 2, "ep": 2, "sequence_parallel": True, "etp": 1}, "gpipe", "plain"),
            ("grouped", {"tp": 2, "pp": 2, "dp": 2, "ep": 2, "sequence_parallel": True}, "zb_h1", "selective"),
        ),
    ],
    ids=str,
)
def test_experts_spread_over_ranks_train_like_one_process(
    model: str, layout: dict[str, Any], schedule: str, options: str
) -> None:
    cut = ParallelLayout(**layout)
    seen = run_ranks(cut.world_size, train_three_steps, MODELS[model], cut, schedule, 1, False, OPTIONS[options])
    assert_observed(seen, reference(model))


@pytest.mark.parametrize("layout", [{"dp": 2, "ep": 2}, {"tp": 2, "dp": 2, "ep": 2, "shard": "zero2"}], ids=str)
def test_muon_sees_each_expert_whole(layout: dict[str, Any]) -> None:
    muon, cut = OptimTable(name="muon", lr=1e-2, clip=1.0), ParallelLayout(**layout)
    alone = train_three_steps(MODELS["softmax"], ParallelLayout(), "gpipe", 1, optim=muon)
    seen = run_ranks(
        cut.world_size, train_three_steps, MODELS["softmax"], cut, "gpipe", 1, False, StageOptions(), SAMPLES, muon
    )
    assert_observed(seen, alone)


def test_documents_and_experts_of_replicas_go_together() -> None:
    cut = ParallelLayout(cp=2, ep=2)
    seen = run_ranks(2, train_three_steps, MODELS["softmax"], cut, "gpipe", 1, True)
    assert_observed(seen, reference("softmax", documents=True))


@pytest.mark.parametrize("layout", [{"tp": 2}, {"tp": 2, "sequence_parallel": True}, {"cp": 2}], ids=str)
def test_losses_of_routers_are_scaled_by_no_degree(layout: dict[str, Any]) -> None:
    """With weights so large that they are nearly all of the gradient."""
    model = sparse_model(moe={"router_aux_loss_coef": 1e4, "router_z_loss_coef": 1e3})
    alone = train_three_steps(model, ParallelLayout(), "gpipe", 2)
    for seen in run_ranks(2, train_three_steps, model, ParallelLayout(**layout), "gpipe", 2):
        assert seen.norms == pytest.approx(alone.norms, rel=1e-9)


@pytest.mark.parametrize("layout", [{"dp": 2, "ep": 2}, {"dp": 4, "ep": 2, "shard": "zero3"}], ids=str)
def test_the_norm_that_clips_counts_each_expert_once(layout: dict[str, Any]) -> None:
    cut = ParallelLayout(**layout)
    for seen in run_ranks(cut.world_size, train_three_steps, MODELS["grouped"], cut, "gpipe", 1):
        assert seen.norms == pytest.approx(reference("grouped").norms, rel=1e-10)


def train_run(folder: str, layout: dict[str, Any], steps: int, compute: str = "fp64") -> list[dict[str, Any]]:
    """Rows of metrics that rank 0 wrote."""
    model = ModelConfig.model_validate(grouped_model().model_dump() | {"vocab_size": VOCAB})
    config = tiny_config(
        folder,
        run={"steps": steps},
        batch={"micro_size": 1},
        optim={"warmup": 0, "schedule": "constant"},
        precision={"compute": "fp32" if compute == "fp64" else compute},
    )
    recorder, mesh = Recorder(), mesh_of(ParallelLayout(**layout))
    dtype = torch.float64 if compute == "fp64" else torch.float32
    Trainer(config, tiny_subject(model), Noise(held_out=6), mesh, watcher=recorder, dtype=dtype).run()
    return recorder.rows


MOVES = [({"dp": 2, "ep": 2}, {"dp": 4, "ep": 4}), ({"dp": 4, "ep": 2, "shard": "zero3"}, {"tp": 2, "dp": 2, "ep": 2})]


@pytest.mark.parametrize(("before", "after"), MOVES, ids=str)
def test_a_run_goes_on_with_its_experts_dealt_in_another_way(
    before: dict[str, Any], after: dict[str, Any], tmp_path: Path
) -> None:
    whole = train_run(str(tmp_path / "whole"), {}, 4)
    first, second = ParallelLayout(**before), ParallelLayout(**after)
    run_ranks(first.world_size, train_run, str(tmp_path / "moved"), before, 2)
    resharded = tmp_path / "moved/checkpoints/step-00000002"
    again = tmp_path / "again"
    assert main(["reshard", str(resharded), str(again), "--ep", str(8), "--tp", "1", "--verify", "full"]) == 0
    assert read_manifest(again).layout.ep == 8
    back = {name: tensor.fingerprint for name, tensor in read_manifest(again).tensors.items()}
    assert back == {name: tensor.fingerprint for name, tensor in read_manifest(resharded).tensors.items()}
    moved = run_ranks(second.world_size, train_run, str(tmp_path / "moved"), after, 4)[0]
    expected = {row["step"]: row for row in whole if "loss" in row}
    assert moved[-1]["valid/loss"] == pytest.approx(whole[-1]["valid/loss"], rel=1e-9)
    for row in (row for row in moved if "loss" in row):
        for name in ("loss", "grad_norm", "router_aux_loss", "expert_load", "expert_load/3"):
            assert row[name] == pytest.approx(expected[row["step"]][name], rel=1e-9), name


@pytest.mark.parametrize("compute", ["bf16", "fp16"])
def test_experts_train_in_half_the_bits(compute: str, tmp_path: Path) -> None:
    alone = train_run(str(tmp_path / "alone"), {}, 3, compute)
    cut = run_ranks(2, train_run, str(tmp_path / "cut"), {"dp": 2, "ep": 2}, 3, compute)[0]
    for one, other in zip(alone[:-1], cut[:-1], strict=True):
        # A token whose experts are nearly equal may go to another one.
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-2)


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        ({"dp": 2, "ep": 4}, {}, "ep=4 does not divide dp=2 x cp=1; use a ep that divides 2 (1, 2)"),
        ({"dp": 3, "ep": 3}, {}, "num_experts=4 cannot be dealt over ep=3; use a ep that divides 4 (1, 2, 4)"),
        ({"tp": 4, "etp": 2}, {}, "etp=2 is neither 1 nor tp=4; leave it out or set it to 1"),
        (
            {"tp": 2, "etp": 1},
            {},
            "etp=1 with tp=2: without sequence_parallel every tensor rank would compute",
        ),
        ({"dp": 4, "ep": 4, "shard": "zero3", "shard_size": 2}, {}, "shard_size=2 is not a multiple of ep=4"),
        ({"tp": 2}, {"moe": {"moe_intermediate_size": 25}}, "moe_intermediate_size=25 cannot be split over etp=2"),
        ({"dp": 2, "ep": 2}, {"moe": None}, "ep=2: the model has no experts to share; remove them"),
    ],
)
def test_experts_that_cannot_be_spread_are_refused(
    layout: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    model = gated_model() if changes.get("moe", {}) is None else sparse_model(**changes)
    assert any(message in fault for fault in ParallelLayout(**layout).faults(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (StageOptions(compile_blocks=True), "kernels.compile=true and model.moe"),
        (StageOptions(linear="fp8_rowwise"), "precision.linear='fp8_rowwise' and model.moe"),
        (StageOptions(backend="te"), "kernels.backend='te' and model.moe"),
    ],
)
def test_what_does_not_compute_experts_is_refused(options: StageOptions, message: str) -> None:
    assert any(message in fault for fault in execution_faults(options, sparse_model(), ParallelLayout()))


def test_adapters_of_a_model_with_experts_are_named_by_its_projections() -> None:
    everything = resolved_targets(sparse_model(), LoraSpec())
    assert "layers.1.mlp.experts.3.down_proj" in everything and "layers.0.mlp.down_proj" in everything
    layer, query = LoraSpec(targets=("layers.1.*",)), LoraSpec(targets=("q_proj",))
    assert {pair.path for pair in adapted_pairs(sparse_model(), layer, ParallelLayout())} == {
        "layers.1.self_attn.qkv_proj.delta.0",
        "layers.1.self_attn.o_proj.delta.0",
        "layers.1.mlp.experts.up_proj_delta.0",
        "layers.1.mlp.experts.down_proj_delta.0",
    }
    assert all(name.endswith("q_proj") for name in resolved_targets(sparse_model(), query))
    with pytest.raises(ConfigError, match=r"adapted alike, but not those of layers.1.mlp.experts.\*.up_proj"):
        resolved_targets(sparse_model(), LoraSpec(targets=("layers.1.mlp.experts.2.up_proj",)))
    with pytest.raises(ConfigError, match="no magnitudes of experts"):
        resolved_targets(sparse_model(), LoraSpec(dora=True))


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        ({"n_group": 3}, "num_experts=4 cannot be dealt to n_group=3 groups"),
        ({"n_group": 4}, "n_group=4 groups of one expert"),
        ({"n_group": 2, "num_experts_per_tok": 3}, "num_experts_per_tok=3 is more than the 2 experts"),
        ({"bias_update_rate": 0.1}, "bias_update_rate=0.1 needs e_score_correction_bias = true"),
        ({"shared_expert_gate": True}, "shared_expert_gate=true without a shared expert"),
    ],
)
def test_experts_that_make_no_sense_are_refused(moe: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        sparse_model(moe=moe)


def test_a_token_costs_its_own_experts_alone() -> None:
    dense = gated_model(intermediate_size=48, num_hidden_layers=1)
    sparse = sparse_model(num_hidden_layers=1, moe={"mlp_only_layers": ()})
    router = 6 * 32 * 4
    assert flops_per_token(sparse, 16) == flops_per_token(dense, 16) + router
    assert num_parameters(sparse) - num_active_parameters(sparse) == 2 * 3 * 32 * 24
