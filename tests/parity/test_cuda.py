"""Cases of the parity matrix on GPUs in float64: one against the CPU, several ranks against one. Ranks talk through
NCCL; where there are fewer GPUs than ranks they share them. Skipped without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from tests.helpers.pairwise import Case
from tests.parity.case import MODELS, PLAIN, name_of
from tests.parity.matrix import QUICK, TOLERANCE, WHOLE, distance, distance_of
from tests.parity.run import train
from workbench.models import decoder
from workbench.models.rope import rope_table
from workbench.spec.model import ModelConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.parity,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
ALONE: tuple[Case, ...] = (
    *({"model": name, "documents": name in ("gated", "sliding")} for name in MODELS),
    {"recompute": "full", "loss_chunk": 5, "optimizer": "muon"},
    {"recompute": "selective", "head": "labels", "tied": False},
)


@pytest.mark.parametrize("case", [{**PLAIN, **case} for case in ALONE], ids=name_of)
def test_one_gpu_trains_like_the_cpu(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def on_cpu(
        model: ModelConfig, positions: torch.Tensor, reach: torch.Tensor, dtype: torch.dtype, *, local: bool = False
    ) -> tuple[torch.Tensor, ...]:
        return tuple(
            part.to(positions.device) for part in rope_table(model, positions.cpu(), reach.cpu(), dtype, local=local)
        )

    # Angles and their cosines are fp32 in any case, and the last bit of a cosine is another on a GPU.
    monkeypatch.setattr(decoder, "rope_table", on_cpu)
    off = distance_of(case, [train(case, str(tmp_path), 1, "cuda")])
    assert off.largest < TOLERANCE, off


@pytest.mark.parametrize("case", [{**PLAIN, **case} for case in QUICK + WHOLE], ids=name_of)
def test_ranks_train_like_one_process(case: Case) -> None:
    if case["shard_size"] and not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        pytest.skip("several copies, each shared, need torch 2.13")
    off = distance(case, "cuda")
    assert off.largest < TOLERANCE, off
