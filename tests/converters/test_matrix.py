"""The matrix of docs/conversion.md says what is so; all of it in `make parity`, one family of each format here."""

from __future__ import annotations

import pytest

from converters.open import formats
from tests.converters.matrix import family_models, outcome, recorded, recorded_states

FAMILIES, FORMATS = tuple(family_models()), tuple(formats())


def test_the_page_has_every_family_and_every_format() -> None:
    missing = {(family, name) for family in FAMILIES for name in FORMATS} ^ recorded_states().keys()
    assert not missing, "run make parity"


def assert_recorded(name: str, family: str) -> None:
    found = outcome(name, family)
    assert recorded_states()[family, name] == found.states, "run make parity"
    assert found.refusal in recorded(), "run make parity"


@pytest.mark.parametrize("name", FORMATS)
def test_what_the_page_says_of_a_format_is_so_for_llama(name: str) -> None:
    assert_recorded(name, "llama")


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", FORMATS)
def test_what_the_page_says_of_a_family_and_a_format_is_so(name: str, family: str) -> None:
    assert_recorded(name, family)
