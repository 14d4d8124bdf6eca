"""Ranks are started, joined, and their first failure is told once."""

from __future__ import annotations

import os
import signal
from contextlib import nullcontext

import pytest
import torch

from workbench.errors import DataError, LaunchError
from workbench.parallel.launch import choose_device, rank_environment, require_devices, run_on_ranks
from workbench.parallel.mesh import Mesh
from workbench.spec.layout import ParallelLayout


def test_started_ranks_form_a_mesh_and_rank_0_answers() -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert run_on_ranks(_sum_of_ranks, 10, nproc=2) == 10 + 0 + 1
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_one_process_needs_no_process_group() -> None:
    assert run_on_ranks(_called_here, nproc=1) == "here"
    assert not torch.distributed.is_initialized()


def test_the_fault_of_a_rank_keeps_its_kind_and_message() -> None:
    with pytest.raises(DataError, match=r"^data/train\.bin is empty$"):
        run_on_ranks(_fail_on_rank_1, True, nproc=2)


def test_a_crash_names_its_rank_and_shows_its_traceback() -> None:
    with pytest.raises(LaunchError, match=r"rank 1 failed(.|\n)*_fail_on_rank_1(.|\n)*ZeroDivisionError"):
        run_on_ranks(_fail_on_rank_1, False, nproc=2)


def test_a_slurm_step_is_recognised_and_its_first_node_becomes_the_meeting_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert rank_environment() is None
    step = {"STEP_NUM_TASKS": "16", "PROCID": "9", "LOCALID": "1", "STEP_NODELIST": "gpu[003-004,7]", "JOB_ID": "41"}
    for name, value in step.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    environment = rank_environment()
    assert environment is not None
    assert (environment.rank, environment.local_rank, environment.world_size) == (9, 1, 16)
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("gpu003", "20041")


def _sum_of_ranks(start: int) -> int:
    mesh = Mesh.create(ParallelLayout(tp=2), torch.device("cpu"))
    return start + int(mesh.tp.all_reduce(torch.tensor(mesh.tp.rank)))


def _called_here() -> str:
    return "here"


def _fail_on_rank_1(known: bool) -> None:
    mesh = Mesh.create(ParallelLayout(tp=2), torch.device("cpu"))
    if mesh.tp.rank == 1:
        if known:
            raise DataError("data/train.bin is empty")
        print(1 // 0)
    mesh.tp.barrier()


@pytest.mark.parametrize(("gpus", "nproc", "is_enough"), [(0, 4, True), (1, 1, True), (4, 4, True), (1, 2, False)])
def test_ranks_are_not_started_on_fewer_gpus_than_they_are(
    monkeypatch: pytest.MonkeyPatch, gpus: int, nproc: int, is_enough: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with (
        nullcontext() if is_enough else pytest.raises(LaunchError, match="2 ranks need 2 GPUs, and this machine has 1")
    ):
        require_devices(nproc)


@pytest.mark.parametrize(("local_rank", "index"), [(None, 0), ("3", 3), ("5", 1)])
def test_each_rank_of_a_machine_takes_a_gpu_of_its_own(
    monkeypatch: pytest.MonkeyPatch, local_rank: str | None, index: int
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    if local_rank is not None:
        for name, value in {"RANK": "7", "WORLD_SIZE": "8", "LOCAL_RANK": local_rank}.items():
            monkeypatch.setenv(name, value)
    assert choose_device() == torch.device("cuda", index)
