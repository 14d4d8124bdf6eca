"""The algebra of boxes, and what every layout of every model must keep."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.boxes import boxes_in, partitions, shapes
from tests.helpers.checkpoints import tiny_model
from workbench.errors import LayoutError
from workbench.spec.geometry import Box, Part, coverage_fault, cut_rows
from workbench.spec.layout import ParallelLayout
from workbench.spec.schema import logical_tensors, stage_specs
from workbench.spec.stored import stored_tensors


@st.composite
def two_boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], Box, Box]:
    shape = draw(shapes())
    return shape, draw(boxes_in(shape)), draw(boxes_in(shape))


def mask(shape: tuple[int, ...], box: Box | None) -> np.ndarray:
    found = np.zeros(shape, bool)
    if box is not None:
        found[box.slices] = True
    return found


@given(two_boxes())
def test_an_intersection_holds_the_elements_that_both_boxes_hold(case):
    shape, a, b = case
    assert np.array_equal(mask(shape, a.intersect(b)), mask(shape, a) & mask(shape, b))
    assert a.intersect(b) == b.intersect(a)


@given(two_boxes())
def test_a_box_contains_another_when_no_element_of_the_other_is_outside(case):
    shape, a, b = case
    assert a.contains(b) == (not (mask(shape, b) & ~mask(shape, a)).any())


@given(two_boxes())
def test_moving_a_box_to_another_origin_and_back_changes_nothing(case):
    _, a, b = case
    assert a.relative_to(b).shift(b.offset) == a


@given(st.data())
def test_a_partition_covers_its_tensor_exactly_once(data):
    shape = data.draw(shapes())
    assert coverage_fault(shape, data.draw(partitions(shape))) is None


@given(st.data())
def test_a_partition_that_lost_or_repeats_a_box_is_refused(data):
    shape = data.draw(shapes().filter(bool))
    cut = data.draw(partitions(shape))
    index = data.draw(st.integers(0, len(cut) - 1))
    lost = coverage_fault(shape, cut[:index] + cut[index + 1 :])
    assert lost is not None and "elements" in lost
    repeated = coverage_fault(shape, (*cut, cut[index]))
    assert repeated is not None and "overlap" in repeated


@given(st.data())
def test_coverage_is_judged_as_by_counting_each_element(data):
    shape = data.draw(shapes().filter(bool))
    boxes = data.draw(st.lists(boxes_in(shape), max_size=5))
    count = np.zeros(shape, int)
    for box in boxes:
        count[box.slices] += 1
    assert (coverage_fault(shape, boxes) is None) == bool((count == 1).all())


def test_a_box_outside_of_the_tensor_is_named():
    fault = coverage_fault((4, 4), [Box((0, 0), (4, 5))])
    assert fault is not None and "(0, 0)" in fault and "(4, 5)" in fault and "(4, 4)" in fault


@given(st.data())
def test_rows_cut_for_data_parallel_ranks_hold_each_element_of_the_parameter_once(data):
    tp = data.draw(st.sampled_from([1, 2, 4]))
    model = tiny_model(tie_word_embeddings=False, attention_bias=True)
    specs = list(stage_specs(model, ParallelLayout(tp=tp), 0))
    spec = data.draw(st.sampled_from(specs))
    tp_rank = data.draw(st.integers(0, tp - 1))
    shards = spec.shards(tp, tp_rank)
    rows = spec.local_shape(tp)[0]
    dp = data.draw(st.integers(1, 5))
    share = -(-rows // dp)
    pieces: dict[str, list[Box]] = {}
    for rank in range(dp):
        start, stop = min(rank * share, rows), min((rank + 1) * share, rows)
        for piece in cut_rows(shards, start, stop):
            assert piece.local.end[0] <= stop - start
            assert piece.box.size == piece.local.size
            pieces.setdefault(piece.name, []).append(piece.box)
    for shard in shards:
        inside = [box.relative_to(shard.box) for box in pieces[shard.name]]
        assert coverage_fault(shard.box.size, inside) is None


LAYOUTS = [
    ParallelLayout(),
    ParallelLayout(tp=2, pp=2),
    ParallelLayout(tp=4, pp=4),
    ParallelLayout(tp=4, pp=3, pp_layout=(1, 2, 1), vocab_multiple=1),
    ParallelLayout(tp=2, vocab_multiple=64),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False, "mlp_bias": True}, {"num_labels": 3}], ids=str)
def test_every_layout_stores_each_logical_element_exactly_once(layout, changes):
    model = tiny_model(**changes)
    found = stored_tensors(model, layout)
    expected = logical_tensors(model, "F32")
    assert set(found) == set(expected)
    faults = {name: coverage_fault(tensor.shape, found[name].boxes) for name, tensor in expected.items()}
    assert not any(faults.values()), faults


@given(length=st.integers(1, 200), tp=st.sampled_from([1, 2, 4, 8]), multiple=st.sampled_from([1, 8, 64]))
def test_padding_is_never_part_of_a_logical_tensor(length, tp, multiple):
    part = Part("embed_tokens.weight", (length, 2), dim=0, pad_to=multiple)
    shards = [part.shard(tp, rank) for rank in range(tp)]
    assert coverage_fault((length, 2), [shard.box for shard in shards if shard is not None]) is None
    assert part.local_shape(tp)[0] % multiple == 0


def test_more_ranks_than_kv_heads_hold_copies_and_the_first_of_them_stores():
    part = Part("k", (8, 4), dim=0, units=2, replicate=True)
    shards = [part.shard(8, rank) for rank in range(8)]
    assert [shard.copy for shard in shards if shard] == [0, 1, 2, 3] * 2
    assert [shard.box.offset[0] for shard in shards if shard] == [0] * 4 + [4] * 4


def test_a_part_that_cannot_be_split_names_the_units_and_the_degree():
    with pytest.raises(LayoutError, match=r"q: 6 units cannot be split over tp=4"):
        Part("q", (24, 4), dim=0, units=6).shard(4, 0)
