"""Megatron's rank folders: read as megatron-core writes them, written as it reads them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from converters.format import OpenedCheckpoint, no_progress
from converters.independent.megatron import MegatronFiles
from converters.job import JobOptions, make_job
from converters.logits import engine_logits
from converters.open import get_format, open_checkpoint
from tests.helpers.megatron_cases import CASES, Case, logical, probe
from workbench.errors import ConversionError
from workbench.spec.geometry import Box
from workbench.spec.layout import ParallelLayout

pytest.importorskip("megatron.core")
SOURCES = {
    "llama-tp4-vpp2": "llama-tp2-pp2",
    "llama-tied-pp2": "llama-tied-pp2",
    "llama-uneven": "llama",
    "gpt-tp2-pp2": "gpt",
    "experts-tp2-ep2": "experts-etp1",
    "experts-etp1": "experts-tp2-ep2",
}
"""What is exported, and the checkpoint of the same model that it comes from."""


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
    second = MegatronFiles(written / name, opened.source)
    for key, tensor in expected.items():
        np.testing.assert_array_equal(found[key], as_stored(tensor), err_msg=key)
        again = second.read(opened.source.schema[key], slice(0, len(tensor)))
        np.testing.assert_array_equal(again, found[key], err_msg=key)
    opened.check(no_progress)


@pytest.mark.parametrize("name", ["llama", "gpt", "experts"])
def test_the_engine_computes_what_megatron_computes(written: Path, name: str) -> None:
    opened = open_checkpoint(written / name)
    theirs = torch.load(written / name / "logits.pt", weights_only=True)
    ours = engine_logits(opened.model, opened.source, probe().tolist())
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine.reshape(other.shape), other.numpy(), atol=2e-6)


def layout_of(case: Case) -> ParallelLayout:
    return ParallelLayout(
        tp=case.tp,
        pp=case.pp,
        vpp=case.vpp,
        ep=case.ep,
        dp=case.ep,
        etp=case.etp,
        pp_layout=(2, 1, 1) if case.more else None,
        sequence_parallel=case.etp is not None,
        vocab_multiple=8,
    )


def export(source: Path, path: Path, layout: ParallelLayout, to: str = "megatron") -> Path:
    job = make_job(open_checkpoint(source), get_format(to), path, JobOptions(layout), operation="export")
    job.run(verify="full")
    return path


def test_megatron_loads_what_is_exported_strictly_and_has_the_same_bits(written: Path, tmp_path: Path) -> None:
    """From another layout through a native checkpoint on one rank; the arguments say what Megatron's own say."""
    for name, source in SOURCES.items():
        native = export(written / source, tmp_path / "native" / name, ParallelLayout(), "native")
        export(native, tmp_path / "exported" / name, layout_of(CASES[name]))
    oracle("check", tmp_path / "exported", *SOURCES)


def test_what_is_exported_is_read_again_at_its_layout(written: Path, tmp_path: Path) -> None:
    case = CASES["llama-tp4-vpp2"]
    opened = open_checkpoint(export(written / "llama", tmp_path / "out", layout_of(case)))
    assert opened.check is not None and opened.layout is not None
    opened.check(no_progress)
    assert opened.model == open_checkpoint(written / "llama").model
    assert (opened.layout.tp, opened.layout.pp, opened.layout.vpp, opened.layout.vocab_multiple) == (4, 2, 2, 8)


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (ParallelLayout(vpp=2), "vpp=2 with pp=1: Megatron has chunks in a pipeline only"),
        (ParallelLayout(pp=2, vpp=2, placement="vee"), "placement='vee': Megatron's stages go round in a loop"),
    ],
)
def test_a_layout_that_megatron_does_not_have_is_refused(
    written: Path, tmp_path: Path, layout: ParallelLayout, said: str
) -> None:
    with pytest.raises(ConversionError, match=said):
        export(written / "llama", tmp_path / "out", layout)
    assert not list(tmp_path.iterdir())
