"""Number formats and dropout with everything else: a few steps at each pair of features lose what one process loses.

In float64 layouts agree to 1e-10 (test_matrix.py). Here activations are rounded to 8 bits (bf16), 11 bits (fp16) or in
products to 4 bits (fp8), in another order at each layout; what is compared is the loss, a mean over 128 tokens. A wrong
collective or a forgotten scale moves it by tenths.
"""

from __future__ import annotations

import tempfile
from functools import cache
from typing import Any

import pytest
import torch

from pretrain.config import EngineConfig
from pretrain.objective import Share
from pretrain.step import agree, train_step
from pretrain.trainer import Subject, Trainer
from tests.helpers.models import gated_model
from tests.helpers.pairwise import Case, pairwise
from tests.helpers.ranks import run_ranks
from tests.pretrain.models import Noise
from workbench.errors import LayoutError
from workbench.models.build import initialise
from workbench.parallel.mesh import Mesh
from workbench.spec.model import ModelConfig

SAMPLES, TOKENS, STEPS = 8, 16, 3
RELATIVE = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 5e-3}
FP8_RELATIVE = 5e-2
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp": {"tp": 2},
    "tp and sp": {"tp": 2, "sequence_parallel": True},
    "cp": {"cp": 2},
    "ring": {"cp": 2, "context": "ring"},
    "interleaved_zb": {"pp": 2, "schedule": "interleaved_zb", "vpp": 2},
    "1f1b": {"pp": 2},
    "zero1": {"dp": 2, "shard": "zero1"},
    "zero3": {"dp": 2, "shard": "zero3"},
}
DIMENSIONS: dict[str, tuple[Any, ...]] = {
    "compute": ("bf16", "fp16", "fp32"),
    "linear": ("compute", "fp8_tensorwise", "fp8_rowwise"),
    "grad_reduce": ("fp32", "bf16"),
    "moments": ("fp32", "bf16"),
    "optimizer": ("adamw", "muon"),
    "dropout": (None, "hidden_dropout", "attention_dropout"),
    "layout": tuple(LAYOUTS),
    "recompute": ("none", "selective", "full"),
    "loss_chunk": (0, 5),
}


def model_of(case: Case) -> ModelConfig:
    """A small model whose local sizes an fp8 product takes."""
    dropout = {case["dropout"]: 0.1} if case["dropout"] else {}
    return gated_model(intermediate_size=64, initializer_range=0.05, **dropout)


def config_of(case: Case, folder: str, *, alone: bool) -> EngineConfig:
    return EngineConfig.model_validate(
        {
            "batch": {"global_size": SAMPLES, "micro_size": 2, "seq_len": TOKENS},
            "optim": {"name": case["optimizer"], "moments": case["moments"], "lr": 3e-3},
            "precision": {
                "compute": case["compute"],
                "linear": case["linear"],
                "grad_reduce": "fp32" if alone else case["grad_reduce"],
                # A small scale, so that no step is skipped and all of them are compared.
                "loss_scale": 64.0 if case["compute"] == "fp16" else "dynamic",
            },
            "parallel": {} if alone else LAYOUTS[case["layout"]],
            "recompute": {"mode": "none" if alone else case["recompute"]},
            "kernels": {"loss_chunk_tokens": 0 if alone else case["loss_chunk"]},
            "run": {"dir": folder, "steps": STEPS, "seed": 7},
        }
    )


def allowed(case: Case) -> bool:
    """Whether the configuration's check lets a case run that is chosen in full."""
    if case.keys() < DIMENSIONS.keys():
        return True
    try:
        config_of(case, "nowhere", alone=False).resolve_layout(model_of(case), 2)
    except LayoutError:
        return False
    return True


def losses(case: Case, folder: str, alone: bool) -> list[float]:
    """The loss of each step, as every rank knows it."""
    model, config = model_of(case), config_of(case, folder, alone=alone)
    mesh = Mesh.create(config.resolve_layout(model, 1 if alone else 2), torch.device("cpu"))
    subject = Subject(model, fill=lambda parameters: initialise(parameters, model, seed=7))
    objective = Noise(tokens=TOKENS)
    trainer = Trainer(config, subject, objective, mesh)
    share = Share(config.batch.micro_size, mesh.dp.rank, mesh.dp.size)
    found = []
    for step in range(STEPS):
        rows = objective.train_rows(share, step=step, first_sample=SAMPLES * step, global_size=SAMPLES)
        agreed = agree(rows, mesh, stop=False)
        result = train_step(
            trainer.pipeline,
            trainer.optimizer,
            rows,
            agreed=agreed,
            lr=3e-3,
            seed=7,
            step=step,
            loss_scale=trainer.loss_scale,
        )
        assert not result.skipped
        found.append(result.mean_loss(mesh))
    return found


@cache
def of_one_process(choices: tuple[tuple[str, Any], ...]) -> list[float]:
    case = {**{name: values[0] for name, values in DIMENSIONS.items()}, **dict(choices)}
    with tempfile.TemporaryDirectory() as folder:
        return losses(case, folder, True)


@pytest.mark.parity
@pytest.mark.exhaustive
@pytest.mark.parametrize("case", pairwise(DIMENSIONS, allowed)[0], ids=lambda case: " ".join(map(str, case.values())))
def test_a_format_loses_alike_on_two_ranks(case: Case) -> None:
    kept = ("compute", "linear", "moments", "optimizer", "dropout")
    expected = of_one_process(tuple((key, case[key]) for key in kept))
    with tempfile.TemporaryDirectory() as folder:
        found = run_ranks(2, losses, case, folder, False)
    relative = RELATIVE[case["compute"]] if case["linear"] == "compute" else FP8_RELATIVE
    if case["grad_reduce"] == "bf16":
        relative = max(relative, RELATIVE["bf16"])
    for one in found:
        assert one == pytest.approx(expected, rel=relative)
