"""Rotary positions: what turns, by how much, and that it depends on nothing but the sequence itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.helpers.models import biased_model, gated_model
from workbench.models.batch import Batch
from workbench.models.build import build_stage, initialise
from workbench.models.rope import apply_rope, rope_changes, rope_table
from workbench.parallel.mesh import Mesh
from workbench.spec.model import ModelConfig
from workbench.spec.rope import RopeScaling

SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "by_length": {"factor": 3.0},
    "by_parts": {"factor": 4.0, "original_max_position_embeddings": 8},
    "ramp": {"factor": 4.0, "original_max_position_embeddings": 8},
    "per_dimension": {
        "factor": 4.0,
        "original_max_position_embeddings": 8,
        "short_factor": (1.0, 1.5),
        "long_factor": (2.0, 5.0),
    },
}


def scaled(kind: str, **changes: Any) -> ModelConfig:
    features = {"head_dim": 8, "partial_rotary_factor": 0.5, "max_position_embeddings": 8}
    return gated_model(**{**features, "rope_scaling": {"kind": kind, **SCALINGS[kind]}, **changes})


@given(position=st.integers(0, 10_000), share=st.sampled_from([0.25, 0.5, 0.75, 1.0]))
def test_the_turned_share_keeps_its_length_and_the_rest_stays(position: int, share: float) -> None:
    model = gated_model(head_dim=16, partial_rotary_factor=share)
    x_BTHd = torch.randn(1, 1, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(position))
    positions = torch.tensor([position])
    turned = apply_rope(x_BTHd, rope_table(model, positions, positions[0] + 1, torch.float64))
    r = model.rotary_dim
    assert r == 16 * share
    assert torch.equal(turned[..., r:], x_BTHd[..., r:])
    torch.testing.assert_close(turned.norm(dim=-1), x_BTHd.norm(dim=-1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", SCALINGS)
def test_a_row_does_not_depend_on_the_rows_beside_it_nor_on_its_padding(kind: str) -> None:
    model = scaled(kind, max_position_embeddings=8)
    built = build_stage(model, Mesh.single(), dtype=torch.float64)
    initialise(built.parameters, model, seed=3)
    ids = torch.randint(0, model.vocab_size, (2, 20), generator=torch.Generator().manual_seed(0))
    together = built.module(None, Batch(ids, lengths=torch.tensor([20, 6])), "logits")
    for row, length in ((0, 20), (1, 6)):
        alone = built.module(None, Batch(ids[row : row + 1, :length]), "logits")
        torch.testing.assert_close(together[row, :length], alone[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("kind", "before", "after", "changes"),
    [
        ("linear", 8, 9, False),
        ("by_length", 7, 8, False),
        ("by_length", 8, 9, True),
        ("by_length", 9, 10, True),
        ("per_dimension", 7, 8, False),
        ("per_dimension", 8, 9, True),
        ("per_dimension", 9, 10, False),
    ],
)
def test_frequencies_change_where_the_kind_says(kind: str, before: int, after: int, changes: bool) -> None:
    model = scaled(kind)
    tables = [rope_table(model, torch.arange(4), torch.tensor(n), torch.float64)[0] for n in (before, after)]
    assert torch.equal(*tables) is not changes
    assert rope_changes(model, before, after) is changes


def test_only_scaling_by_length_lets_sequences_be_longer_than_the_positions() -> None:
    assert [scaled(kind).max_length for kind in SCALINGS] == [8, 24, 8, 8, 8]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"partial_rotary_factor": 0.375}, r"head_dim=8 x partial_rotary_factor=0.375 is 3"),
        ({"partial_rotary_factor": 0.1}, r"partial_rotary_factor=0.1 is 0"),
        ({"shared_norm": True}, r"shared_norm=true is for parallel_residual = true"),
        ({"rope_scaling": {"kind": "linear", "beta_fast": 3.0}}, r"kind='linear' does not read beta_fast"),
        ({"rope_scaling": {"kind": "by_length"}, "partial_rotary_factor": 0.25}, "more than one pair"),
        ({"rope_scaling": {"kind": "per_dimension", "short_factor": [1, 1]}}, "long_factor has 0 numbers, .* 4 pairs"),
    ],
)
def test_features_that_do_not_go_together_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        gated_model(head_dim=8, **changes)


def test_rotary_features_are_refused_without_rotary_positions() -> None:
    with pytest.raises(
        ValidationError, match="partial_rotary_factor=0.5 is for rotary positions, but position_embedding='learned'"
    ):
        biased_model(partial_rotary_factor=0.5)
    with pytest.raises(
        ValidationError, match="rope_scaling=linear is for rotary positions, but position_embedding='learned'"
    ):
        biased_model(rope_scaling=RopeScaling(kind="linear", factor=2.0))
