"""Initial weights and dropout masks are functions of names and indices, so that any box of them can be made alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workbench.parallel.dropout import DropoutKey, dropout
from workbench.parallel.initial import BLOCK_ROWS, normal
from workbench.spec.geometry import Box

SHAPE = (2 * BLOCK_ROWS + 19, 7)


@given(st.data())
def test_any_box_of_initial_weights_equals_the_same_box_of_the_whole(data: st.DataObject) -> None:
    whole = normal("layers.0.w", SHAPE, Box.whole(SHAPE), seed=5, std=0.5)
    offset = tuple(data.draw(st.integers(0, length - 1)) for length in SHAPE)
    size = tuple(data.draw(st.integers(1, length - start)) for length, start in zip(SHAPE, offset, strict=True))
    box = Box(offset, size)
    assert torch.equal(normal("layers.0.w", SHAPE, box, seed=5, std=0.5), whole[box.slices])


def test_initial_weights_differ_by_seed_name_and_block_and_have_the_asked_spread() -> None:
    shape = (4 * BLOCK_ROWS, 64)
    whole = normal("a", shape, Box.whole(shape), seed=0, std=0.02)
    assert whole.std().item() == pytest.approx(0.02, rel=0.02)
    assert not torch.equal(whole, normal("b", shape, Box.whole(shape), seed=0, std=0.02))
    assert not torch.equal(whole, normal("a", shape, Box.whole(shape), seed=1, std=0.02))
    assert not torch.equal(whole[:BLOCK_ROWS], whole[BLOCK_ROWS : 2 * BLOCK_ROWS])


def test_dropout_drops_the_asked_share_and_keeps_the_mean() -> None:
    x = torch.ones(4, 64, 256)
    y = dropout(x, 0.3, _rows(step=0), (torch.arange(64), torch.arange(256)))
    assert (y == 0).double().mean().item() == pytest.approx(0.3, abs=0.01)
    assert y.mean().item() == pytest.approx(1.0, abs=0.02)


def test_a_slice_is_dropped_as_in_the_whole_and_other_steps_and_sites_drop_others() -> None:
    x = torch.ones(4, 16, 32)
    whole = dropout(x, 0.5, _rows(step=3), (torch.arange(16), torch.arange(32)))
    part = dropout(x[1:3, 4:8, 8:24], 0.5, _rows(step=3)[1:3], (torch.arange(4, 8), torch.arange(8, 24)))
    assert torch.equal(part, whole[1:3, 4:8, 8:24])
    for other in (_rows(step=4), _rows(step=3, site="elsewhere")):
        again = dropout(x, 0.5, other, (torch.arange(16), torch.arange(32)))
        assert (again == whole).double().mean().item() == pytest.approx(0.5, abs=0.05)
    assert not torch.equal(whole[0], whole[1])


def _rows(step: int, site: str = "layers.0.mlp") -> torch.Tensor:
    return DropoutKey(seed=1, step=step, sample_ids=torch.arange(4)).rows(site)
