"""Learning-rate curves take their published values."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.lr import Curve

NAMES = ["constant", "linear", "cosine", "wsd", "inverse_sqrt"]


def test_warm_up_rises_in_equal_steps_and_its_last_step_is_the_peak() -> None:
    curve = Curve("cosine", peak=1.0, warmup=4, steps=20)
    assert [curve(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert curve(4) == 1.0


def test_cosine_is_half_way_between_peak_and_floor_at_half_time() -> None:
    curve = Curve("cosine", peak=1.0, floor=0.1, warmup=10, steps=110)
    assert curve(60) == pytest.approx(0.55)
    assert curve(110) == pytest.approx(0.1)


def test_linear_falls_in_equal_steps() -> None:
    curve = Curve("linear", peak=1.0, steps=4)
    assert [curve(step) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_wsd_is_flat_until_its_decay_share() -> None:
    curve = Curve("wsd", peak=2.0, warmup=0, steps=100, decay_share=0.2)
    assert {curve(step) for step in range(80)} == {2.0}
    assert [curve(80), curve(90), curve(100)] == pytest.approx([2.0, 1.0, 0.0])


def test_inverse_square_root_halves_at_four_times_the_warm_up() -> None:
    curve = Curve("inverse_sqrt", peak=1.0, warmup=100, steps=1000)
    assert curve(99) == pytest.approx(1.0)
    assert curve(399) == pytest.approx(0.5)


def test_constant_stays_at_its_peak() -> None:
    assert {Curve("constant", peak=0.3, floor=0.1, steps=9)(step) for step in range(12)} == {0.3}


@pytest.mark.parametrize("name", NAMES)
@given(warmup=st.integers(0, 50), steps=st.integers(1, 200), step=st.integers(0, 300))
def test_no_curve_leaves_the_range_between_zero_and_peak(name: str, warmup: int, steps: int, step: int) -> None:
    curve = Curve(name, peak=1.0, floor=0.1, warmup=warmup, steps=steps)  # type: ignore[arg-type]
    assert 0 <= curve(step) <= 1.0
    if step >= warmup:
        assert curve(step) >= 0.1


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd"])
def test_without_a_known_end_a_curve_waits_at_its_peak(name: str) -> None:
    assert Curve(name, peak=1.0, warmup=5)(1000) == 1.0  # type: ignore[arg-type]
