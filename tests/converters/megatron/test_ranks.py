"""Rank folders and pipeline stages of Megatron, against its own arithmetic where that can be had."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from converters.megatron.ranks import Rank, RankGrid, layers_per_stage, parallel_layout, parse_layout, rank_grid
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


def arguments(layers: int, pp: int, vpp: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "num_layers": layers,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": vpp if vpp > 1 else None,
        **more,
    }


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (arguments(8, 4), (2, 2, 2, 2)),
        (arguments(8, 2, 2), (2, 2, 2, 2)),
        (arguments(8, 1, 2), (8,)),
        (arguments(9, 3, decoder_first_pipeline_num_layers=1), (1, 4, 4)),
        (arguments(9, 3, decoder_last_pipeline_num_layers=1), (4, 4, 1)),
        (arguments(9, 2, decoder_first_pipeline_num_layers=4, decoder_last_pipeline_num_layers=5), (4, 5)),
        (arguments(10, 3, 2, decoder_first_pipeline_num_layers=2), (1, 2, 2, 1, 2, 2)),
        (arguments(7, 4, account_for_embedding_in_pipeline_split=True), (1, 2, 2, 2)),
        (arguments(7, 4, account_for_loss_in_pipeline_split=True), (2, 2, 2, 1)),
        (
            arguments(6, 4, 2, account_for_embedding_in_pipeline_split=True, account_for_loss_in_pipeline_split=True),
            (0, 1, 1, 1, 1, 1, 1, 0),
        ),
        (arguments(7, 2, 2, pipeline_model_parallel_layout="Et|(tt|)*2,ttL"), (1, 2, 2, 2)),
        (arguments(2, 2, pipeline_model_parallel_layout="E|ttL"), (0, 2)),
    ],
)
def test_layers_lie_on_stages_as_megatron_lays_them(given: dict[str, Any], expected: tuple[int, ...]) -> None:
    assert layers_per_stage(given, "") == expected


@pytest.mark.parametrize(
    "given",
    [
        arguments(7, 2),
        arguments(6, 2, 2),
        arguments(8, 4, decoder_first_pipeline_num_layers=1),
        arguments(2, 3, decoder_first_pipeline_num_layers=4),
        arguments(1, 2, decoder_first_pipeline_num_layers=1, decoder_last_pipeline_num_layers=1),
    ],
)
def test_layers_that_do_not_come_out_even_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=f"num_layers={given['num_layers']} to pipeline_model_parallel_size="):
        layers_per_stage(given, "")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("Et|tXL", "'X' is none of E, t, m, L"),
        ("(t|)*99999999999999", "more than 65536 letters"),
        ("t*99999", "more than 65536 letters"),
        ("ttL|E", "from E to L"),
        ("Et|t|L", "3 stages with 2 layers"),
        ("Et|ttL", "2 stages with 3 layers"),
        (["E", "t"], "is not a text"),
    ],
)
def test_a_layout_that_is_none_is_refused(text: Any, why: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(why)):
        layers_per_stage(arguments(2, 2, pipeline_model_parallel_layout=text), "")


def test_a_layout_is_read_as_megatron_documents_it() -> None:
    assert parse_layout("Et*3|(tt|)*29,m|L") == ("Ettt", *["tt"] * 29, "m", "L")


@given(st.lists(st.sampled_from(["t", "t*3", "|", ",", "(tt|)*2", "(t|tt)*3", "m", "E", "L"]), max_size=12))
def test_a_layout_is_read_as_megatron_reads_it(words: list[str]) -> None:
    layouts = pytest.importorskip("megatron.core.transformer.pipeline_parallel_layer_layout")
    text = "".join(words)
    letters = {"embedding": "E", "decoder": "t", "mtp": "m", "loss": "L"}
    theirs = layouts.PipelineParallelLayerLayout.parse_str_to_list(text)
    assert parse_layout(text) == tuple("".join(letters[kind.name] for kind in stage) for stage in theirs)


def test_the_layout_of_a_run_says_its_degrees() -> None:
    said = arguments(6, 2, decoder_first_pipeline_num_layers=2) | {
        "tensor_model_parallel_size": 4,
        "expert_model_parallel_size": 2,
        "expert_tensor_parallel_size": 1,
        "sequence_parallel": True,
        "make_vocab_size_divisible_by": 64,
    }
    layout = parallel_layout(said, "")
    assert (layout.tp, layout.pp, layout.vpp, layout.ep, layout.dp, layout.etp) == (4, 2, 1, 2, 2, 1)
    assert layout.pp_layout == (2, 4) and layout.vocab_multiple == 64 and layout.sequence_parallel
    assert [list(chunk) for stage in layout.chunks(6) for chunk in stage] == [[0, 1], [2, 3, 4, 5]]
