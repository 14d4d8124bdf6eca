"""The page of capabilities says what the configuration's check says, and each feature runs on its own."""

from __future__ import annotations

import pytest

from tests.parity.capabilities import FEATURES, PAGE, Feature, page, refusal, refused_pairs


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)
def test_a_feature_alone_is_not_refused(feature: Feature) -> None:
    assert refusal(feature) is None


def test_the_page_is_what_the_check_says() -> None:
    assert PAGE.read_text() == page(), "run make parity"


def test_a_refusal_names_what_to_do() -> None:
    for one, other, why in refused_pairs():
        assert any(word in why for word in ("use ", "set ", "drop ", "remove ", "raise ", "needs ")), (
            one.name,
            other.name,
            why,
        )
