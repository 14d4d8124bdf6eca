"""Schedules are sound for every size, and cost what their papers say."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.schedules import Action, Schedule, gpipe, one_f_one_b
from pretrain.simulate import ScheduleFault, simulate

SCHEDULES = [gpipe.SCHEDULE, one_f_one_b.SCHEDULE]
STAGES = st.integers(1, 9)
MICROBATCHES = st.integers(1, 17)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
@given(num_stages=STAGES, num_microbatches=MICROBATCHES)
@settings(max_examples=40, deadline=None)
def test_a_schedule_finishes_and_wastes_the_textbook_bubble(
    schedule: Schedule, num_stages: int, num_microbatches: int
) -> None:
    run = simulate(schedule, num_stages, num_microbatches)
    assert len(run.spans) == 2 * num_stages * num_microbatches
    assert run.bubble == pytest.approx((num_stages - 1) / (num_microbatches + num_stages - 1))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
@given(num_stages=STAGES, num_microbatches=MICROBATCHES, backward=st.floats(0.1, 5), transfer=st.floats(0, 2))
@settings(max_examples=40, deadline=None)
def test_nothing_starts_before_what_it_needs_at_any_speed(
    schedule: Schedule, num_stages: int, num_microbatches: int, backward: float, transfer: float
) -> None:
    run = simulate(schedule, num_stages, num_microbatches, durations={"F": 1.0, "B": backward}, transfer=transfer)
    spans = {(s.action.kind, s.action.microbatch, s.stage): s for s in run.spans}
    for (kind, microbatch, stage), span in spans.items():
        before = stage - 1 if kind == "F" else stage + 1
        if 0 <= before < num_stages:
            assert span.start >= spans[kind, microbatch, before].end + transfer
        if kind == "B":
            assert span.start >= spans["F", microbatch, stage].end


@given(num_stages=STAGES, num_microbatches=MICROBATCHES)
@settings(max_examples=60, deadline=None)
def test_one_f_one_b_holds_no_more_microbatches_than_stages_behind_it(num_stages: int, num_microbatches: int) -> None:
    run = simulate(one_f_one_b.SCHEDULE, num_stages, num_microbatches)
    assert run.peak_in_flight == tuple(min(num_microbatches, num_stages - s) for s in range(num_stages))


def test_gpipe_holds_every_microbatch_on_every_stage() -> None:
    assert simulate(gpipe.SCHEDULE, 3, 5).peak_in_flight == (5, 5, 5)


def test_the_drawing_of_one_f_one_b_is_the_figure_of_the_paper() -> None:
    drawing = simulate(one_f_one_b.SCHEDULE, 2, 3).drawing(width=3)
    assert drawing == "stage 0: F0 F1    B0 F2 B1    B2\nstage 1:    F0 B0 F1 B1 F2 B2"


def _schedule(*stages: str) -> Schedule:
    plan = [tuple(Action(word[0], int(word[1:])) for word in words.split()) for words in stages]  # type: ignore[arg-type]
    return Schedule("made", "", lambda stage, num_stages, num_microbatches: plan[stage])


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (("F0 F1 B0 B1", "F0 F1 B0"), "stage 1 lacks or invents B1"),
        (("F0 F0 B0 F1 B1", "F0 F1 B0 B1"), "stage 0 repeats an action"),
        (("B0 F0 F1 B1", "F0 F1 B0 B1"), "stage 0 runs B0 before its forward"),
        (("F0 F1 B0 B1", "F1 F0 B0 B1"), "must keep their order"),
        (("F0 B0 F1 B1", "F0 F1 B0 B1"), "no stage can go on; each waits at .*B0.*F1"),
    ],
)
def test_a_broken_schedule_is_refused_with_its_stage(stages: tuple[str, ...], message: str) -> None:
    with pytest.raises(ScheduleFault, match=message):
        simulate(_schedule(*stages), len(stages), 2)
