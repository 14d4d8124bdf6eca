"""The second reader of Megatron's rank folders agrees with the first on every form of them, optimizer included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from converters.format import MegatronRun
from converters.independent.megatron import MegatronFiles
from converters.independent.megatron_dist import MegatronDistFiles
from converters.job import JobOptions, make_job
from converters.open import get_format, open_checkpoint
from tests.converters.formats.test_megatron_old import before_core, flat_experts, grouped_experts, reordered
from tests.helpers.checkpoints import RUN, random_source, tiny_model, write_native
from tests.helpers.megatron_cases import Case
from tests.helpers.megatron_saved import EXPERTS, GPT, LLAMA, State, save
from tests.helpers.models import biased_model, grouped_model, latent_model, sparse_model
from workbench.errors import VerificationError
from workbench.spec.geometry import Box
from workbench.spec.layout import ParallelLayout
from workbench.spec.model import ModelConfig


def assert_agree(folder: Path) -> None:
    opened = open_checkpoint(folder)
    source = opened.source
    reader = {"megatron": MegatronFiles, "megatron_dist": MegatronDistFiles}[opened.format](folder, source)
    for name, tensor in source.schema.items():
        rows = slice(0, tensor.shape[0])
        np.testing.assert_array_equal(reader.read(tensor, rows), source.read(name, Box.whole(tensor.shape)), name)


def as_it_is(state: State) -> State:
    return state


SAVED: dict[str, tuple[Case, Callable[[State], State], float]] = {
    "llama": (Case(LLAMA, tp=2, pp=2), as_it_is, 3),
    "before Megatron-Core, version 0": (Case(GPT, tp=2, pp=2), reordered(0), 0),
    "before Megatron-Core, version 1": (Case(GPT, tp=2), reordered(1.0), 1),
    "before Megatron-Core, version 2": (Case(GPT), before_core, 2),
    "experts one by one": (Case(EXPERTS, tp=2, ep=2), as_it_is, 3),
    "experts in one buffer": (Case(EXPERTS, tp=2, ep=2), flat_experts, 3),
    "experts in groups": (Case(EXPERTS, tp=2, ep=2), grouped_experts, 3),
}


@pytest.mark.parametrize("name", SAVED)
def test_both_read_the_same_from_what_megatrons_have_saved(name: str, tmp_path: Path) -> None:
    case, change, version = SAVED[name]
    assert_agree(save(case, tmp_path / "run", change, version))


EXPORTED: dict[str, tuple[ModelConfig, ParallelLayout]] = {
    "one rank": (tiny_model(), ParallelLayout()),
    "uneven stages": (tiny_model(), ParallelLayout(tp=2, pp=3, pp_layout=(1, 2, 1), vocab_multiple=8)),
    "chunks": (tiny_model(), ParallelLayout(tp=2, pp=2, vpp=2)),
    "tied, biases": (biased_model(tie_word_embeddings=True), ParallelLayout(tp=2, pp=2)),
    "experts": (sparse_model(), ParallelLayout(tp=2, pp=2, ep=2, dp=2)),
    "experts cut otherwise": (sparse_model(), ParallelLayout(tp=2, pp=2, ep=2, dp=2, etp=1, sequence_parallel=True)),
    "shared experts": (
        grouped_model(moe={"shared_expert_gate": False, "n_group": 1, "topk_group": 1}),
        ParallelLayout(tp=2, pp=2, ep=2, dp=2),
    ),
    "latents": (
        latent_model(attention_bias=False, attention_output_bias=False, norm_eps=1e-6),
        ParallelLayout(tp=2),
    ),
}


RUNS = {
    "own layers": MegatronRun(own_layers=True),
    "buffers": MegatronRun(distributed_optimizer=True),
    "buffers of own layers": MegatronRun(own_layers=True, distributed_optimizer=True),
}


def exported(tmp_path: Path, name: str, target: str, dtype: str, run: MegatronRun) -> Path:
    model, layout = EXPORTED[name]
    write_native(tmp_path / "a", random_source(model, dtype, optimizer=dtype == "F32"), model, training=RUN)
    options = JobOptions(layout, megatron=run)
    job = make_job(open_checkpoint(tmp_path / "a"), get_format(target), tmp_path / "b", options, operation="test")
    job.run(verify="full")
    return tmp_path / "b"


@pytest.mark.parametrize("name", EXPORTED)
@pytest.mark.parametrize(("target", "dtype"), [("megatron", "F32"), ("megatron", "BF16"), ("megatron_dist", "F32")])
def test_both_read_the_same_from_what_is_exported(name: str, target: str, dtype: str, tmp_path: Path) -> None:
    assert_agree(exported(tmp_path, name, target, dtype, MegatronRun()))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", EXPORTED)
@pytest.mark.parametrize("run", RUNS)
def test_both_read_the_same_from_what_is_exported_for_other_runs(name: str, run: str, tmp_path: Path) -> None:
    assert_agree(exported(tmp_path, name, "megatron", "F32", RUNS[run]))


def test_buffers_that_are_not_the_same_for_all_types_are_refused(tmp_path: Path) -> None:
    folder = exported(tmp_path, "one rank", "megatron", "F32", RUNS["buffers"])
    source = open_checkpoint(folder).source
    (path,) = folder.glob("iter_*/mp_rank_00/distrib_optim.pt")
    state = torch.load(path)
    tensors = state[0][torch.float32, torch.float32]
    state[0][torch.float32, torch.float32] = {**tensors, "exp_avg": tensors["exp_avg"].clone()}
    torch.save(state, path)
    with pytest.raises(VerificationError, match="buffer 0 of an optimizer is not the same for all types"):
        MegatronFiles(folder, source)
