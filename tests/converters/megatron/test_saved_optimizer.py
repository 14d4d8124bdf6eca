"""Optimizer state in Megatron's rank folders, without megatron-core: what is written, refused, and found damaged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from converters.format import MegatronRun, OpenedCheckpoint
from converters.job import JobOptions, make_job
from converters.open import get_format, open_checkpoint
from tests.helpers.checkpoints import RUN, MemorySource, random_arrays, random_source, tiny_model, write_native
from tests.helpers.models import grouped_model
from workbench.cli.main import main
from workbench.errors import CheckpointError, ConversionError
from workbench.spec.geometry import LogicalTensor
from workbench.spec.layout import ParallelLayout


def opened(changes: Callable[[dict[str, LogicalTensor]], Any] = lambda schema: None, **said: Any) -> OpenedCheckpoint:
    """A run in memory after `changes` of its schema."""
    schema = dict(random_source(tiny_model(), "F32").schema)
    changes(schema)
    source = MemorySource(schema, random_arrays(schema))
    return OpenedCheckpoint("native", Path("run"), source, tiny_model(), training=replace(RUN, **said))


def export(run: OpenedCheckpoint, path: Path, layout: ParallelLayout, megatron: MegatronRun | None = None) -> Path:
    """Exports a run from the disk, where full verification reads it a second time."""
    assert isinstance(run.source, MemorySource)
    native = write_native(path.with_name("native"), run.source, run.model, training=run.training)
    options = JobOptions(layout, megatron=megatron or MegatronRun())
    job = make_job(open_checkpoint(native), get_format("megatron"), path, options, operation="export")
    job.run(verify="full")
    return path


def test_a_rank_has_its_groups_in_the_order_of_its_modules_and_its_weights_are_the_masters(tmp_path: Path) -> None:
    export(opened(), tmp_path / "out", ParallelLayout(tp=2, pp=2))
    assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text() == "100"
    file = tmp_path / "out" / "iter_0000100" / "mp_rank_01_001" / "model_optim_rng.pt"
    state = torch.load(file, weights_only=False)
    assert (state["iteration"], state["args"].consumed_train_samples) == (100, 800)
    assert state["opt_param_scheduler"]["num_steps"] == 800
    matrices, norms = state["optimizer"]["optimizer"]["param_groups"]
    names = [name for name, tensor in state["model"].items() if tensor is not None]
    assert (len(matrices["params"]), len(norms["params"])) == (9, 5)  # two layers and the copy of the embedding
    assert [matrices["weight_decay"], norms["weight_decay"], norms["step"]] == [0.1, 0.0, 98]
    masters = [master for group in state["optimizer"]["fp32_from_fp16_params"] for master in group]
    model = [state["model"][name] for name in sorted(names, key=lambda name: state["model"][name].dim() == 1)]
    assert [m.data_ptr() for m in masters] == [m.data_ptr() for m in model]
    shapes = [state["optimizer"]["state"][number]["exp_avg"].shape for number in range(14)]
    assert shapes == [m.shape for m in masters]


def test_experts_have_an_optimizer_of_their_own_and_a_bias_that_is_not_trained_has_no_state(tmp_path: Path) -> None:
    model = grouped_model(moe={"shared_expert_gate": False, "n_group": 1, "topk_group": 1})
    source = random_source(model, "F32")
    run = OpenedCheckpoint("native", Path("run"), source, model, training=RUN)
    path = export(run, tmp_path / "out", ParallelLayout(tp=2, pp=2, ep=2, dp=2))
    state = torch.load(path / "iter_0000100" / "mp_rank_00_000_001" / "model_optim_rng.pt", weights_only=False)[
        "optimizer"
    ]
    assert [len(one["param_groups"]) for one in state] == [2, 1]
    assert len(state[1]["state"]) == 8 // 2 * 2  # two matrices of each of four experts in one sparse layer
    assert open_checkpoint(path).source.schema.keys() == source.schema.keys()


def test_the_first_of_those_that_share_out_the_state_saves_it_in_flat_buffers(tmp_path: Path) -> None:
    model = grouped_model(moe={"shared_expert_gate": False, "n_group": 1, "topk_group": 1})
    source = random_source(model, "F32")
    run = OpenedCheckpoint("native", Path("run"), source, model, training=RUN)
    layout = ParallelLayout(tp=2, ep=2, dp=2, etp=1, sequence_parallel=True)
    export(run, tmp_path / "out", layout, MegatronRun(distributed_optimizer=True))
    found = {
        rank: torch.load(tmp_path / "out" / "iter_0000100" / rank / "distrib_optim.pt")
        for rank in ("mp_rank_00_000", "mp_rank_01_001")
    }
    for rest, experts in found.values():
        for state in (rest, experts):
            tensors = state[0][torch.bfloat16, torch.float32]
            assert state["buckets_coalesced"] is True and len(state[0]) == 5
            assert {len(tensors[kind]) for kind in ("param", "exp_avg", "exp_avg_sq")} == {tensors["numel_unpadded"]}
            assert {same["param"].data_ptr() for same in state[0].values()} == {tensors["param"].data_ptr()}
    path = tmp_path / "out" / "iter_0000100" / "mp_rank_01_001" / "model_optim_rng.pt"
    state = torch.load(path, weights_only=False)
    assert [set(one) for one in state["optimizer"]] == [{"optimizer"}, {"optimizer"}]
    assert [group["step"] for group in state["optimizer"][0]["optimizer"]["param_groups"]] == [98, 98]
    assert (state["args"].use_distributed_optimizer, state["args"].overlap_grad_reduce) == (True, False)


def test_replicas_that_do_not_lead_save_no_state(tmp_path: Path) -> None:
    model = grouped_model(moe={"shared_expert_gate": False, "n_group": 1, "topk_group": 1})
    run = OpenedCheckpoint("native", Path("run"), random_source(model, "F32"), model, training=RUN)
    layout = ParallelLayout(tp=2, ep=2, dp=2)
    export(run, tmp_path / "out", layout, MegatronRun(distributed_optimizer=True))
    rest, experts = torch.load(tmp_path / "out" / "iter_0000100" / "mp_rank_00_001" / "distrib_optim.pt")
    assert rest is None and set(experts) == {"buckets_coalesced", 0}


def test_a_buffer_of_several_types_that_differ_is_refused(tmp_path: Path) -> None:
    path = export(opened(), tmp_path / "out", ParallelLayout(), MegatronRun(distributed_optimizer=True))
    file = path / "iter_0000100" / "mp_rank_00" / "distrib_optim.pt"
    state = torch.load(file)
    state[0][torch.float32, torch.float32]["exp_avg"] = state[0][torch.float32, torch.float32]["exp_avg"].clone()
    torch.save(state, file)
    assert "buffer 0 holds 5 sets of tensors, not one" in str(open_checkpoint(path).optimizer_fault)


def test_a_loss_scale_that_was_counted_down_is_told(tmp_path: Path) -> None:
    scale = {"value": 512.0, "finite_steps": 7, "skipped_steps": 0}
    path = export(opened(optimizer={**RUN.optimizer, "loss_scale": scale}), tmp_path / "out", ParallelLayout())
    file = path / "iter_0000100" / "mp_rank_00" / "model_optim_rng.pt"
    state = torch.load(file, weights_only=False)
    scaler = state["optimizer"]["grad_scaler"]
    assert (scaler["scale"].tolist(), scaler["growth_tracker"], scaler["hysteresis_tracker"]) == ([512.0], 7, 2)
    assert "left out: hysteresis_tracker" not in open_checkpoint(path).info
    scaler["hysteresis_tracker"] = 1
    torch.save(state, file)
    found = open_checkpoint(path)
    assert found.info["left out: hysteresis_tracker"] == "1: the loss scale is lowered at once here"
    assert found.training is not None and found.training.optimizer["loss_scale"] == scale


def without(*names: str) -> Callable[[dict[str, LogicalTensor]], Any]:
    return lambda schema: [schema.pop(name) for name in names]


def muon(schema: dict[str, LogicalTensor]) -> None:
    schema["optim.momentum/norm.weight"] = schema.pop("optim.exp_avg/norm.weight")


def halves(schema: dict[str, LogicalTensor]) -> None:
    schema["norm.weight"] = LogicalTensor("norm.weight", schema["norm.weight"].shape, "BF16")


@pytest.mark.parametrize("format", ["megatron", "megatron_dist"])
@pytest.mark.parametrize(
    ("source", "said"),
    [
        (opened(without("optim.exp_avg/norm.weight")), "'norm.weight' has not both moments of Adam"),
        (
            opened(without("optim.exp_avg/norm.weight", "optim.exp_avg_sq/norm.weight")),
            "'norm.weight' has not both moments of Adam",
        ),
        (opened(muon), "'optim.momentum/norm.weight' has no place in Megatron's Adam"),
        (opened(halves), "norm.weight is BF16: Megatron's optimizer keeps 32-bit masters"),
        (opened(optimizer={}), "does not say betas, eps, weight_decay of its optimizer"),
    ],
    ids=["one moment", "no moments", "muon", "16 bits", "no rates"],
)
def test_what_megatrons_adam_does_not_have_is_refused(
    source: OpenedCheckpoint, said: str, format: str, tmp_path: Path
) -> None:
    with pytest.raises(ConversionError, match=said):
        make_job(source, get_format(format), tmp_path / "out", JobOptions(ParallelLayout()), operation="export")


def test_export_keeps_the_optimizer_unless_it_is_dropped(tmp_path: Path) -> None:
    write_native(tmp_path / "native", random_source(tiny_model(), "F32"), tiny_model(), training=RUN)
    native, kept, bare = (str(tmp_path / name) for name in ("native", "kept", "bare"))
    assert main(["export", native, kept, "--to", "megatron", "--tp", "2", "-q"]) == 0
    assert main(["verify", native, kept, "-q"]) == 0
    assert main(["export", native, bare, "--to", "megatron", "--optimizer", "drop", "-q"]) == 0
    assert (tmp_path / "bare" / "release").is_dir()


def damaged(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(optimizer: dict[str, Any]) -> None:
        *path, last = key.split(".")
        for one in (optimizer, optimizer["optimizer"]):
            target: Any = one
            for step in path:
                target = target[int(step)] if step.isdigit() else target[step]
            target[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (damaged("param_groups.0.params", 3), "TypeError"),
        (damaged("param_groups.0.params", [0]), "group 0 of the optimizer has 1 parameters, but 17"),
        (damaged("state", {5: {}}), "KeyError: 0"),
        (damaged("state", {0: 7}), "AttributeError"),
        (damaged("param_groups", [3]), "TypeError"),
        (damaged("param_groups.0.step", "x"), "'x' where a number should be"),
        (damaged("param_groups.0.eps", float("nan")), "nan where a number should be"),
    ],
)
def test_state_that_is_not_built_as_megatron_builds_it_is_refused(
    change: Callable[[Mapping[str, Any]], None], said: str, tmp_path: Path
) -> None:
    path = export(opened(), tmp_path / "out", ParallelLayout())
    file = path / "iter_0000100" / "mp_rank_00" / "model_optim_rng.pt"
    state = torch.load(file, weights_only=False)
    change(state["optimizer"])
    torch.save(state, file)
    with pytest.raises((ConversionError, CheckpointError), match=said):
        found = open_checkpoint(path)
        make_job(found, get_format("native"), tmp_path / "again", JobOptions(ParallelLayout()), operation="import")
