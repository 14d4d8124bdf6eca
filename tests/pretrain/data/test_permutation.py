"""The keyed permutation and the blend: bijections, proportions, and constants that never change."""

from fractions import Fraction
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.blend import Blend
from pretrain.data.permutation import Permutation

GOLDEN_ORDER = [605, 128, 203, 744, 244, 72, 647, 85]
GOLDEN_HUGE = [485121788399, 543892440932, 584676216373]


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), key=st.text(max_size=20))
def test_a_permutation_takes_every_element_exactly_once(size: int, key: str) -> None:
    assert sorted(map(Permutation(size, key=key), range(size))) == list(range(size))


@given(size=st.integers(1, 1 << 48), position=st.integers(0, 1 << 48), key=st.text(max_size=8))
def test_positions_of_a_huge_domain_stay_inside_it(size: int, position: int, key: str) -> None:
    assert 0 <= Permutation(size, key=key)(position % size) < size


def test_the_order_is_the_one_that_earlier_runs_were_trained_with() -> None:
    order = Permutation(1000, key="seed 1234/source 0/epoch 0")
    assert [order(position) for position in range(8)] == GOLDEN_ORDER
    huge = Permutation(10**12, key="seed 1234/source 0/epoch 0")
    assert [huge(position) for position in range(3)] == GOLDEN_HUGE


def test_another_key_gives_another_order() -> None:
    orders = {tuple(Permutation(50, key=str(key))(position) for position in range(50)) for key in range(100)}
    assert len(orders) == 100


def test_the_order_looks_random() -> None:
    """No bias of the first element, no drift, few fixed points: means within 4 standard errors of uniform."""
    size, keys = 97, 2000
    firsts = [Permutation(size, key=f"k{key}")(0) for key in range(keys)]
    assert abs(sum(firsts) / keys - (size - 1) / 2) < 4 * size / (12 * keys) ** 0.5
    order = [Permutation(10_007, key="drift")(position) for position in range(10_007)]
    rising = sum(one < other for one, other in pairwise(order))
    assert abs(rising - 5003) < 4 * (10_007 / 12) ** 0.5
    assert sum(position == element for position, element in enumerate(order)) < 8


weights_strategy = st.lists(st.sampled_from([0.1, 0.3, 1, 2.5, 7, 0.001, 100]), min_size=1, max_size=7)


@settings(max_examples=60, deadline=None)
@given(weights=weights_strategy)
def test_a_blend_numbers_the_samples_of_each_source_without_gap_or_repeat(weights: list[float]) -> None:
    blend, following = Blend(weights), [0] * len(weights)
    for position in range(500):
        source, index = blend(position)
        assert index == following[source]
        following[source] += 1


@settings(max_examples=60, deadline=None)
@given(weights=weights_strategy, prefix=st.integers(1, 2000))
def test_every_prefix_of_a_blend_keeps_the_proportions(weights: list[float], prefix: int) -> None:
    blend = Blend(weights)
    counts = [0] * len(weights)
    for position in range(prefix):
        counts[blend(position)[0]] += 1
    for count, share in zip(counts, blend.shares, strict=True):
        assert abs(count - share * prefix) <= 3  # one for each level of a tree of up to 8 sources


def test_decimal_weights_are_exact_over_a_whole_period() -> None:
    blend = Blend([0.1, 0.2, 0.7])
    counts = [0, 0, 0]
    for position in range(10_000):
        counts[blend(position)[0]] += 1
    assert counts == [1000, 2000, 7000]
    assert blend.shares == (Fraction(1, 10), Fraction(2, 10), Fraction(7, 10))
