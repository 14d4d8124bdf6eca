"""Megatron's rank folders: read as megatron-core writes them, written as it reads them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from converters.format import OpenedCheckpoint, no_progress
from converters.logits import engine_logits
from converters.open import open_checkpoint
from tests.helpers.megatron_cases import CASES, logical, probe
from workbench.spec.geometry import Box

pytest.importorskip("megatron.core")


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every case, as megatron-core writes it."""
    root = tmp_path_factory.mktemp("megatron")
    oracle("write", root)
    return root


def oracle(verb: str, root: Path, *names: str) -> None:
    words = [sys.executable, "-m", "tests.helpers.megatron_ranks", verb, str(root), *names]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def values(opened: OpenedCheckpoint) -> dict[str, np.ndarray]:
    schema = opened.source.schema.items()
    return {name: opened.source.read(name, Box.whole(tensor.shape)) for name, tensor in schema}


def as_stored(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


@pytest.mark.parametrize("name", CASES)
def test_what_megatron_writes_is_read_bit_for_bit(written: Path, name: str) -> None:
    opened = open_checkpoint(written / name)
    case, found = CASES[name], values(opened)
    expected = logical(case)
    assert opened.format == "megatron" and opened.check is not None and opened.layout is not None
    layout = opened.layout
    assert (layout.tp, layout.pp, layout.vpp, layout.ep) == (case.tp, case.pp, case.vpp, case.ep)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        np.testing.assert_array_equal(found[key], as_stored(tensor), err_msg=key)
    opened.check(no_progress)


@pytest.mark.parametrize("name", ["llama", "gpt", "experts"])
def test_the_engine_computes_what_megatron_computes(written: Path, name: str) -> None:
    opened = open_checkpoint(written / name)
    theirs = torch.load(written / name / "logits.pt", weights_only=True)
    ours = engine_logits(opened.model, opened.source, probe().tolist())
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine.reshape(other.shape), other.numpy(), atol=2e-6)
