"""Full verification reads by other code than wrote, and names the tensor, the first element and both values."""

from __future__ import annotations

import re
import shutil
import struct
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from converters import copy
from converters.cast import as_float64, cast_array
from converters.formats.huggingface import FORMAT
from converters.full import nearest
from converters.independent._torch_files import load
from converters.independent.huggingface import HuggingFaceFiles
from converters.independent.native import NativeFiles
from converters.job import Job, JobOptions, make_job
from converters.open import formats, get_format, open_checkpoint
from tests.helpers.checkpoints import random_native, whole_arrays
from tests.helpers.hf_models import CASES, save_model
from workbench.cli.main import main
from workbench.errors import VerificationError
from workbench.registry import module_names
from workbench.spec.geometry import Box, LogicalTensor
from workbench.spec.layout import ParallelLayout

FIRST_OF_A_FAMILY = {case.split(",")[0].split(" ")[0]: case for case in reversed(sorted(CASES))}


def in_two(tensor: LogicalTensor) -> tuple[slice, slice]:
    """The rows of a tensor in two parts."""
    return slice(0, tensor.shape[0] // 2 + 1), slice(tensor.shape[0] // 2 + 1, tensor.shape[0])


@pytest.mark.parametrize("case", sorted(FIRST_OF_A_FAMILY.values()))
def test_the_independent_reader_of_hugging_face_folders_agrees_with_ours(case: str, tmp_path: Path) -> None:
    source = FORMAT.open(save_model(case, tmp_path / "hf", max_shard_size="60KB")).source
    reader = HuggingFaceFiles(tmp_path / "hf", source)
    for name, tensor in source.schema.items():
        found = [reader.read(tensor, rows) for rows in in_two(tensor)]
        np.testing.assert_array_equal(np.concatenate(found), source.read(name, Box.whole(tensor.shape)), name)


@pytest.mark.parametrize("layout", [ParallelLayout(), ParallelLayout(tp=4, pp=3, pp_layout=(1, 2, 1))], ids=str)
def test_the_independent_reader_of_native_folders_needs_no_manifest(layout: ParallelLayout, tmp_path: Path) -> None:
    held = random_native(tmp_path / "a", layout=layout)
    (tmp_path / "a" / "manifest.json").unlink()
    reader = NativeFiles(tmp_path / "a", held)
    for name, array in whole_arrays(held).items():
        found = [reader.read(held.schema[name], rows) for rows in in_two(held.schema[name])]
        np.testing.assert_array_equal(np.concatenate(found), array, name)
    (tmp_path / "a" / "model-tp00-pp00.safetensors").unlink()
    with pytest.raises(VerificationError, match=r"hold \d+ elements of rows 0 to 53 of embed_tokens.weight, not 848"):
        reader = NativeFiles(tmp_path / "a", held)
        reader.read(held.schema["embed_tokens.weight"], slice(0, 53))


def planned(source: Path, path: Path, target: str = "native", **options: object) -> Job:
    layout = ParallelLayout(tp=2) if target == "native" else ParallelLayout()
    return make_job(
        open_checkpoint(source),
        get_format(target),
        path,
        JobOptions(layout, **options),  # type: ignore[arg-type]
        operation="test",
    )


@pytest.mark.parametrize("target", ["native", "huggingface", "dcp", "torchtitan", "megatron", "megatron_dist"])
@pytest.mark.parametrize("dtype", [None, "F32", "F16"])
def test_what_was_written_passes_cast_or_not(target: str, dtype: str | None, tmp_path: Path) -> None:
    random_native(
        tmp_path / "a", layout=ParallelLayout(tp=2, pp=2), optimizer=target in ("native", "dcp", "torchtitan")
    )
    planned(tmp_path / "a", tmp_path / "b", target, dtype=dtype).run(verify="full")
    planned(tmp_path / "b", tmp_path / "c").run(verify="full")


def test_every_format_has_a_second_reader() -> None:
    assert {name for name in module_names("converters.independent") if name in formats()} == formats().keys()


def test_pytorch_loads_foreign_files_without_running_what_they_name(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (shutil.copyfile, (__file__, str(tmp_path / "ran")))

    torch.save({"args": Namespace(tp=2), "bomb": Bomb(), "weight": torch.ones(2)}, tmp_path / "file.pt")
    found = load(tmp_path / "file.pt")
    assert vars(found["args"]) == {"tp": 2} and found["weight"].tolist() == [1, 1]
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("target", ["native", "huggingface", "dcp", "megatron", "megatron_dist"])
def test_a_copier_that_errs_is_found_although_it_read_back_what_it_wrote(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_native(tmp_path / "a", layout=ParallelLayout(tp=2, pp=2), optimizer=False)
    right = copy._cut

    def wrong(held: object, box: Box) -> np.ndarray:
        array = right(held, box)  # type: ignore[arg-type]
        return np.roll(array, 1, axis=-1) if array.shape[-1] in (12, 24) else array

    monkeypatch.setattr(copy, "_cut", wrong)
    planned(tmp_path / "a", tmp_path / "passed", target).run(verify="crc")
    with pytest.raises(VerificationError) as error:
        planned(tmp_path / "a", tmp_path / "b", target).run(verify="full")
    assert re.search(
        r"layers\.0\.mlp\.down_proj\.weight, first at \[0, 0\]: \S+ was written, the source has", str(error)
    )
    assert not list(tmp_path.glob("b*"))


def test_the_result_says_that_other_code_has_read_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random_native(tmp_path / "a")
    assert main(["reshard", str(tmp_path / "a"), str(tmp_path / "b"), "--tp", "2", "--verify", "full"]) == 0
    assert "every tensor is equal, bit for bit, as read by other code than wrote it" in capsys.readouterr().out


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1), st.sampled_from(["BF16", "F16"]))
def test_rounding_by_spacing_is_the_rounding_of_the_cast(words: list[int], dtype: str) -> None:
    values = np.frombuffer(struct.pack(f"<{len(words)}I", *words), np.float32)
    cast = as_float64(cast_array(values, "F32", dtype), dtype)
    limit = {"BF16": 3.39e38, "F16": 65504.0}[dtype]  # beyond these a cast gives infinity, and is refused
    expected = nearest(values.astype(np.float64), dtype)
    kept = ~(np.abs(values) > limit) | np.isinf(values)
    np.testing.assert_array_equal(expected[kept], cast[kept])
