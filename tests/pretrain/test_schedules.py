"""Schedules are sound for every size, and cost what their papers say."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.schedules import Action, Schedule, forward_turns, microbatch_groups, schedules
from pretrain.simulate import DURATIONS, ScheduleFault, neighbours, result, simulate
from workbench.spec.layout import virtual_stage

SCHEDULES = list(schedules().values())
ZERO_BUBBLE = [schedule for schedule in SCHEDULES if schedule.splits_backward]
NAMED = schedules()
STAGES = st.integers(1, 9)
MICROBATCHES = st.integers(1, 29)
CHUNKS = st.integers(1, 4)


def by_name(schedule: Schedule) -> str:
    return schedule.name


@pytest.mark.parametrize("schedule", SCHEDULES, ids=by_name)
@given(num_stages=STAGES, num_microbatches=MICROBATCHES, chunks=CHUNKS)
@settings(max_examples=60, deadline=None)
def test_a_schedule_finishes_at_every_size_and_wastes_no_more_than_one_forward_one_backward(
    schedule: Schedule, num_stages: int, num_microbatches: int, chunks: int
) -> None:
    run = simulate(schedule, num_stages, num_microbatches, schedule.num_chunks or chunks)
    assert run.bubble <= (num_stages - 1) / (num_microbatches + num_stages - 1) + 1e-9


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@given(num_stages=STAGES, num_microbatches=MICROBATCHES)
@settings(max_examples=40, deadline=None)
def test_one_chunk_and_whole_backwards_waste_the_textbook_bubble(
    name: str, num_stages: int, num_microbatches: int
) -> None:
    run = simulate(NAMED[name], num_stages, num_microbatches)
    assert run.bubble == pytest.approx((num_stages - 1) / (num_microbatches + num_stages - 1))


@given(num_stages=STAGES, rounds=st.integers(1, 5), chunks=CHUNKS)
@settings(max_examples=40, deadline=None)
def test_interleaving_divides_the_bubble_by_the_chunks(num_stages: int, rounds: int, chunks: int) -> None:
    m = rounds * num_stages
    run = simulate(NAMED["interleaved"], num_stages, m, chunks)
    assert run.bubble == pytest.approx((num_stages - 1) / (chunks * m + num_stages - 1))


@pytest.mark.parametrize("schedule", ZERO_BUBBLE, ids=by_name)
@given(num_stages=STAGES, more=st.integers(0, 20), chunks=CHUNKS)
@settings(max_examples=40, deadline=None)
def test_with_enough_microbatches_zero_bubble_waits_only_for_the_first_to_arrive(
    schedule: Schedule, num_stages: int, more: int, chunks: int
) -> None:
    """(p - 1) (F + I - W) per chunk, which is what p - 1 stages take to hand the first forward down."""
    m, v = 2 * num_stages + more, schedule.num_chunks or chunks
    run = simulate(schedule, num_stages, m, v)
    assert run.bubble * run.makespan == pytest.approx(num_stages - 1)
    if num_stages > 1:
        assert run.bubble < simulate(NAMED["1f1b"], num_stages, m).bubble
        assert run.bubble < simulate(NAMED["interleaved"], num_stages, m, v).bubble


@pytest.mark.parametrize("schedule", SCHEDULES, ids=by_name)
@given(
    num_stages=st.integers(1, 6),
    num_microbatches=st.integers(1, 13),
    chunks=CHUNKS,
    lengths=st.tuples(*[st.floats(0.1, 5)] * 4),
    transfer=st.floats(0, 2),
)
@settings(max_examples=40, deadline=None)
def test_nothing_starts_before_what_it_needs_at_any_speed(
    schedule: Schedule,
    num_stages: int,
    num_microbatches: int,
    chunks: int,
    lengths: tuple[float, ...],
    transfer: float,
) -> None:
    v = schedule.num_chunks or chunks
    durations = dict(zip(DURATIONS, lengths, strict=True))
    run = simulate(schedule, num_stages, num_microbatches, v, durations=durations, transfer=transfer)
    ends, stages = {}, {}
    for span in run.spans:
        virtual = virtual_stage(schedule.placement, num_stages, span.stage, span.action.chunk)
        ends[result(span.action, virtual)], stages[virtual] = span.end, span.stage
    for span in run.spans:
        action = span.action
        virtual = virtual_stage(schedule.placement, num_stages, span.stage, action.chunk)
        source = neighbours(action, virtual)[0]
        if action.kind != "F":
            own = "B" if action.kind == "W" else "F"
            assert span.start >= ends[own, action.microbatch, virtual]
        if action.kind != "W" and source in stages:
            arrives = ends[result(action, source)] + (transfer if stages[source] != span.stage else 0.0)
            assert span.start >= arrives


@given(num_stages=STAGES, num_microbatches=MICROBATCHES)
@settings(max_examples=60, deadline=None)
def test_one_f_one_b_holds_no_more_microbatches_than_stages_behind_it(num_stages: int, num_microbatches: int) -> None:
    run = simulate(NAMED["1f1b"], num_stages, num_microbatches)
    assert run.peak_in_flight == tuple(min(num_microbatches, num_stages - s) for s in range(num_stages))


@given(num_stages=STAGES, num_microbatches=MICROBATCHES, chunks=CHUNKS)
@settings(max_examples=60, deadline=None)
def test_zero_bubble_holds_no_more_than_the_fullest_stage_without_it(
    num_stages: int, num_microbatches: int, chunks: int
) -> None:
    one = max(simulate(NAMED["1f1b"], num_stages, num_microbatches).peak_in_flight)
    assert max(simulate(NAMED["zb_h1"], num_stages, num_microbatches).peak_in_flight) <= one
    assert max(simulate(NAMED["zbv"], num_stages, num_microbatches, 2).peak_in_flight) <= 2 * one
    assert max(simulate(NAMED["dualpipev"], num_stages, num_microbatches, 2).peak_in_flight) <= 2 * one + 1
    looped = simulate(NAMED["interleaved"], num_stages, num_microbatches, chunks).peak_in_flight
    assert max(simulate(NAMED["interleaved_zb"], num_stages, num_microbatches, chunks).peak_in_flight) <= max(looped)


def test_gpipe_holds_every_microbatch_on_every_stage() -> None:
    assert simulate(NAMED["gpipe"], 3, 5).peak_in_flight == (5, 5, 5)


def test_64_stages_of_4_chunks_are_planned_in_a_moment() -> None:
    run = simulate(NAMED["interleaved_zb"], 64, 256, 4)
    assert run.bubble * run.makespan == pytest.approx(63)


def test_the_drawing_of_one_f_one_b_is_the_figure_of_the_paper() -> None:
    drawing = simulate(NAMED["1f1b"], 2, 3, durations={"F": 1, "B": 1}).drawing(width=3)
    assert drawing == "stage 0: F0 F1    B0 F2 B1    B2\nstage 1:    F0 B0 F1 B1 F2 B2"


def test_the_drawing_of_zb_h1_fills_the_end_with_weights() -> None:
    assert simulate(NAMED["zb_h1"], 2, 3).drawing(width=3) == (
        "stage 0: F0 F1    I0 W0 F2 I1 W1 I2 W2\nstage 1:    F0 I0 F1 I1 W0 F2 I2 W1 W2"
    )


def test_the_drawing_of_zbv_goes_there_and_back() -> None:
    assert simulate(NAMED["zbv"], 2, 3, 2).drawing(width=5).splitlines() == [
        "stage 0: F0   F1   F2   F0.1 I0.1 W0.1 F1.1 I1.1 W1.1 I0   W0   F2.1 I2.1 W2.1 I1   W1   I2   W2",
        "stage 1:      F0   F0.1 F1   F1.1 I0.1 W0.1 F2   I0   W0   F2.1 I1.1 W1.1 I1   I2.1 I2   W1   W2.1 W2",
    ]


@given(num_stages=STAGES, num_microbatches=MICROBATCHES, chunks=CHUNKS)
def test_forward_turns_take_everything_once_in_groups_that_fill_the_pipeline(
    num_stages: int, num_microbatches: int, chunks: int
) -> None:
    turns = forward_turns(num_stages, num_microbatches, chunks)
    assert sorted(turns) == [(m, c) for m in range(num_microbatches) for c in range(chunks)]
    sizes = [len(group) for group in microbatch_groups(num_stages, num_microbatches)]
    assert min(sizes) >= min(num_stages, num_microbatches) and max(sizes) - min(sizes) <= 1
    assert max(sizes) == sizes[0]


@pytest.mark.parametrize(
    ("name", "chunks", "message"),
    [
        ("1f1b", 2, r"schedule='1f1b' gives each stage 1 chunk of layers, not vpp=2; use vpp = 1 or another schedule"),
        ("zbv", 1, r"schedule='zbv' gives each stage 2 chunks of layers, not vpp=1; use vpp = 2 .*\(1f1b, gpipe,"),
    ],
)
def test_a_number_of_chunks_that_a_schedule_does_not_take_is_a_fault(name: str, chunks: int, message: str) -> None:
    assert NAMED["interleaved"].faults(chunks) == []
    (fault,) = NAMED[name].faults(chunks)
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(fault)


def _schedule(*stages: str) -> Schedule:
    plan = [tuple(Action(word[0], int(word[1:])) for word in words.split()) for words in stages]  # type: ignore[arg-type]
    return Schedule("made", "", lambda stage, *_: plan[stage])


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (("F0 F1 B0 B1", "F0 F1 B0"), "stage 1 lacks or invents .*1"),
        (("F0 F0 B0 F1 B1", "F0 F1 B0 B1"), "stage 0 repeats an action"),
        (("B0 F0 F1 B1", "F0 F1 B0 B1"), "stage 0 runs B0 before its F"),
        (("F0 F1 W0 I0 B1", "F0 F1 B0 B1"), "stage 0 runs W0 before its I"),
        (("F0 F1 I0 B1", "F0 F1 B0 B1"), "stage 0 lacks or invents W0"),
        (("F0 F1 B0 I0 W0 B1", "F0 F1 B0 B1"), "stage 0 lacks or invents B0 I0"),
        (("F0 F1 B0 B1", "F1 F0 B0 B1"), "must keep their order"),
        (("F0 F1 I1 W1 B0", "F0 F1 I0 I1 W0 W1"), "must keep their order"),
        (("F0 B0 F1 B1", "F0 F1 B0 B1"), "no stage can go on; each waits at .*B0.*F1"),
    ],
)
def test_a_broken_schedule_is_refused_with_its_stage(stages: tuple[str, ...], message: str) -> None:
    with pytest.raises(ScheduleFault, match=message):
        simulate(_schedule(*stages), len(stages), 2)
