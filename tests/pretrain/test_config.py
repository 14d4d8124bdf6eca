"""A configuration that cannot run is refused with both values, before anything starts."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import ValidationError

from pretrain.config import EngineConfig, ParallelTable, PretrainConfig
from pretrain.execution import choose_executor
from pretrain.presets import PRESETS
from pretrain.schedules import schedules
from tests.helpers.models import answering_model, gated_model, masked_model
from tests.pretrain.models import tiny_config, tiny_model
from workbench.errors import LaunchError, LayoutError
from workbench.spec.layout import ParallelLayout
from workbench.spec.model import ModelConfig

VALUES: dict[str, Any] = {
    "model": dict(PRESETS["llama-tiny"]),
    "data": {"train": "corpus"},
    "run": {"steps": 100},
}


def config_with(**tables: dict[str, Any]) -> PretrainConfig:
    return PretrainConfig.model_validate({**VALUES, **{k: {**VALUES.get(k, {}), **v} for k, v in tables.items()}})


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"run": {"steps": None}}, "the run has no end; give steps, tokens or seconds"),
        ({"batch": {"seq_len": 513}}, "batch.seq_len=513 is longer than model.max_position_embeddings=512"),
        (
            {"batch": {"global_size": 20, "micro_size": 8}, "parallel": {"dp": 2}},
            "batch.global_size=20 is not a multiple of dp=2 x batch.micro_size=8; use 16",
        ),
        ({"parallel": {"dp": 0}}, "must be at least 1 or 'auto', not 0"),
        (
            {"parallel": {"schedule": "zigzag"}},
            "no schedule is called 'zigzag'; there are 1f1b, dualpipev, gpipe, interleaved",
        ),
        ({"optim": {"lr": 1e-4, "min_lr": 1e-3}}, "min_lr=0.001 is above lr=0.0001"),
        ({"optim": {"betas": [0.9, 1.0]}}, "each must be at least 0 and below 1"),
        ({"optim": {"warmup": 101}}, "optim.warmup=101 is longer than the run of 100 steps"),
        ({"model": {"num_labels": 3}}, "model.num_labels=3, but pretraining needs the language-model head"),
        ({"precision": {"compute": "fp8"}}, "'fp32', 'bf16' or 'fp16'"),
    ],
)
def test_what_does_not_fit_together_is_named_with_its_values(tables: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        config_with(**tables)
    assert message in str(caught.value)


def test_several_faults_are_told_at_once() -> None:
    with pytest.raises(ValidationError, match=r"seq_len=600.*; .*warmup=900"):
        config_with(batch={"seq_len": 600}, optim={"warmup": 900})


def test_an_automatic_data_parallel_degree_takes_the_ranks_that_are_left() -> None:
    table = ParallelTable(tp=2, pp=2)
    assert (table.num_ranks(), table.layout(12).dp) == (4, 3)
    with pytest.raises(LayoutError, match="6 ranks were given, but tp=2 x pp=2 needs a multiple of 4"):
        table.layout(6)
    with pytest.raises(LayoutError, match="4 ranks were given, but tp=1 x pp=1 x dp=3 needs 3"):
        ParallelTable(dp=3).layout(4)


@pytest.mark.parametrize(
    ("tables", "ranks", "message"),
    [
        ({"precision": {"loss_scale": 512.0}}, 1, "precision.loss_scale=512 is for compute='fp16', not 'fp32'"),
        (
            {"precision": {"grad_reduce": "bf16"}, "parallel": {"shard": "zero1"}},
            2,
            "precision.grad_reduce='bf16' with shard='zero1' would sum 2 microbatches in bf16 as well",
        ),
        (
            {
                "precision": {"grad_reduce": "bf16"},
                "batch": {"micro_size": 1},
                "parallel": {"shard": "zero2", "shard_size": 2},
            },
            4,
            "with shard='zero2', shard_size=2 would sum 2 microbatches in bf16 as well; use shard = 'zero2'",
        ),
    ],
)
def test_number_formats_that_do_not_fit_the_layout_are_refused(
    tables: dict[str, Any], ranks: int, message: str
) -> None:
    with pytest.raises(LayoutError, match=re.escape(message)):
        tiny_config("run", **tables).resolve_layout(tiny_model(), ranks)


@pytest.mark.parametrize(
    ("tables", "ranks"),
    [
        ({"precision": {"loss_scale": 512.0, "compute": "fp16"}}, 1),
        ({"precision": {"grad_reduce": "bf16"}}, 1),
        ({"precision": {"grad_reduce": "bf16"}}, 4),  # one microbatch
        ({"precision": {"grad_reduce": "bf16"}, "parallel": {"shard": "zero3"}}, 2),
    ],
)
def test_number_formats_that_fit_the_layout_are_accepted(tables: dict[str, Any], ranks: int) -> None:
    assert tiny_config("run", **tables).resolve_layout(tiny_model(), ranks).dp == ranks


def test_layout_and_batch_faults_come_in_one_message() -> None:
    config = tiny_config("run", parallel={"tp": 3})
    with pytest.raises(LayoutError, match=r"num_attention_heads=4 cannot be split over tp=3.*global_size=8 is not"):
        config.resolve_layout(tiny_model(), 9)


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"schedule": "1f1b", "vpp": 2}, "schedule='1f1b' gives each stage 1 chunk of layers, not vpp=2; use vpp = 1"),
        ({"schedule": "zbv"}, "schedule='zbv' gives each stage 2 chunks of layers, not vpp=1; use vpp = 2"),
        ({"schedule": "dualpipev", "vpp": 4}, "'dualpipev' gives each stage 2 chunks of layers, not vpp=4"),
        (
            {"schedule": "interleaved", "vpp": 3, "pp": 1},
            "num_hidden_layers=4 cannot be split evenly over pp=1 x vpp=3; use a pp x vpp that divides 4 (1, 2, 4)",
        ),
        ({"schedule": "zb_h1"}, "kernels.compile=true and a schedule that splits the backward"),
    ],
)
def test_a_schedule_that_cannot_run_is_refused_before_any_rank_starts(parallel: dict[str, Any], message: str) -> None:
    config = tiny_config("run", parallel={"pp": 2, **parallel}, kernels={"compile": True})
    with pytest.raises(LayoutError) as caught:
        config.resolve_layout(tiny_model(), config.parallel.num_ranks())
    assert message in str(caught.value)
    assert "placement" not in str(caught.value)


def test_the_description_of_the_schedule_names_every_schedule() -> None:
    described = ParallelTable.model_fields["schedule"].description
    assert described is not None
    for name, schedule in schedules().items():
        vpp = "any vpp" if schedule.num_chunks is None else f"vpp = {schedule.num_chunks}"
        group = next(part for part in described.split(";") if name in part.replace(",", " ").replace(".", " ").split())
        assert vpp in group


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"precision": {"linear": "fp8_rowwise"}}, r"gives its results in bf16, but precision.compute='fp32'"),
        (
            {"precision": {"compute": "bf16", "linear": "fp8_tensorwise"}, "parallel": {"tp": 2}},
            r"multiples of 16, but on each of tp=2 ranks .*layers\.\*\.mlp\.down_proj 32 x 24",
        ),
        ({"kernels": {"backend": "te", "compile": True}}, "its kernels are closed to torch.compile"),
        (
            {"precision": {"compute": "bf16", "linear": "te:delayed"}, "recompute": {"mode": "full"}},
            "needs kernels.backend = 'te', not 'torch'",
        ),
        (
            {
                "kernels": {"backend": "auto"},
                "precision": {"compute": "bf16", "linear": "te:delayed"},
                "recompute": {"mode": "full"},
            },
            "would count its largest values twice",
        ),
    ],
)
def test_ways_of_computing_that_do_not_go_together_are_refused(tables: dict[str, Any], message: str) -> None:
    config = tiny_config("run", **tables)
    with pytest.raises(LayoutError, match=message):
        config.resolve_layout(tiny_model(), config.parallel.num_ranks())


def test_activations_cannot_be_moved_off_a_cpu() -> None:
    config = tiny_config("run", recompute={"offload": True})
    with pytest.raises(LaunchError, match=r"this run is on a CPU, where they are already; set offload = false"):
        choose_executor(config, tiny_model(), ParallelLayout(), "cpu")
    assert choose_executor(config, tiny_model(), ParallelLayout(), "cuda").backend == "torch"


def test_a_recipe_of_transformer_engine_leaves_auto_no_choice() -> None:
    config = tiny_config("run", kernels={"backend": "auto"}, precision={"compute": "bf16", "linear": "te:current"})
    with pytest.raises(LaunchError, match="runs on NVIDIA GPUs"):
        choose_executor(config, tiny_model(), ParallelLayout(), "cpu")


def test_documents_apart_are_not_for_transformer_engine_and_auto_takes_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_with(data={"mask_documents": True}, kernels={"backend": "te"})
    with pytest.raises(LayoutError, match="kernels.backend='te' and rows of several documents"):
        config.resolve_layout(config.model, 1)
    assert config_with(kernels={"backend": "te"}).resolve_layout(config.model, 1).world_size == 1
    monkeypatch.setattr("workbench.parallel.backends.find_spec", lambda name: object())
    auto = config_with(data={"mask_documents": True}, kernels={"backend": "auto"})
    choice = choose_executor(auto, auto.model, auto.resolve_layout(auto.model, 1), "cuda")
    assert choice.backend == "torch" and "rows of several documents (data.mask_documents" in choice.reason


@pytest.mark.parametrize(
    ("parallel", "model", "message"),
    [
        (
            {"sequence_parallel": True, "cp": 2},
            {},
            "sequence_parallel shares tokens between tensor ranks, but tp=1; raise tp or drop it",
        ),
        ({"cp": 4}, {}, "batch.seq_len=12 is not a multiple of 8 (2 chunks for each of cp=4); use 16"),
        (
            {"cp": 2, "tp": 2, "sequence_parallel": True},
            {},
            "batch.seq_len=12 is not a multiple of 8 (2 chunks for each of cp=2 x tp=2 with sequence_parallel); use 16",
        ),
        (
            {"cp": 2, "context": "ring"},
            {"attention_dropout": 0.1},
            "context='ring' computes no attention_dropout=0.1; use context = 'all_gather' or attention_dropout = 0",
        ),
    ],
)
def test_tokens_that_ranks_cannot_share_are_refused(
    parallel: dict[str, Any], model: dict[str, Any], message: str
) -> None:
    config = tiny_config("run", parallel=parallel)
    with pytest.raises(LayoutError) as caught:
        config.resolve_layout(tiny_model(**model), config.parallel.num_ranks())
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("run", "steps"),
    [({"steps": 7}, 7), ({"tokens": 1000}, 11), ({"steps": 7, "tokens": 100}, 2), ({"seconds": 1}, None)],
)
def test_the_first_bound_ends_the_run(run: dict[str, Any], steps: int | None) -> None:
    config = EngineConfig.model_validate({"run": run, "batch": {"global_size": 8, "micro_size": 8, "seq_len": 12}})
    assert config.planned_steps() == steps


@pytest.mark.parametrize(
    ("model", "data", "words"),
    [
        (masked_model(next_sentence=False), {}, "data.objective='causal' for a model with causal=false"),
        (gated_model(), {"objective": "masked"}, "data.objective='masked' for a model with causal=true"),
        (answering_model(), {"objective": "masked"}, "for a model with num_encoder_layers=2.*use objective = 'span'"),
        (masked_model(), {"objective": "masked"}, "data.next_sentence=false, but model.next_sentence=true"),
        (
            masked_model(head_transform=False, lm_head_bias=False, next_sentence=False, lm_head=False),
            {"objective": "masked"},
            "model.lm_head=false, but pretraining predicts words",
        ),
    ],
)
def test_an_objective_that_the_model_cannot_learn_is_refused(
    model: ModelConfig, data: dict[str, Any], words: str
) -> None:
    tokenizer = {"tokenizer": "words"} if data else {}
    with pytest.raises(ValidationError, match=words):
        PretrainConfig.model_validate(
            {**VALUES, "model": model, "data": {"train": "x", **tokenizer, **data}, "batch": {"seq_len": 32}}
        )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"next_sentence": True}, "reads the pooler and tells two segments apart"),
        ({"pooler": True}, "pooler=true reads the first token, which sees nothing"),
        ({"num_labels": 2, "lm_head_bias": True}, "lm_head_bias=true belongs to an LM head"),
        ({"position_embedding": "relative"}, "position_embedding='relative' goes with num_encoder_layers"),
        ({"num_encoder_layers": 2}, "position_embedding='rope' does not go with num_encoder_layers=2, only 'relative'"),
        ({"num_encoder_layers": 4, "position_embedding": "relative"}, "leaves no layer of num_hidden_layers=4"),
    ],
)
def test_features_that_need_each_other_are_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        gated_model(**change)
