"""What docs/your-own-architecture.md tells to write is what runs, at any layout, and what exports."""

from __future__ import annotations

import ast
import importlib
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from converters.fields import ACTIVATIONS
from converters.formats.huggingface import FORMAT
from converters.job import JobOptions, make_job
from converters.logits import engine_logits, probe_sequences
from converters.open import open_checkpoint
from tests.converters.families.test_logits import run_transformers
from tests.helpers.checkpoints import random_native, tiny_model
from tests.helpers.parity import assert_observed, train_three_steps
from tests.helpers.ranks import run_ranks
from workbench.errors import ConversionError
from workbench.models.build import build_stage, initialise
from workbench.models.generate import generate, outputs
from workbench.parallel.mesh import Mesh
from workbench.spec.layout import ParallelLayout
from workbench.spec.model import ModelConfig
from workbench.spec.norm_placement import PLACEMENTS

PAGE = (Path(__file__).parents[2] / "docs" / "your-own-architecture.md").read_text()
FILES = dict(re.findall(r"```python\n# (\S+\.py)\n(.*?)```", PAGE, re.DOTALL))
LINES = dict(re.findall(r"```python\n# \S+: a line of (\w+)\n(.*?)```", PAGE, re.DOTALL))
CONFIG: dict[str, Any] = tomllib.loads(re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)[0])
MODEL = {**CONFIG["model"], "vocab_size": 101, "initializer_range": 0.2}


@contextmanager
def as_written(folder: Path) -> Iterator[None]:
    """The page's files in their packages, as if they lay there, and its lines in their tables."""
    homes = {}
    for place, text in FILES.items():
        file = folder / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        homes[place.removesuffix(".py").replace("/", ".")] = file.parent
    tables = {"PLACEMENTS": cast(dict[str, Any], PLACEMENTS), "ACTIVATIONS": cast(dict[str, Any], ACTIVATIONS)}
    added = {name: ast.literal_eval("{" + line + "}") for name, line in LINES.items()}
    for name, parent in homes.items():
        importlib.import_module(name.rpartition(".")[0]).__path__.append(str(parent))
    for name, entries in added.items():
        tables[name].update(entries)
    try:
        yield
    finally:
        for name, parent in homes.items():
            importlib.import_module(name.rpartition(".")[0]).__path__.remove(str(parent))
            sys.modules.pop(name, None)
        for name, entries in added.items():
            for key in entries:
                del tables[name][key]


def with_page(folder: Path, function: Callable[..., Any], *args: Any) -> Any:
    """`function(ModelConfig of the page, *args)`, on a rank."""
    with as_written(folder):
        return function(ModelConfig.model_validate(MODEL), *args)


def test_the_page_has_all_that_this_test_runs() -> None:
    assert [Path(place).stem for place in FILES] == ["relu2", "chunked"]
    assert set(LINES) == {"PLACEMENTS", "ACTIVATIONS"}


@pytest.mark.parametrize(
    "degrees",
    [
        {"tp": 2, "pp": 2, "sequence_parallel": True},
        {"tp": 2, "cp": 2},
        {"cp": 2, "context": "ring"},
        {"dp": 2, "shard": "zero3"},
    ],
    ids=str,
)
@pytest.mark.parametrize("documents", [False, True])
def test_the_variant_trains_at_any_layout_as_on_one_process(
    tmp_path: Path, degrees: dict[str, Any], documents: bool
) -> None:
    layout = ParallelLayout(**degrees)
    alone = with_page(tmp_path / "one", train_three_steps, ParallelLayout(), "gpipe", 4, documents)
    seen = run_ranks(layout.world_size, with_page, tmp_path / "many", train_three_steps, layout, "1f1b", 1, documents)
    assert_observed(seen, alone)


def test_each_word_of_the_variant_changes_what_is_computed(tmp_path: Path) -> None:
    with as_written(tmp_path):
        found = []
        for without in ("", "hidden_act", "attention_mask", "norm_placement"):
            model = ModelConfig.model_validate({key: value for key, value in MODEL.items() if key != without})
            built = build_stage(model, Mesh.single())
            initialise(built.parameters, model, seed=1)
            found.append(outputs(built.module, {"input_ids": range(1, 12)}))
            tokens = list(generate(built.module, [1, 2, 3], max_new_tokens=9))
            assert tokens[-1] == int(outputs(built.module, {"input_ids": [1, 2, 3, *tokens[:-1]]})[-1].argmax())
    assert all(not torch.allclose(found[0], other) for other in found[1:])


def test_its_activation_exports_to_what_transformers_computes_and_its_mask_is_refused(tmp_path: Path) -> None:
    with as_written(tmp_path / "page"):
        random_native(
            tmp_path / "native",
            tiny_model(hidden_act="relu2"),
            ParallelLayout(tp=2, pp=2),
            dtype="F32",
            optimizer=False,
        )
        opened = open_checkpoint(tmp_path / "native")
        make_job(opened, FORMAT, tmp_path / "hf", JobOptions(ParallelLayout()), operation="export").run(verify="full")
        sequences = probe_sequences(opened.model)
        ours = engine_logits(opened.model, opened.source, sequences)
        for mine, theirs in zip(ours, run_transformers(tmp_path / "hf", sequences), strict=True):
            assert abs(mine - theirs).max() <= 1e-4 * abs(theirs).max()
        random_native(tmp_path / "masked", tiny_model(attention_mask="chunked"), optimizer=False)
        with pytest.raises(ConversionError, match="attention_mask='chunked' has no place, only 'causal'"):
            make_job(
                open_checkpoint(tmp_path / "masked"),
                FORMAT,
                tmp_path / "no",
                JobOptions(ParallelLayout()),
                operation="export",
            )


def test_a_word_without_its_file_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"'gelu_tan' is not one of gelu, gelu_tanh, relu, silu; did you mean 'gelu_tanh'"
    ):
        tiny_model(hidden_act="gelu_tan")
    with pytest.raises(ValueError, match="'chunked' is not one of causal"):
        tiny_model(attention_mask="chunked")
    with pytest.raises(ValueError, match="'ends' is not one of pre, post, sandwich"):
        tiny_model(norm_placement="ends")
