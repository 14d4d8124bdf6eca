"""Examples that share a row learn as if each had its own, at every layout, and in an order that the seed decides."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetune.config import FinetuneConfig
from finetune.judges import TextLoss
from finetune.objective import TaskObjective, pad
from finetune.packing import bins_of, joined, packed, packing_faults
from finetune.run import Finetuning
from finetune.task import IGNORE, Example, Prepared
from pretrain.engine import Pipeline, Rows, Share, schedule_named, to_batch
from tests.finetune.data import config_of, small_model, write_rows
from tests.finetune.test_runs import FULL, answers, arrays, base_of, folder  # noqa: F401 - a fixture
from tests.helpers.parity import Boxes, boxes_of, largest_difference, perturb
from tests.helpers.ranks import run_ranks
from tests.pretrain.models import VOCAB, tiny_model
from workbench.errors import ConfigError
from workbench.models.build import build_stage, initialise
from workbench.parallel.gradients import complete_gradients
from workbench.parallel.mesh import Mesh
from workbench.spec.layout import ParallelLayout
from workbench.spec.model import ModelConfig

CAPACITY = 16


def example(tokens: int, seed: int) -> Example:
    ids = torch.randint(0, VOCAB, (tokens + 1,), generator=torch.Generator().manual_seed(seed)).numpy()
    labels = ids[1:].copy()
    labels[: seed % tokens] = IGNORE
    return Example(ids[:-1].copy(), labels, f"train.jsonl:{seed}")


EXAMPLES = [example(1 + (7 * n) % 11, n) for n in range(14)]
PREPARED = Prepared(EXAMPLES, {}, TextLoss(), num_labels=0, pad_id=0)


@given(st.lists(st.integers(1, CAPACITY), min_size=1, max_size=60), st.integers(0, 5))
def test_bins_hold_every_example_once_are_few_and_do_not_run_over(lengths: list[int], seed: int) -> None:
    bins = bins_of(lengths, CAPACITY, seed=seed)
    assert sorted(index for one in bins for index in one) == list(range(len(lengths)))
    filled = [sum(lengths[index] for index in one) for one in bins]
    assert min(filled) > 0 and max(filled) <= CAPACITY
    # No two bins could have been one: then the rows are more than half full.
    assert len(bins) == 1 or sum(filled) * 2 > CAPACITY * (len(bins) - 1)
    assert bins == bins_of(lengths, CAPACITY, seed=seed)


def test_short_examples_fill_their_bins_equally() -> None:
    filled = [sum(3 for _ in one) for one in bins_of([3] * 17, CAPACITY, seed=0)]
    assert sorted(filled) == [12, 12, 12, 15]


def test_the_seed_decides_which_examples_meet() -> None:
    assert bins_of([4] * 40, CAPACITY, seed=1) != bins_of([4] * 40, CAPACITY, seed=2)


def test_positions_and_documents_begin_anew_with_each_example() -> None:
    rows = pad([joined([example(3, 1), example(2, 2)]), joined([example(7, 3)])], [0, 1], 0)
    batch = to_batch(rows, torch.device("cpu"))
    assert batch.positions is not None and batch.documents is not None
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5, 6]]
    assert batch.documents.tolist() == [[0, 0, 0, 1, 1, -1, -1], [0] * 7]
    assert rows.num_tokens == 12


def microbatches(shared: bool, dp_rank: int, dp_size: int) -> list[Rows]:
    """All the examples as microbatches of two rows; those of this rank."""
    found = packed(PREPARED, CAPACITY, seed=1).train if shared else EXAMPLES
    return [pad([found[n] for n in ids], ids, 0) for ids in pairs(len(found))][dp_rank::dp_size]


def pairs(count: int) -> list[range]:
    return [range(first, min(first + 2, count)) for first in range(0, count, 2)]


def observe(model: ModelConfig, layout: ParallelLayout, shared: bool) -> tuple[float, Boxes]:
    mesh = Mesh.create(layout, torch.device("cpu"))
    built = build_stage(model, mesh, dtype=torch.float64)
    initialise(built.parameters, model, seed=7)
    perturb(built.parameters)
    batches = [to_batch(rows, mesh.device) for rows in microbatches(shared, mesh.dp.rank, mesh.dp.size)]
    count = sum(one.num_labels for one in EXAMPLES)
    pipeline = Pipeline(built, mesh, schedule_named("1f1b"))
    loss = pipeline.train(batches, torch.tensor(1.0 / count, dtype=torch.float64))
    complete_gradients(built.parameters, mesh)
    total = float(mesh.pp.all_reduce(mesh.data.all_reduce(loss.clone()))) / count
    return total, boxes_of(built.parameters, gradients=True)


CASES = [
    (ParallelLayout(), {}),
    (ParallelLayout(tp=2, sequence_parallel=True), {}),
    (ParallelLayout(pp=2), {}),
    (ParallelLayout(cp=2), {}),
    (ParallelLayout(cp=2, context="ring"), {"sliding_window": 3}),
    (ParallelLayout(tp=2), {"position_embedding": "learned"}),
]


@pytest.mark.parity
@pytest.mark.parametrize(("layout", "changes"), CASES, ids=str)
def test_loss_and_gradients_of_shared_rows_are_those_of_rows_apart(
    layout: ParallelLayout, changes: dict[str, object]
) -> None:
    model = tiny_model(**changes)
    loss, gradients = observe(model, ParallelLayout(), shared=False)
    whole = {name: values for name, _, values in gradients}
    for there, gradients_there in run_ranks(layout.world_size, observe, model, layout, True):
        assert there == pytest.approx(loss, rel=1e-10)
        assert largest_difference(gradients_there, whole) < 1e-10


@pytest.mark.parametrize("changed", range(3))
def test_no_example_feels_what_shares_its_row(changed: int) -> None:
    built = build_stage(tiny_model(), Mesh.single(), dtype=torch.float64)
    initialise(built.parameters, tiny_model(), seed=7)
    row = [example(5, 1), example(4, 2), example(6, 3)]
    other = [example(len(one.input_ids), 90) if n == changed else one for n, one in enumerate(row)]
    with torch.no_grad():
        before, after = (
            built.module(None, to_batch(pad([joined(parts)], [0], 0), torch.device("cpu")), "logits")
            for parts in (row, other)
        )
    moved = (before != after).any(dim=-1)[0]
    whose = torch.repeat_interleave(torch.arange(3), torch.tensor([5, 4, 6]))
    assert moved[whose == changed].any() and not moved[whose != changed].any()


def test_the_rows_of_a_step_do_not_depend_on_the_ranks_that_share_them() -> None:
    objective = TaskObjective(packed(PREPARED, CAPACITY, seed=3), seed=3)

    def step(first: int, share: Share) -> list[tuple[int, tuple[int, ...]]]:
        ranks = (Share(share.micro_size, rank, share.dp_size) for rank in range(share.dp_size))
        found = [r for one in ranks for r in objective.train_rows(one, step=0, first_sample=first, global_size=4)]
        return sorted(
            (int(n), tuple(ids[:length]))
            for rows in found
            if rows.lengths is not None
            for n, ids, length in zip(rows.sample_ids, rows.input_ids, rows.lengths, strict=True)
        )

    for first in (0, 4, 8):
        assert step(first, Share(4, 0, 1)) == step(first, Share(1, 0, 2)) == step(first, Share(2, 0, 2))
    rows = objective.identity["rows"]
    epoch = [ids for n in range(rows) for _, ids in step(4 * n, Share(4, 0, 1))]
    assert len(epoch) == 4 * rows and set(epoch[:rows]) == set(epoch[rows : 2 * rows]) == set(epoch)
    assert sorted(sum(epoch[:rows], ())) == sorted(np.concatenate([one.input_ids for one in EXAMPLES]))


def packed_answers(folder: Path, place: Path, steps: int) -> FinetuneConfig:  # noqa: F811
    batch = {"packing": True, "global_size": 2, "micro_size": 1, "seq_len": 16}
    return answers(folder, FULL, place, batch=batch, run={"steps": steps})


def test_a_packed_run_goes_on_bit_for_bit(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    whole = Finetuning(packed_answers(folder, tmp_path / "a", 6), base_of(folder), Mesh.single()).run()
    for steps in (3, 6):
        parts = Finetuning(packed_answers(folder, tmp_path / "b", steps), base_of(folder), Mesh.single()).run()
    expected, found = arrays(whole.checkpoint), arrays(parts.checkpoint)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    apart = answers(folder, FULL, tmp_path / "b", batch={"seq_len": 16}, run={"steps": 8})
    with pytest.raises(ConfigError, match="the data's packed_tokens is None, was 16"):
        Finetuning(apart, base_of(folder), Mesh.single())


def test_a_task_whose_examples_cannot_share_a_row_is_refused_by_name(tmp_path: Path) -> None:
    task = {"kind": "classification", "train": write_rows(tmp_path / "train.jsonl", [])}
    with pytest.raises(ValueError, match=r"examples of task 'classification' cannot share a row \(those of .*sft"):
        config_of(tmp_path, task, FULL, batch={"packing": True})


def test_positions_that_depend_on_the_length_of_a_row_are_refused() -> None:
    scaling = {"kind": "by_length", "factor": 4.0}
    model = small_model(rope_scaling=scaling)
    assert packing_faults(model, 64) == []
    [fault] = packing_faults(model, 65)
    assert "batch.seq_len=65: model.rope_scaling 'by_length'" in fault and "lower seq_len to 64" in fault
