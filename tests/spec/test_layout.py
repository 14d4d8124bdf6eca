"""Where ranks and layers stand: every rank has one coordinate, every layer one place, at any degrees."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.models import gated_model
from workbench.spec.layout import ParallelLayout, Placement, home, virtual_stage

DEGREE = st.integers(1, 4)


@given(tp=DEGREE, cp=DEGREE, dp=DEGREE, pp=DEGREE)
def test_ranks_and_coordinates_invert_each_other(tp: int, cp: int, dp: int, pp: int) -> None:
    layout = ParallelLayout(tp=tp, cp=cp, dp=dp, pp=pp)
    found = [layout.coordinate(rank) for rank in range(layout.world_size)]
    assert [layout.rank(at) for at in found] == list(range(layout.world_size))
    assert len(set(found)) == layout.world_size


def test_tensor_ranks_are_neighbours_and_stages_lie_farthest_apart() -> None:
    layout = ParallelLayout(tp=2, cp=2, dp=2, pp=2)
    at = layout.coordinate(0b1010)
    assert (at.tp_rank, at.cp_rank, at.dp_rank, at.stage) == (0, 1, 0, 1)


@given(placement=st.sampled_from(["loop", "vee"]), pp=DEGREE, chunks=DEGREE)
def test_virtual_stages_and_their_homes_invert_each_other(placement: Placement, pp: int, chunks: int) -> None:
    homes = [home(placement, pp, virtual) for virtual in range(pp * chunks)]
    assert len(set(homes)) == pp * chunks
    assert [virtual_stage(placement, pp, *at) for at in homes] == list(range(pp * chunks))


@given(placement=st.sampled_from(["loop", "vee"]), pp=DEGREE, each=DEGREE)
def test_chunks_hold_each_layer_once_in_the_order_of_the_network(placement: Placement, pp: int, each: int) -> None:
    layout = ParallelLayout(pp=pp, vpp=2, placement=placement)
    chunks = layout.chunks(2 * pp * each)
    in_order = [chunks[stage][chunk] for stage, chunk in (layout.home(v) for v in range(2 * pp))]
    assert [index for layers in in_order for index in layers] == list(range(2 * pp * each))
    assert sorted(i for stage in range(pp) for i in layout.layers(2 * pp * each, stage)) == list(range(2 * pp * each))


def test_a_loop_ends_on_the_last_stage_and_a_vee_where_it_began() -> None:
    assert ParallelLayout(pp=4, vpp=2).last_stage == 3
    assert ParallelLayout(pp=4, vpp=2, placement="vee").last_stage == 0


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ({"pp": 2, "vpp": 3}, "num_hidden_layers=4 are fewer than pp=2 x vpp=3 stages; lower pp or vpp"),
        ({"pp": 2, "vpp": 2, "pp_layout": (2, 2)}, "pp_layout has 2 entries, but pp=2 x vpp=2 needs 4"),
        ({"pp": 3}, "num_hidden_layers=4 cannot be split evenly over pp=3; .* or pp_layout = \\[2, 1, 1\\]"),
        ({"pp": 2, "placement": "vee"}, "placement='vee' is for vpp=2, not vpp=1"),
        ({"dp": 4, "shard_size": 2}, "shard_size=2 has no meaning with shard='none'"),
        (
            {"dp": 4, "shard": "zero1", "shard_size": 3},
            "shard_size=3 does not divide dp=4 x cp=1; use .* \\(1, 2, 4\\)",
        ),
    ],
)
def test_what_does_not_fit_is_named_with_its_remedy(layout: dict, words: str) -> None:
    (fault,) = ParallelLayout.model_validate(layout).faults(gated_model())
    assert re.search(words, fault), fault


def test_replicas_share_one_copy_among_as_many_as_asked() -> None:
    degrees = {"dp": 2, "cp": 2}
    assert ParallelLayout(**degrees).shard_degree == 1
    assert ParallelLayout(**degrees, shard="zero1").shard_degree == 4
    assert ParallelLayout(**degrees, shard="zero3", shard_size=2).shard_degree == 2
