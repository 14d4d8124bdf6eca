"""The second reader of buckets that name nobody: it finds a weight's state by what the masters round to."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from converters.independent._megatron_buckets import Buckets, NotTold
from converters.job import JobOptions, make_job
from converters.megatron.buffers import Found
from converters.open import get_format, open_checkpoint
from workbench.errors import VerificationError
from workbench.spec.layout import ParallelLayout

BUCKET = "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(x).bucket_idx_0."
KINDS = ("param", "exp_avg")


class Folder:
    """One bucket of some parameters, one after another with a gap between, each of two tensors: masters and moments."""

    def __init__(self, *parameters: Iterable[torch.Tensor]) -> None:
        self._starts, lines = [], {kind: [] for kind in KINDS}
        for parameter in parameters:
            self._starts.append(sum(map(len, lines["param"])))
            for kind, values in zip(KINDS, parameter, strict=True):
                lines[kind] += [values.flatten(), torch.full((3,), torch.nan, dtype=values.dtype)]
        self._held = {f"{BUCKET}{kind}": torch.cat(line) for kind, line in lines.items()}
        self.names = [*self._held, "decoder.final_layernorm.weight"]

    def begins(self, name: str) -> list[int]:
        return self._starts

    def run(self, name: str, start: int, end: int) -> torch.Tensor:
        found = self._held[name][start:end]
        return torch.cat([found, torch.full((end - start - len(found),), torch.nan, dtype=found.dtype)])


def parameter(*shape: int) -> torch.Tensor:
    return torch.randn(2, *shape)


def test_a_weight_is_found_whole_by_rows_by_columns_and_in_halves():
    norm, whole, above, below, left, right = (parameter(*s) for s in ((6,), (8, 6), (4, 6), (4, 6), (8, 3), (8, 3)))
    buckets = Buckets(Folder(below, left, norm, above, whole, right), (1, 2))
    gates, ups = (torch.cat([part[:, half] for part in (above, below)], 1) for half in (slice(0, 2), slice(2, 4)))
    cases = {
        "norm": norm,
        "whole": whole,
        "rows": torch.cat([above, below], 1),
        "columns": torch.cat([left, right], 2),
        "halves of rows": torch.cat([gates, ups], 1),
    }
    for name, (master, moment) in cases.items():
        assert buckets.state("exp_avg", master.bfloat16()).equal(moment), name
        assert buckets.state("param", master.bfloat16()).equal(master), name


def test_state_of_another_type_keeps_it():
    master = torch.randn(4, 6)
    folder = Folder((master, master.bfloat16()))
    assert Buckets(folder, (1,)).state("exp_avg", master.bfloat16()).equal(master.bfloat16())
    assert Buckets(folder, (1,)).state("exp_avg", master.bfloat16()).dtype == torch.bfloat16


def test_a_weight_that_no_bucket_holds_is_not_found():
    one = parameter(4, 4)
    buckets = Buckets(Folder(one), (1,))
    assert buckets.state("exp_avg", parameter(4, 4)[0].bfloat16()) is None
    changed = one[0].bfloat16()
    changed[2, 1] += 1
    assert buckets.state("exp_avg", changed) is None


def test_of_equal_weights_equal_state_is_found_and_different_state_is_told_as_such():
    norms = [torch.stack([torch.ones(6), torch.full((6,), moment)]) for moment in (0.5, 0.5, 0.25)]
    assert Buckets(Folder(*norms[:2]), (1,)).state("exp_avg", torch.ones(6)).equal(norms[0][1])
    with pytest.raises(NotTold):
        Buckets(Folder(*norms), (1,)).state("exp_avg", torch.ones(6))


@pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")
def test_moments_that_the_format_takes_for_each_other_are_found_by_the_second_reader(
    quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swapped = {f"decoder.layers.{at}.self_attention.linear_proj.weight": 1 - at for at in (0, 1)}
    add = Found.add

    def confused(found: Found, kind: str, dtype: str, pieces: Any) -> None:
        named = [
            (f"decoder.layers.{swapped[name]}.self_attention.linear_proj.weight", piece)
            if kind == "exp_avg" and name in swapped
            else (name, piece)
            for name, piece in pieces
        ]
        add(found, kind, dtype, named)

    monkeypatch.setattr(Found, "add", confused)
    opened = open_checkpoint(quick / "buckets" / "dp_reshardable")
    job = make_job(opened, get_format("native"), tmp_path / "out", JobOptions(ParallelLayout()), operation="import")
    with pytest.raises(
        VerificationError, match=r"differs from the source: optim\.exp_avg/layers\.[01]\.self_attn\.o_proj"
    ):
        job.run(verify="full")
    assert not (tmp_path / "out").exists()
