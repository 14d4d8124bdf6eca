"""Rank folders of Megatron."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from converters.megatron.ranks import Rank, RankGrid, rank_grid
from workbench.errors import CheckpointError

DEGREES = st.integers(1, 4)
GRIDS = st.builds(lambda times, pp, ep, etp: RankGrid(times * etp, pp, ep, etp), DEGREES, DEGREES, DEGREES, DEGREES)


@given(GRIDS)
def test_a_folder_names_the_rank_that_it_was_named_for(grid: RankGrid) -> None:
    for rank in grid.saving():
        assert grid.rank(grid.folder(rank)) == rank
    assert len({grid.folder(rank) for rank in grid.saving()}) == len(grid.saving())


@given(GRIDS)
def test_the_ranks_that_save_hold_each_part_of_the_model(grid: RankGrid) -> None:
    """As Megatron numbers them: tensor ranks fastest; for experts, expert tensor ranks fastest, then expert ranks."""
    saving = grid.saving()
    assert {(rank.stage, rank.tp_rank) for rank in saving} == {(s, t) for s in range(grid.pp) for t in range(grid.tp)}
    held = {(rank.stage, rank.ep_rank, rank.tp_rank % grid.etp) for rank in saving}
    assert held == {(s, e, t) for s in range(grid.pp) for e in range(grid.ep) for t in range(grid.etp)}


@given(GRIDS, st.integers(1, 3))
def test_every_rank_of_a_run_of_any_size_finds_its_folder(grid: RankGrid, times: int) -> None:
    numbers = range(times * math.lcm(grid.tp, grid.etp * grid.ep))
    positions = {(number // grid.etp % grid.ep, number % grid.tp) for number in numbers}
    assert {(rank.ep_rank, rank.tp_rank) for rank in grid.loading() if rank.stage == 0} == positions
    assert {*grid.saving()} <= {*grid.loading()}


@given(GRIDS)
def test_one_rank_leads_those_that_share_out_the_state_of_the_same_parameters(grid: RankGrid) -> None:
    """Among neighbours in the order of Megatron's ranks, the first that holds these parameters."""
    first = {experts: [r for r in grid.loading() if grid.leads(r, experts=experts)] for experts in (False, True)}
    assert sorted((r.stage, r.tp_rank) for r in first[False]) == [
        (s, t) for s in range(grid.pp) for t in range(grid.tp)
    ]
    held = sorted((r.stage, r.ep_rank, r.tp_rank % grid.etp) for r in first[True])
    assert held == [(s, e, t) for s in range(grid.pp) for e in range(grid.ep) for t in range(grid.etp)]


def test_two_numbers_are_a_stage_or_an_expert_rank_as_the_args_say() -> None:
    assert RankGrid(2, 2, 1, 2).rank("mp_rank_01_001") == Rank(stage=1, ep_rank=0, tp_rank=1)
    assert RankGrid(2, 1, 2, 2).rank("mp_rank_01_001") == Rank(stage=0, ep_rank=1, tp_rank=1)
    assert RankGrid(2, 2, 2, 2).rank("mp_rank_01_000_001") == Rank(stage=0, ep_rank=1, tp_rank=1)
    assert RankGrid(2, 2, 2, 2).rank("mp_rank_01_001") is None
    assert RankGrid(2, 1, 1, 2).rank("mp_rank_02") is None


def test_all_missing_and_strange_folders_are_named_with_what_the_args_say() -> None:
    grid = RankGrid(2, 2, 1, 2)
    found = ["mp_rank_00_000", "mp_rank_01_001", "mp_rank_03_000"]
    said = "tp=2 pp=2 ep=1, that is 4 folders from mp_rank_00_000 to mp_rank_01_001, but mp_rank_01_000 is missing"
    with pytest.raises(CheckpointError, match=said + ", mp_rank_00_001 is missing, mp_rank_03_000 is none of them"):
        grid.find(found, "iter_0000001")
    found = ["mp_rank_01_001", "mp_rank_00_000", "mp_rank_01_000", "mp_rank_00_001"]
    assert list(grid.find(found, "").values()) == ["mp_rank_00_000", "mp_rank_01_000", "mp_rank_00_001", found[0]]


def test_experts_that_ranks_wrote_over_each_other_are_refused() -> None:
    with pytest.raises(CheckpointError, match="expert_tensor_parallel_size=2 does not divide tensor_model_parallel"):
        rank_grid({"tensor_model_parallel_size": 1, "expert_tensor_parallel_size": 2}, "")


def test_the_tensor_degree_of_old_checkpoints_has_its_old_name() -> None:
    assert rank_grid({"model_parallel_size": 4}, "") == RankGrid(4, 1, 1, 4)


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "2", 1 << 40])
def test_a_degree_that_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(CheckpointError, match=re.escape(f"tensor_model_parallel_size={value!r}")):
        rank_grid({"tensor_model_parallel_size": value}, "")
