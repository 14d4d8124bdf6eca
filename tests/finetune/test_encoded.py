"""Data that ranks map into memory is the data that was encoded."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.encoded import stored
from finetune.run import Base, Finetuning, prepare
from finetune.task import Example, Prepared
from tests.finetune.preferences import LORA, base_of, tune, write_all
from tests.finetune.preferences import config as preference_config
from tests.finetune.test_row_tasks import BASES, CASES, bases_of, config
from tests.finetune.test_row_tasks import folder as row_folder
from workbench.parallel.mesh import Mesh
from workbench.tokenizer import Tokenizer

folder = row_folder


def sent(prepared: Prepared, place: Path) -> Prepared:
    """As another process gets it."""
    place.mkdir()
    found: Prepared = pickle.loads(pickle.dumps(stored(prepared, place)))
    return found


def fields(example: Example) -> dict[str, Any]:
    arrays = {"ids": example.input_ids, "labels": example.labels, **example.values}
    arrays |= {name: getattr(example, name) for name in ("segments", "documents")}
    return {"place": example.place} | {
        name: None if value is None else (np.asarray(value).dtype, np.shape(value), np.asarray(value).tolist())
        for name, value in arrays.items()
    }


@pytest.mark.parametrize("case", CASES)
def test_the_rows_of_every_task_arrive_as_they_were_encoded(case: str, folder: Path, tmp_path: Path) -> None:
    base = bases_of(case)[-1]
    settings = config(folder, case, base, tmp_path / "run")
    made = prepare(settings, BASES[base], Tokenizer.load(folder / "tokenizer"))
    found = sent(made, tmp_path / "rows")
    assert len(found.train) == len(made.train) and set(found.held_out) == set(made.held_out)
    for ours, theirs in zip(made.train, found.train, strict=True):
        assert fields(ours) == fields(theirs)
    assert [*map(fields, found.held_out["test"][2:5])] == [*map(fields, made.held_out["test"][2:5])]
    assert fields(found.train[-1]) == fields(made.train[-1])
    if made.vary is not None:
        assert found.vary is not None
        assert fields(found.vary(found.train[1], 7)) == fields(made.vary(made.train[1], 7))


def test_a_run_that_is_given_its_rows_reads_no_files_and_learns_the_same(tmp_path: Path) -> None:
    root = write_all(tmp_path / "all")
    settings = preference_config(root, "dpo", LORA, tmp_path / "one", run={"steps": 2})
    base: Base = base_of(root)
    assert base.tokenizer is not None
    given = sent(prepare(settings, base.model, Tokenizer.load(base.tokenizer)), tmp_path / "rows")
    expected = tune(root, settings)
    (root / "pairs.jsonl").unlink()
    again = preference_config(root, "dpo", LORA, tmp_path / "two", run={"steps": 2})
    result = Finetuning(again, base, Mesh.single(), prepared=given).run()
    assert result.metrics == pytest.approx({name: expected[name] for name in result.metrics}, rel=1e-4, abs=1e-6)
