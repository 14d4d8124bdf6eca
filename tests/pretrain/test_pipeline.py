"""Every layout computes what one process computes: loss, gradients, their norm, and the weights after three updates."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from pretrain.config import OptimTable
from pretrain.evaluation import evaluate
from pretrain.objective import Share
from pretrain.optimizer import Optimizer
from pretrain.pipeline import Pipeline
from pretrain.schedules import schedule_named
from pretrain.step import agree, train_step
from tests.helpers.ranks import run_ranks
from tests.pretrain.models import HeldOut, Noise, mesh_of, tiny_model
from workbench.models.build import build_stage, initialise
from workbench.models.state import stored_boxes
from workbench.spec.execution import StageOptions
from workbench.spec.layout import ParallelLayout

Found = dict[str, Any]
OPTIM = OptimTable(lr=1e-2, clip=0.5, weight_decay=0.1)


def train_three_steps(
    layout_values: dict[str, Any], schedule: str, micro_size: int = 2, changes: dict[str, Any] | None = None
) -> Found:
    """Losses, norms and evaluation of three fp64 steps, and this rank's boxes of the weights and moments after them."""
    rule = schedule_named(schedule)
    mesh = mesh_of(ParallelLayout(**{**layout_values, "placement": rule.placement}))
    model = tiny_model(**(changes or {}))
    options = StageOptions(split_backward=rule.splits_backward)
    built = build_stage(model, mesh, dtype=torch.float64, options=options)
    initialise(built.parameters, model, seed=5)
    optimizer = Optimizer(built.parameters, mesh, OPTIM)
    pipeline = Pipeline(built, mesh, rule)
    objective, share = Noise(), Share(micro_size, mesh.dp.rank, mesh.dp.size)
    losses, norms = [], []
    for step in range(3):
        rows = objective.train_rows(share, step=step, first_sample=8 * step, global_size=8)
        agreed = agree(rows, mesh, stop=False)
        result = train_step(pipeline, optimizer, rows, agreed=agreed, lr=1e-2, seed=5, step=step)
        losses.append(result.mean_loss(mesh))
        norms.append(result.gradient_norm.item())
    micros = 8 // (micro_size * mesh.dp.size)
    score = evaluate(pipeline, HeldOut(5, 12), micro_size=micro_size, num_microbatches=micros)
    boxes = [("", None), *((f"{prefix}/", values) for prefix, values in optimizer.moments().items())]
    return {
        "losses": losses,
        "norms": norms,
        "score": score,
        "boxes": [
            (s.tensor, s.box, s.array().copy())
            for prefix, values in boxes
            for s in stored_boxes(built.parameters, prefix, values)
        ],
        "updates": optimizer.step_count,
    }


def whole_tensors(ranks: list[Found]) -> dict[str, torch.Tensor]:
    """The logical tensors that the ranks hold together; each element must be stored exactly once."""
    found: dict[str, torch.Tensor] = {}
    count: dict[str, torch.Tensor] = {}
    for rank in ranks:
        for tensor, box, array in rank["boxes"]:
            whole = found.setdefault(tensor.name, torch.full(tensor.shape, float("nan"), dtype=torch.float64))
            whole[box.slices] = torch.from_numpy(array)
            count.setdefault(tensor.name, torch.zeros(tensor.shape))[box.slices] += 1
    assert all((times == 1).all() for times in count.values())
    return found


@functools.cache
def reference(tied: bool = True, dropout: float = 0.0) -> Found:
    """One process, the whole batch as a single microbatch."""
    return train_three_steps({}, "gpipe", 8, {"tie_word_embeddings": tied, "hidden_dropout": dropout})


def assert_same(ranks: list[Found], expected: Found) -> None:
    for rank in ranks:
        assert rank["losses"] == pytest.approx(expected["losses"], rel=1e-10)
        assert rank["norms"] == pytest.approx(expected["norms"], rel=1e-10)
        assert rank["score"] == pytest.approx(expected["score"], rel=1e-10)
        assert rank["updates"] == 3
    tensors, wanted = whole_tensors(ranks), whole_tensors([expected])
    assert tensors.keys() == wanted.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-8, atol=1e-11, msg=lambda text, n=name: f"{n}: {text}")


def test_accumulated_microbatches_equal_one_large_batch() -> None:
    assert_same([train_three_steps({}, "1f1b", 1)], reference())


@pytest.mark.parity
@pytest.mark.parametrize(
    ("layout", "schedule"),
    [
        ({"pp": 2}, "gpipe"),
        ({"tp": 2}, "1f1b"),
        ({"dp": 2, "shard": "zero3"}, "1f1b"),
    ],
    ids=str,
)
def test_two_ranks_train_like_one_process(layout: dict[str, Any], schedule: str) -> None:
    assert_same(run_ranks(2, train_three_steps, layout, schedule), reference())


@pytest.mark.parity
@pytest.mark.parametrize(
    "layout",
    [
        {"dp": 2, "pp": 2, "shard": "zero3"},
        {"tp": 2, "pp": 2, "pp_layout": [3, 1]},
    ],
    ids=str,
)
def test_four_ranks_train_like_one_process(layout: dict[str, Any]) -> None:
    assert_same(run_ranks(4, train_three_steps, layout, "1f1b"), reference())


@pytest.mark.parity
@pytest.mark.parametrize(
    ("layout", "schedule"),
    [
        ({"pp": 2, "vpp": 2}, "interleaved_zb"),
        ({"pp": 2, "vpp": 2, "dp": 2, "shard": "zero2"}, "zbv"),
    ],
    ids=str,
)
def test_every_schedule_trains_and_scores_like_one_process(layout: dict[str, Any], schedule: str) -> None:
    """The end of the network lies on the first stage for some, and the score is taken there."""
    assert_same(run_ranks(2 * layout.get("dp", 1), train_three_steps, layout, schedule), reference())


@pytest.mark.parity
def test_untied_embeddings_on_two_stages_train_like_one_process() -> None:
    changes = {"tie_word_embeddings": False, "hidden_dropout": 0.0}
    assert_same(run_ranks(2, train_three_steps, {"pp": 2}, "1f1b", 2, changes), reference(tied=False))


@pytest.mark.parity
def test_dropout_falls_on_the_same_elements_at_tp2_pp2() -> None:
    changes = {"tie_word_embeddings": True, "hidden_dropout": 0.1}
    found = run_ranks(4, train_three_steps, {"tp": 2, "pp": 2}, "1f1b", 2, changes)
    assert_same(found, reference(dropout=0.1))
    assert reference(dropout=0.1)["losses"] != pytest.approx(reference()["losses"], rel=1e-4)
